"""The runs, on what there is: bad input, interruption, and every section that a CPU can do."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import typer
from models import tiny_config
from typer.testing import CliRunner, Result

from bench import cpu, kernel_cases, kernels, models
from bench.floors import Machine
from bench.gpu import __main__ as gpu
from bench.static.limits import Cost
from fastbert.benchmark.results import Results
from fastbert.benchmark.workloads import Workload, full, ragged

CPU = torch.device("cpu")
WORKLOADS = [Workload("first", (4, 9), "forward"), Workload("second", (9, 9), "finetune")]


class Made(Machine):
    """Limits at hand: measuring real ones takes time."""

    copy = 1e9

    def product(self, m: int, n: int, k: int, dtype: torch.dtype) -> float:
        return 1e-9 * m * n * k

    def rate(self, dtype: torch.dtype) -> float:
        return 2e9


def invoke(command: Any, *arguments: str | Path) -> Result:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (cpu.main, ["--workload", "rugged"], "unknown workload 'rugged': choose from full, ragged"),
        (cpu.main, ["--peer", "tensorrt"], "unknown peer 'tensorrt': choose from fastbert, fastbert-auto, eager"),
        (cpu.main, ["--model", "huge"], "unknown model 'huge': choose from minilm, base, large"),
        (cpu.main, ["--dtype", "int8"], "unknown dtype 'int8'"),
        (gpu.main, ["--out", "x", "--workload", "rugged"], "unknown workload 'rugged': choose from full-128"),
        (gpu.main, ["--out", "x", "--section", "all"], "unknown section 'all': choose from device, ops, sanitizer"),
        (gpu.main, ["--out", "x", "--model", "huge"], "unknown model 'huge'"),
        (gpu.main, ["--out", "x", "--peer", "tensorrt"], "unknown peer 'tensorrt'"),
    ],
)
def test_unknown_names_list_the_known(command: Any, arguments: list[str], message: str) -> None:
    result = invoke(command, *arguments)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_clear_line(tmp_path: Path) -> None:
    result = invoke(gpu.main, "--out", tmp_path / "new")
    assert result.exit_code == 2
    assert result.output.strip() == (
        "error: no GPU here: torch.cuda.is_available() is False; `make bench` measures on a CPU"
    )
    assert not (tmp_path / "new").exists()


@pytest.fixture
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.CONFIGS, "minilm", tiny_config(hidden_dropout_prob=0.1))
    monkeypatch.setattr(models, "Machine", Made)


def plan() -> list[models.Item]:
    return [("minilm", workload, torch.float32) for workload in WORKLOADS]


@pytest.mark.usefixtures("tiny_models")
def test_a_run_saves_rows_with_floors(tmp_path: Path) -> None:
    results = Results({})
    path = tmp_path / "models.json"
    models.run(plan(), ["fastbert", "eager"], CPU, results, path, seconds=0, rounds=(1, 1))
    saved = Results.load(path)
    assert saved.finished
    assert [(row.workload, row.contender) for row in saved.rows] == [
        (w.name, name) for w in WORKLOADS for name in ("fastbert", "eager")
    ]
    assert all(row.times is not None and row.floor is not None and row.floor > 0 for row in saved.rows)
    assert saved.facts["ceilings"] == {"copy_bytes": 1e9, "flops_float32": 2e9}


@pytest.mark.usefixtures("tiny_models")
def test_an_interrupted_run_keeps_what_is_finished(tmp_path: Path) -> None:
    def interrupted(workload: Workload, *rest: Any) -> float:
        if workload.name == "second":
            raise KeyboardInterrupt
        return 1.0

    path = tmp_path / "models.json"
    with mock.patch.object(models, "floor", interrupted), pytest.raises(KeyboardInterrupt):
        models.run(plan(), ["fastbert", "eager"], CPU, Results({}), path, seconds=0, rounds=(1, 1))
    saved = Results.load(path)
    assert not saved.finished
    assert {row.workload for row in saved.rows} == {"first"}


@pytest.mark.usefixtures("tiny_models")
def test_what_the_time_is_too_short_for_is_recorded(tmp_path: Path) -> None:
    results = Results({})
    models.run(plan(), ["eager"], CPU, results, tmp_path / "m.json", seconds=0, rounds=(1, 1), deadline=0)
    assert [row.problem for row in results.rows] == ["out of time", "out of time"]


@pytest.mark.usefixtures("tiny_models")
def test_the_cpu_run_prints_ratios_and_writes_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CPU_WORKLOADS", {w.name: w for w in WORKLOADS})
    out = tmp_path / "cpu.json"
    result = invoke(
        cpu.main, "--peer", "fastbert", "--peer", "eager", "--dtype", "fp32", "--seconds", "0", "--json", out
    )
    assert result.exit_code == 0, result.output
    assert "T/Floor" in result.output
    assert "HF eager" in result.output
    assert len(Results.load(out).rows) == 4


def tiny_cases() -> dict[str, kernel_cases.OpCase]:
    return {
        "full": kernel_cases._attention_case(full(2, 8), "2 x 8", heads=2),
        "ragged": kernel_cases._attention_case(ragged(4, 16, 0.5), "4 x 16", heads=2),
        "maps": kernel_cases._attention_case(full(2, 8), "2 x 8", maps=True, heads=2),
        "norm": kernel_cases._norm_case(32, tokens=10),
        "dropout": kernel_cases._norm_case(32, dropout_p=0.1, tokens=10),
        "norm-alone": kernel_cases._norm_alone_case(32, tokens=10),
        "feed-forward": kernel_cases._feed_forward_case(32, tokens=10),
        "gelu": kernel_cases._gelu_case(32, tokens=10),
        "embed": kernel_cases._embed_case(32, batch=2, seq=8),
        "linear": kernel_cases._linear_case(32, 16, tokens=10),
    }


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilation takes long, and its results are eager's."""
    monkeypatch.setattr(kernel_cases, "compiled", lambda function: function)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", tiny_cases())
def test_kernels_are_right_and_timed_in_both_directions(name: str) -> None:
    rows = list(kernels.measure(tiny_cases()[name], torch.bfloat16, CPU, Made(CPU), seconds=0))
    ours = [row for row in rows if row.contender in ("fastbert", "cuBLAS")]
    assert [row.kernel.split()[-1] for row in ours] == ["forward", "backward"]
    for row in ours:
        assert row.problem is None
        assert row.times is not None
        assert row.floor > 0
        assert 0 < row.error <= row.bound
    if name != "linear":
        eager = [row for row in rows if row.contender == "torch eager"]
        assert all(row.times is not None for row in eager)
    if name == "maps":
        flash = [row for row in rows if row.contender == "SDPA flash"]
        assert [row.problem for row in flash] == ["returns no maps"] * 2


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_wrong_kernel_gets_no_time(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
            return y * 1.1 if direction == "forward" else y.clone()

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
            return dy * 1.1 if direction == "backward" else dy

    right = kernel_cases.bias_activation
    monkeypatch.setattr(kernel_cases, "bias_activation", lambda *given: Wrong.apply(right(*given)))
    rows = kernels.measure(kernel_cases._gelu_case(32, tokens=10), torch.bfloat16, CPU, Made(CPU), seconds=0)
    problems = {row.kernel: row.problem for row in rows if row.contender == "fastbert"}
    assert str(problems.pop(f"bias_gelu {direction}")).startswith("wrong: its error")
    assert list(problems.values()) == [None]


@pytest.mark.usefixtures("uncompiled")
def test_peers_that_are_compiled_for_each_case_can_be_left_out() -> None:
    rows = kernels.measure(tiny_cases()["norm"], torch.bfloat16, CPU, Made(CPU), seconds=0, slow_peers=False)
    assert {row.contender for row in rows} == {"fastbert", "torch eager", "Liger"}


def test_costs_of_a_product_are_counted() -> None:
    case = kernel_cases._linear_case(32, 16, tokens=10)
    assert case.forward == Cost(2 * 10 * 32 * 16, 2 * (10 * 32 + 10 * 16 + 32 * 16), 0)

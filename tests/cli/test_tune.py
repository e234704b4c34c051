"""`fastbert tune` as a user meets it."""

import functools
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from fastbert.benchmark.timing import Run, Times
from fastbert.cli import app
from fastbert.tuning import choice, neighbours, problems, tuner
from fastbert_kernels import tuned
from fastbert_kernels.catalogue import Launch, Product

KERNEL = ("--kernel", "bias_activation_forward", "--dtype", "float32")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["tune", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture
def here(tuned_folder: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Measure where the tests' kernels run, in small: `here(seconds)` says what other tiles than the shipped take."""
    on = torch.device("cuda", 0) if device.type == "cuda" else device
    monkeypatch.setattr(importlib.import_module("fastbert.cli.tune"), "_gpu", lambda device: on)
    importlib.import_module("fastbert.tuning.launches")  # takes a default from Sizes as it is
    small = functools.partial(problems.Sizes, heads=1, ragged=(1, 17), even=(17, 17), rows=20, vocabulary=9)
    monkeypatch.setattr(problems, "Sizes", small)
    monkeypatch.setattr(choice, "_HALVINGS", 1)
    monkeypatch.setattr(neighbours, "neighbours", lambda launch, target, shipped: [shipped | {"BLOCK_M": 32}])

    def choose(seconds: float, interrupted_at: int = 99) -> None:
        calls = iter(range(interrupted_at))

        def timer(runs: Mapping[str, Run], device: torch.device, seconds: float = 0, other: float = seconds) -> Any:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            shipped, *others = runs
            return {shipped: Times(1, 1, 1, 5)} | {name: Times(other, other, other, 5) for name in others}

        monkeypatch.setattr(tuner, "flushed", timer)

    choose(1.0)
    return choose


def stored(folder: Path) -> dict[str, Any]:
    (path,) = folder.iterdir()
    return json.loads(path.read_text())


def test_what_is_faster_is_kept_shown_and_deleted(
    tiny: Path, here: Callable[..., None], tuned_folder: Path, device: torch.device
) -> None:
    here(0.5)
    result = run(tiny, *KERNEL, "--tokens", "12", "--lengths", "6")
    assert result.exit_code == 0, result.output
    for piece in ("bias_activation_forward float32 64", "16x128, 4 warps", "32x128, 4 warps", "2.00x", "tuned"):
        assert piece in result.stdout
    assert "1 of 1 launches have faster tiles" in result.stdout
    content = stored(tuned_folder)
    assert {"date", "device", "versions", "architecture"} <= content["provenance"].keys()
    (entry,) = content["entries"]
    (shape,) = entry["shapes"]
    assert shape["between"] == ["16x128, 4 warps, 1 stages", "32x128, 4 warps, 1 stages"]
    assert (shape["shape"], shape["shipped_us"], shape["tuned_us"], shape["kept"]) == ("12 rows", 1e6, 5e5, True)
    assert entry["shipped"]["BLOCK_M"] == 16
    launch = Launch("bias_activation_forward", torch.float32, 64)
    tuned._tables.clear()
    assert tuned.measured(device)[launch]["BLOCK_M"] == 32

    shown = run("--show")
    assert shown.exit_code == 0
    for piece in (str(tuned_folder), "in force", "bias_activation_forward float32 64", "2.00x"):
        assert piece in shown.stdout
    gone = run("--reset")
    assert gone.exit_code == 0
    assert "deleted" in gone.stdout
    assert list(tuned_folder.iterdir()) == []
    assert "no measured tiles of this device" in run("--reset").stdout
    assert "no measured tiles in" in run("--show").stdout


def test_what_is_not_faster_is_told_and_not_written(tiny: Path, here: Callable[..., None], tuned_folder: Path) -> None:
    here(1.25)
    result = run(tiny, *KERNEL, "--tokens", "12", "--lengths", "6")
    assert result.exit_code == 0, result.output
    assert "0.80x" in result.stdout
    assert "0 of 1 launches have faster tiles" in result.stdout
    assert not tuned_folder.exists()


def test_a_later_run_adds_to_the_file_and_takes_back(tiny: Path, here: Callable[..., None], tuned_folder: Path) -> None:
    small = "--tokens", "12", "--lengths", "6"
    here(0.5)
    run(tiny, *KERNEL, *small)
    run(tiny, "--kernel", "bias_activation_backward", "--dtype", "fp32", *small)
    kernels = [entry["kernel"] for entry in stored(tuned_folder)["entries"]]
    assert kernels == ["bias_activation_forward", "bias_activation_backward"]
    here(1.0)
    run(tiny, *KERNEL, *small)
    assert [entry["kernel"] for entry in stored(tuned_folder)["entries"]] == ["bias_activation_backward"]


def test_the_faster_products_are_kept_and_shown(
    tiny: Path,
    here: Callable[..., None],
    tuned_folder: Path,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = "--kernel", "feed_forward", "--tokens", "12", "--lengths", "6"
    here(0.5)
    result = run(tiny, *small)
    assert result.exit_code == 0, result.output
    for piece in ("feed_forward_fused bfloat16 32 gelu", "12 rows, training", "cuBLAS", "fused", "2.00x", "tuned"):
        assert piece in result.stdout
    assert "2 of 2 launches have faster tiles" in result.stdout
    assert "feed_forward_fused bfloat16 32 gelu: fused from 6 tokens on, shipped never fused" in result.stdout
    assert f"kept in {tuned_folder}" in result.stdout
    entries = stored(tuned_folder)["entries"]
    assert [x["kernel"] for x in entries] == ["feed_forward_forward", "feed_forward_backward", "feed_forward_fused"]
    assert (entries[2]["fused_from"], entries[2]["shipped"]) == (6, None)
    tuned._tables.clear()
    assert tuned.measured(device)[Product(torch.bfloat16, 32, "gelu")] == 6
    shown = run("--show")
    for piece in ("feed_forward_backward bfloat16 32", "feed_forward_fused bfloat16 32 gelu", "6 rows, training"):
        assert piece in shown.stdout

    in_force = []

    def timer(runs: Mapping[str, Run], device: torch.device, seconds: float) -> dict[str, Times]:
        in_force.append({x.kernel for x in tuned.measured(device)})
        return {name: Times(x, x, x, 5) for name, x in zip(runs, (1.0, 1.25), strict=True)}

    monkeypatch.setattr(tuner, "flushed", timer)
    alone = run(tiny, "--kernel", "feed_forward_fused", "--tokens", "12", "--lengths", "6")
    assert "0.80x" in alone.stdout
    assert in_force == 2 * [{"feed_forward_forward", "feed_forward_backward", "feed_forward_fused"}]
    assert "launches have faster tiles" not in alone.stdout
    assert "feed_forward_fused bfloat16 32 gelu: never fused as shipped" in alone.stdout
    kernels = [x["kernel"] for x in stored(tuned_folder)["entries"]]
    assert kernels == ["feed_forward_forward", "feed_forward_backward"]


def test_an_interrupted_run_keeps_what_is_done(tiny: Path, here: Callable[..., None], tuned_folder: Path) -> None:
    here(0.5, interrupted_at=3)  # a round and its confirmation, then the next kernel's round
    result = run(tiny, "--kernel", "bias_activation", "--dtype", "float32", "--tokens", "12", "--lengths", "6")
    assert result.exit_code == 130, result.output
    assert "interrupted: what is finished is kept" in result.stdout
    assert [entry["kernel"] for entry in stored(tuned_folder)["entries"]] == ["bias_activation_forward"]


def test_a_file_that_is_ignored_says_why(tuned_folder: Path, device: torch.device) -> None:
    path = tuned.write(tuned.kind(device), [], {})
    path.write_text(path.read_text().replace('"format": 3', '"format": 1'))
    (tuned_folder / "tiles-other.json").write_text("{}")
    result = run("--show")
    assert result.exit_code == 0
    assert f"{path}: ignored, its format is 1, here it is 3" in result.stdout
    assert f"{tuned_folder / 'tiles-other.json'}: of another device" in result.stdout


def test_a_folder_that_cannot_be_written_is_named(
    tiny: Path, here: Callable[..., None], tuned_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(0.5)
    tuned_folder.write_text("a file")
    result = run(tiny, *KERNEL, "--tokens", "12", "--lengths", "6")
    assert result.exit_code == 2
    assert f"FASTBERT_CACHE '{tuned_folder}" in result.output
    assert "cannot be written: choose another place" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(tuned_folder: Path) -> None:
    result = run()
    assert result.exit_code == 2
    assert result.output == (
        "error: tune measures on a GPU, and torch sees none here: the shipped tiles stay in force\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "unknown dtype 'int8': use float32"),
        (["--lengths", "12,x"], "--lengths '12,x' are not whole numbers"),
        (["--lengths", ""], "--lengths '' are not whole numbers"),
        (["--lengths", "0"], "0 is out of range: a call has 32768 tokens"),
        (["--lengths", "128", "--tokens", "64"], "128 is out of range: a call has 64 tokens"),
        (["--show", "--reset"], "give one of them"),
        (["--kernel", "gemm"], "no kernel has 'gemm' in its name: there are attention_forward, "),
        (["--kernel", "feed_forward", "--dtype", "fp32"], "bias_activation_forward, bias_activation_backward in fp32"),
        (["--kernel", "relation"], "feed_forward_backward, feed_forward_fused in bfloat16, more with --full"),
        (["nowhere"], "model 'nowhere' not found"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(here: Callable[..., None], arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.strip().count("\n") == 0


@pytest.mark.gpu
def test_a_cpu_cannot_be_named() -> None:
    result = run("--device", "cpu")
    assert result.exit_code == 2
    assert "not on 'cpu'" in result.output

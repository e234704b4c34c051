"""Contenders are compared before they are timed, and who cannot take part says why."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import tiny_config

from fastbert.benchmark import contenders, measure
from fastbert.benchmark.measure import Field, Row, random_source
from fastbert.benchmark.workloads import Task, Workload
from fastbert.graphs.inference import Graphed
from fastbert.graphs.training import GraphedStep

Run = Callable[[], torch.Tensor]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = (7, 12, 3)


def replay_with(recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the contender that replays do so on a CPU."""
    monkeypatch.setattr(contenders, "missing", lambda *_, **__: None)
    monkeypatch.setattr(contenders, "graphed", functools.partial(Graphed, recorder=recorder))
    monkeypatch.setattr(measure, "graphed_step", functools.partial(GraphedStep, recorder=recorder))


def rows(
    names: list[str], task: Task = "forward", attentions: bool = False, dtype: torch.dtype = torch.float32, **how: Any
) -> dict[str, Row]:
    # Dropout is on, as in real training, and must not disturb the comparison.
    config = tiny_config(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, initializer_range=0.1)
    field = Field("tiny", random_source(config, task), names, dtype=dtype, device=CPU)
    found = field.measure(Workload("w", LENGTHS, task, attentions), seconds=0, rounds=(2, 2), **how)
    return {row.contender: row for row in found}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attentions", [False, True])
@pytest.mark.parametrize("task", ["forward", "backward", "finetune"])
def test_everyone_is_right_and_timed(task: Task, attentions: bool, dtype: torch.dtype) -> None:
    found = rows(["fastbert", "eager", "sdpa"], task, attentions, dtype)
    assert list(found) == ["fastbert", "eager", "sdpa"]
    for name, row in found.items():
        if attentions and name == "sdpa":
            assert (row.times, row.problem) == (None, "returns no attention maps")
            continue
        assert row.problem is None
        assert row.times is not None
        assert row.times.rounds == 2
        assert row.error is not None
        assert row.bound is not None
        assert row.error <= row.bound
    assert found["eager"].error == 0 if dtype == torch.float32 else found["eager"].error > 0
    assert found["fastbert"].error > 0  # it was compared, not copied


class Rerun:
    """Stands in for CUDA graphs: does again what was recorded."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def record(self, run: Run) -> Run:
        return run

    def follow(self) -> None: ...

    def forget(self) -> None: ...


class Forgetful(Rerun):
    """Does nothing again, and returns what it returned."""

    def record(self, run: Run) -> Run:
        kept = torch.ones(1, sum(LENGTHS) + 1, 1)
        return lambda: kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("task", ["forward", "finetune"])
def test_replays_are_compared_and_timed(task: Task, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    replay_with(Rerun, monkeypatch)
    row = rows(["fastbert-graphed", "eager"], task, dtype=dtype)["fastbert-graphed"]
    assert row.problem is None
    assert row.times is not None
    assert row.peak_bytes is None
    assert row.error is not None
    assert row.error > 0


def test_a_replay_that_does_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    replay_with(Forgetful, monkeypatch)
    row = rows(["fastbert-graphed", "eager"], "finetune")["fastbert-graphed"]
    assert row.times is None
    assert str(row.problem).startswith("wrong: its error")


@pytest.mark.parametrize("task", ["forward", "finetune"])
def test_what_was_not_replayed_is_not_timed_as_a_replay(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    replay_with(Rerun, monkeypatch)
    monkeypatch.setattr(contenders, "BUCKETS", (8,))
    row = rows(["fastbert-graphed", "eager"], task)["fastbert-graphed"]
    assert row.times is None
    assert str(row.problem).startswith("failed: RuntimeError: not replayed: a batch is over the largest bucket")


@pytest.mark.parametrize("task", ["forward", "finetune"])
def test_wrong_results_are_shown_without_a_time(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: Any, packing: bool) -> Any:
        with torch.no_grad():
            module.base_model.encoder.layer[1].output.dense.weight *= 1.1
        return module

    monkeypatch.setattr(contenders, "fuse", wrong)
    found = rows(["fastbert", "eager"], task)
    assert found["fastbert"].times is None
    assert str(found["fastbert"].problem).startswith("wrong: its error")
    assert found["eager"].times is not None


def test_a_contender_that_fails_is_a_row_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: Any, packing: bool) -> Any:
        raise MemoryError("none left")

    monkeypatch.setattr(contenders, "fuse", broken)
    found = rows(["fastbert", "eager"])
    assert found["fastbert"].problem == "failed: MemoryError: none left"
    assert found["eager"].times is not None


def test_after_the_deadline_rows_say_so() -> None:
    found = rows(["fastbert", "eager"], deadline=0.0)
    assert [row.problem for row in found.values()] == ["out of time", "out of time"]


def test_what_is_built_serves_the_next_workload() -> None:
    field = Field("tiny", random_source(tiny_config(), "forward"), ["fastbert"], dtype=torch.float32, device=CPU)
    models = []
    for lengths in (LENGTHS, (5, 5)):
        list(field.measure(Workload("w", lengths, "forward"), seconds=0, rounds=(1, 1)))
        models.append(field._built["fastbert", False, torch.float32])
    assert models[0] is models[1]


def test_training_leaves_the_next_workload_the_same_weights() -> None:
    config = tiny_config(hidden_dropout_prob=0.1, initializer_range=0.1)
    field = Field("tiny", random_source(config, "finetune"), ["fastbert", "eager"], dtype=torch.float32, device=CPU)
    for lengths in (LENGTHS, (5, 5)):
        found = list(field.measure(Workload("w", lengths, "finetune"), seconds=0, rounds=(50, 50)))
        assert [row.problem for row in found] == [None, None]


@pytest.mark.parametrize(
    ("name", "what", "why"),
    [
        ("sdpa", {"attentions": True}, "returns no attention maps"),
        ("flash", {}, "needs a GPU"),
        ("flex", {}, "needs a GPU"),
        ("flex", {"attentions": True, "device": CUDA}, "returns no attention maps"),
        ("flex", {"task": "finetune", "device": CUDA}, "trains without dropout only"),
        ("flex", {"device": CUDA}, None),
        ("compile-graphs", {}, "needs a GPU"),
        ("compile-graphs", {"task": "finetune", "device": CUDA}, None),
        ("fastbert-graphed", {}, "needs a GPU"),
        ("fastbert-graphed", {"task": "backward", "device": CUDA}, "replays whole training steps only"),
        ("fastbert-graphed", {"attentions": True, "device": CUDA}, "replays no attention maps"),
        ("fastbert-graphed", {"task": "finetune", "device": CUDA}, None),
        ("onnxruntime", {"task": "finetune"}, "does not train"),
        ("onnxruntime", {"dtype": torch.bfloat16}, "compared in float32 only"),
        ("openvino", {"task": "backward"}, "does not train"),
        ("compile-freezing", {"task": "finetune"}, "does not train"),
        ("compile-freezing", {"dtype": torch.bfloat16}, None),
        ("eager", {"task": "backward", "attentions": True, "dtype": torch.bfloat16}, None),
    ],
)
def test_who_cannot_take_part(
    name: str, what: dict[str, Any], why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda package: object())
    given = {"task": "forward", "attentions": False, "dtype": torch.float32, "device": CPU} | what
    assert contenders.missing(name, **given) == why


def test_a_peer_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda package: None)
    found = rows(["fastbert", "onnxruntime"])
    absent = "onnxruntime, onnx, onnxscript"
    assert found["onnxruntime"].problem == f"{absent} not installed: pip install {absent.replace(',', '')}"
    assert found["fastbert"].times is not None


def test_unknown_peer_lists_the_known() -> None:
    with pytest.raises(ValueError, match="unknown peer 'tensorrt': choose from fastbert, fastbert-auto, eager, sdpa"):
        contenders.named(["eager", "tensorrt"])


@pytest.mark.slow
@pytest.mark.parametrize("attentions", [False, True])
def test_runtimes_of_graphs_and_torch_compile_are_right(attentions: bool) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino")
    peers = ["fastbert", "compile", "compile-freezing", "onnxruntime", "openvino"]
    for name, row in rows(peers, attentions=attentions).items():
        assert row.problem is None, name
        assert row.times is not None


@pytest.mark.slow
@pytest.mark.parametrize("task", ["backward", "finetune"])
def test_torch_compile_trains_right(task: Task) -> None:
    assert rows(["compile"], task)["compile"].problem is None

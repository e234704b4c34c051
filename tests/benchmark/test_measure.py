"""Contenders are compared before they are timed, and who cannot take part says why."""

from typing import Any

import pytest
import torch
from models import tiny_config

from fastbert.benchmark import contenders
from fastbert.benchmark.measure import Field, Row, random_source
from fastbert.benchmark.workloads import Task, Workload

CPU = torch.device("cpu")
LENGTHS = (7, 12, 3)


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


@pytest.mark.parametrize("task", ["forward", "finetune"])
def test_wrong_results_are_shown_without_a_time(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: Any) -> Any:
        with torch.no_grad():
            module.base_model.encoder.layer[1].output.dense.weight *= 1.1
        return module

    monkeypatch.setattr(contenders, "fuse", wrong)
    found = rows(["fastbert", "eager"], task)
    assert found["fastbert"].times is None
    assert str(found["fastbert"].problem).startswith("wrong: its error")
    assert found["eager"].times is not None


def test_a_contender_that_fails_is_a_row_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: Any) -> Any:
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
        ("fastbert-graphed", {}, "needs a GPU"),
        (
            "fastbert-graphed",
            {"training": True, "device": torch.device("cuda")},
            "replays neither training nor attention maps",
        ),
        ("onnxruntime", {"training": True}, "does not train"),
        ("onnxruntime", {"dtype": torch.bfloat16}, "compared in float32 only"),
        ("eager", {"training": True, "attentions": True, "dtype": torch.bfloat16}, None),
    ],
)
def test_who_cannot_take_part(
    name: str, what: dict[str, Any], why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda package: object())
    given = {"training": False, "attentions": False, "dtype": torch.float32, "device": CPU} | what
    assert contenders.missing(name, **given) == why


def test_a_peer_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda package: None)
    found = rows(["fastbert", "onnxruntime"])
    assert found["onnxruntime"].problem == (
        "onnxruntime, onnx, onnxscript not installed: pip install 'fastbert[bench]'"
    )
    assert found["fastbert"].times is not None


def test_unknown_peer_lists_the_known() -> None:
    with pytest.raises(ValueError, match="unknown peer 'tensorrt': choose from fastbert, eager, sdpa"):
        contenders.named(["eager", "tensorrt"])


@pytest.mark.slow
@pytest.mark.parametrize("attentions", [False, True])
def test_onnx_runtime_and_torch_compile_are_right(attentions: bool) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    for name, row in rows(["fastbert", "compile", "onnxruntime"], attentions=attentions).items():
        assert row.problem is None, name
        assert row.times is not None


@pytest.mark.slow
@pytest.mark.parametrize("task", ["backward", "finetune"])
def test_torch_compile_trains_right(task: Task) -> None:
    assert rows(["compile"], task)["compile"].problem is None

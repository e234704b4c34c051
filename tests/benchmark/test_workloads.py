"""Batches of the shape that their names promise."""

import pytest
import torch

from fastbert.benchmark.workloads import CPU_WORKLOADS, GPU_WORKLOADS, Workload, full, named, ragged

CPU = torch.device("cpu")


@pytest.mark.parametrize(("batch", "seq", "fill"), [(16, 128, 0.46), (64, 384, 0.46), (32, 512, 0.2), (8, 40, 0.9)])
def test_ragged_batches_are_filled_as_asked(batch: int, seq: int, fill: float) -> None:
    lengths = ragged(batch, seq, fill)
    assert len(lengths) == batch
    assert max(lengths) == seq
    assert min(lengths) >= 2
    assert sum(lengths) / (batch * seq) == pytest.approx(fill, abs=0.02)
    assert list(lengths) != sorted(lengths)
    assert lengths == ragged(batch, seq, fill)


def test_a_fill_that_one_long_row_already_exceeds_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"2 rows, one of them 100 long, cannot have a fill of 0\.2, only 0\.51"):
        ragged(2, 100, 0.2)


def test_batch_is_padded_on_the_right_and_always_the_same() -> None:
    workload = Workload("w", (3, 5, 2), "forward")
    batch = workload.batch(50, CPU)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5, [1, 1, 0, 0, 0]]
    assert bool((batch["input_ids"].bool() == batch["attention_mask"].bool()).all())
    assert int(batch["input_ids"].max()) < 50
    assert torch.equal(batch["input_ids"], workload.batch(50, CPU)["input_ids"])
    assert (workload.seq, workload.tokens, workload.fill) == (5, 10, pytest.approx(10 / 15))


def test_known_workloads_bear_their_own_names() -> None:
    for workloads in (CPU_WORKLOADS, GPU_WORKLOADS):
        assert all(name == workload.name for name, workload in workloads.items())
        assert {workload.task for workload in workloads.values()} == {"forward", "backward", "finetune"}
        assert any(workload.fill < 0.5 for workload in workloads.values())


def test_no_names_are_all_and_an_unknown_one_lists_the_known() -> None:
    assert named((), CPU_WORKLOADS) == list(CPU_WORKLOADS.values())
    assert [w.name for w in named(("ragged", "one"), CPU_WORKLOADS)] == ["ragged", "one"]
    with pytest.raises(ValueError, match=r"unknown workload 'rugged': choose from full, ragged, one"):
        named(("rugged",), CPU_WORKLOADS)


def test_full_batches_have_no_padding() -> None:
    assert Workload("w", full(4, 9), "forward").fill == 1

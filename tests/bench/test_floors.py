"""The floor of a model's run is the sum of what nobody can leave out."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from bench import floors
from bench.floors import ADAMW_BYTES, Machine, floor
from bench.static.limits import Cost
from fastbert.benchmark.workloads import Workload

HIDDEN, WIDE, HEADS, LAYERS = 64, 96, 4, 3
CONFIG = transformers.BertConfig(
    hidden_size=HIDDEN, intermediate_size=WIDE, num_attention_heads=HEADS, num_hidden_layers=LAYERS, vocab_size=100
)


class Made(Machine):
    """A machine of known limits: a FLOP a second, and a hundred bytes."""

    copy = 100.0

    def product(self, m: int, n: int, k: int, dtype: torch.dtype) -> float:
        return 2.0 * m * n * k

    def rate(self, dtype: torch.dtype) -> float:
        return 1.0


MACHINE = Made(torch.device("cpu"))


@pytest.mark.parametrize(("used", "seconds"), [("oneDNN", 0.5), ("F.linear: oneDNN is switched off", 2.0)])
def test_a_product_takes_the_fastest_library(monkeypatch: pytest.MonkeyPatch, used: str, seconds: float) -> None:
    def timed(runs: dict[str, Any], *arguments: Any, **keywords: Any) -> dict[str, Any]:
        for run in runs.values():
            run()
        return {name: SimpleNamespace(median={"torch.mm": 2.0, "oneDNN": 0.5}[name]) for name in runs}

    monkeypatch.setattr(floors, "interleaved", timed)
    monkeypatch.setattr(floors, "describe_products", lambda dtype: used)
    assert Machine(torch.device("cpu")).product(4, 6, 8, torch.float32) == seconds


def test_a_call_takes_the_slower_of_its_products_and_its_bytes() -> None:
    assert MACHINE.seconds(Cost(flops=7, bytes=300, exps=0), torch.float32) == 7
    assert MACHINE.seconds(Cost(flops=2, bytes=300, exps=0), torch.float32) == 3


def test_forward_is_products_and_attention_and_the_bytes_of_norms() -> None:
    lengths = (5, 3)
    tokens = sum(lengths)
    products = 2 * tokens * (3 * HIDDEN * HIDDEN + HIDDEN * HIDDEN + 2 * HIDDEN * WIDE)
    attention = 4 * HIDDEN * sum(n * n for n in lengths)  # over its bytes on this machine
    least = floor(Workload("w", lengths, "forward"), CONFIG, torch.float32, MACHINE)
    matrices = 3 * tokens * HIDDEN * 4  # x and residual in, y out
    assert least > LAYERS * (products + attention + 2 * matrices / 100)
    assert least == pytest.approx(LAYERS * (products + attention + 2 * matrices / 100), rel=0.1)


def test_training_triples_the_products_and_a_step_adds_the_optimizer() -> None:
    forward, backward, step = (
        floor(Workload("w", (8, 8), task), CONFIG, torch.float32, MACHINE)
        for task in ("forward", "backward", "finetune")
    )
    assert 2.7 * forward < backward < 3.6 * forward
    parameters = sum(p.numel() for p in transformers.BertForSequenceClassification(CONFIG).parameters())
    assert step - backward == pytest.approx(parameters * ADAMW_BYTES / 100)


def test_padding_is_not_work_but_maps_are() -> None:
    def least(lengths: tuple[int, ...], attentions: bool = False) -> float:
        return floor(Workload("w", lengths, "forward", attentions), CONFIG, torch.float32, MACHINE)

    assert least((16, 2)) < least((16, 16))
    machine = Made(torch.device("cpu"))
    machine.copy = 1e-3  # so slow that attention is its bytes
    few, many = (floor(Workload("w", (16, 2), "forward", a), CONFIG, torch.float32, machine) for a in (False, True))
    assert many - few == pytest.approx(LAYERS * 2 * HEADS * 16 * 16 * 4 / 1e-3)


def test_a_real_machine_has_limits() -> None:
    machine = Machine(torch.device("cpu"))
    first = machine.product(64, 32, 16, torch.float32)
    assert first > 0
    assert machine.product(64, 32, 16, torch.float32) == first  # measured once

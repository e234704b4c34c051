"""No result depends on the order in which a launch's programs run: a GPU runs them in any."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

from fastbert.tuning.problems import Sizes
from fastbert_kernels.backend import INTERPRETED
from tests.executor.calls import Call, model_step, op_calls, problem, results, same_bits

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the interpreter's programs are put in order")

#: The order of `count` programs.
Order = Callable[[int], list[int]]
ORDERS: dict[str, Order] = {
    "reversed": lambda count: list(reversed(range(count))),
    "random": lambda count: torch.randperm(count, generator=torch.Generator().manual_seed(count)).tolist(),
}

SIZES = Sizes(ragged=(66, 1), even=(9, 9), rows=70, vocabulary=97)
CALLS = op_calls(torch.float32, head_dim=16, features=48)


def in_order(order: Order, run: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    """What `run` gives where the interpreter runs the programs of every launch in this order."""
    set_grid_idx = InterpreterBuilder.set_grid_idx
    orders: dict[int, list[int]] = {}

    def in_turn(self: Any, x: int, y: int, z: int) -> None:
        nx, ny, nz = self.grid_dim
        chosen = orders.setdefault(nx * ny * nz, order(nx * ny * nz))[(x * ny + y) * nz + z]
        set_grid_idx(self, chosen // nz // ny, chosen // nz % ny, chosen % nz)

    with mock.patch.object(InterpreterBuilder, "set_grid_idx", in_turn):
        return run()


def assert_any_order(run: Callable[[], list[torch.Tensor]]) -> None:
    first = run()
    for name, order in ORDERS.items():
        for mine, other in zip(first, in_order(order, run), strict=True):
            assert same_bits(mine, other), f"another result with programs {name}"


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_an_op_is_the_same_in_any_order(call: Call) -> None:
    assert_any_order(lambda: results(problem(call, SIZES)))


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_of_training_is_the_same_in_any_order(fused: bool) -> None:
    with mock.patch("fastbert.modules.layer.feed_forward_is_fused", return_value=fused):
        assert_any_order(lambda: model_step("triton", torch.float32, [17, 3], 0.1))


@triton.jit
def _last_program_wins(out_ptr):
    tl.store(out_ptr, tl.program_id(0))


@triton.jit
def _sum_in_turn(out_ptr):
    """Every program adds to one number, which is rounded each time."""
    tl.store(out_ptr, tl.load(out_ptr) * 0.7 + tl.program_id(0))


@pytest.mark.parametrize("kernel", [_last_program_wins, _sum_in_turn])
def test_a_race_is_seen(kernel: Any) -> None:
    def run() -> list[torch.Tensor]:
        out = torch.zeros(1)
        kernel[(7,)](out)
        return [out]

    with pytest.raises(AssertionError, match="another result with programs reversed"):
        assert_any_order(run)
    with (
        mock.patch.dict(ORDERS, reversed=lambda count: list(range(count))),
        pytest.raises(AssertionError, match="with programs random"),
    ):
        assert_any_order(run)


def test_every_program_runs_once() -> None:
    for order in ORDERS.values():
        assert sorted(order(30)) == list(range(30))
        assert order(30) != list(range(30))

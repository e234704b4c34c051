"""The GPU run's small calls of every op: what is wrong, and what differs from run to run, is told."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bench.gpu import calls
from fastbert.tuning.problems import Problem, Sizes
from fastbert_kernels.catalogue import Launch

TINY = Sizes(lengths=(8,), tokens=16, heads=1, ragged=(1, 5), even=(4, 4), rows=9, vocabulary=10)
LAUNCH = Launch("bias_activation_forward", torch.float32, 8)


def problem(op: Any) -> Problem:
    """A call whose definition is twice its input."""
    return Problem(op, lambda x: (2 * x,), (torch.linspace(-1, 1, 12).view(3, 4),))


def row(op: Any, runs: int = 2) -> calls.CallRow:
    return calls._row("some float32", LAUNCH, (), problem(op), runs, definition=True)


def test_a_call_that_is_right_has_an_error_and_its_bound() -> None:
    found = row(lambda x: (x + x,))
    assert found.problem is None
    assert found.same
    assert found.error == 0.0
    assert found.bound == pytest.approx(1e-4)  # of a gradient


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        return 2.01 * dy


def test_what_is_wrong_is_told() -> None:
    assert row(lambda x: (x * 2.01,)).problem == "output 0 is wrong"
    assert row(lambda x: (WrongGradient.apply(x),)).problem == "gradient 0 is wrong"
    assert row(lambda x: (x / 0,)).problem == "not finite"
    assert str(row(lambda x: (x.view(7),)).problem).startswith("RuntimeError: shape '[7]' is invalid")


def test_runs_that_differ_are_a_race() -> None:
    times = iter([1, 1, 1 + 1e-6])
    found = row(lambda x: (x * 2 * next(times),), runs=3)
    assert found.same is False
    assert found.problem == "two runs differ: a race"


def test_calls_of_the_kernels_are_right(device: torch.device) -> None:
    found = calls.check("relation float16", device, TINY, TINY, definition=True)
    assert [row.problem for row in found] == [None] * len(found)
    assert all(row.error is not None for row in found[:-1])
    assert found[-1].call.endswith(", many programs")
    assert all(row.same for row in found)


@pytest.mark.slow
@pytest.mark.parametrize("group", calls.GROUPS)
def test_calls_of_every_group_are_right(group: str, device: torch.device) -> None:
    for row in calls.check(group, device, dataclasses.replace(TINY, rows=20), TINY, definition=True):
        assert row.problem is None, row


def test_the_command_prints_a_line_of_json_for_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    app = typer.Typer()
    app.command()(calls.main)
    monkeypatch.setattr(calls, "check", lambda group, *given: [calls.CallRow(group, "x", problem="wrong")])
    result = CliRunner().invoke(app, ["relation float32", "--device", "cpu", "--small"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["problem"] == "wrong"
    result = CliRunner().invoke(app, ["relation int8"])
    assert result.exit_code == 2
    assert "unknown group 'relation int8': choose from attention bfloat16" in result.output

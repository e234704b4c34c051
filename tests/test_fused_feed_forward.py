"""A layer whose feed-forward block is one op, against Hugging Face's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import assert_close, ids, mask_of, pair
from torch import nn

import fastbert
from fastbert import modules
from fastbert_kernels import backend, feed_forward

#: Calls of the op, counted.
Calls = list[tuple[int, ...]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Have every layer use the op that can, whatever the tables say, and count its calls."""
    seen: Calls = []

    def counted(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return feed_forward(x, *args, **kwargs)

    monkeypatch.setattr(modules, "feed_forward", counted)
    monkeypatch.setattr(modules, "feed_forward_is_fused", lambda x, weight, activation: True)
    return seen


def run(
    model: Any, device: torch.device, name: str, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The last hidden state of a ragged batch, and the gradients of a fixed projection of it."""
    torch.manual_seed(3)
    inputs, mask = ids(3, 11, device), mask_of([11, 4, 7], 11, device)
    with backend(name):
        last = model(inputs, mask).last_hidden_state[mask.bool()]
    cotangent = torch.randn(last.shape, dtype=torch.float64).to(last)
    parameters = dict(model.encoder.named_parameters())
    grads = torch.autograd.grad(last, list(parameters.values()), cotangent)
    return last.detach(), dict(zip(parameters, grads, strict=True))


def test_equals_hugging_face(device: torch.device, calls: Calls) -> None:
    plain, fused = pair(device)
    (theirs, their_grads), (ours, our_grads) = run(plain, device, "torch"), run(fused, device, "triton")
    assert calls == [(1, 22, 32)] * 2
    assert_close(ours, theirs)
    assert their_grads.keys() == our_grads.keys()
    for name, gradient in our_grads.items():
        assert_close(gradient, their_grads[name], atol=2e-5 * max(1.0, their_grads[name].abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_errs_no_more_than_hugging_face_in_half_precision(
    device: torch.device, dtype: torch.dtype, calls: Calls
) -> None:
    plain, fused = pair(device)
    exact, exact_grads = run(plain.double(), device, "torch")
    theirs, their_grads = run(plain.to(dtype), device, "torch")
    ours, our_grads = run(fused.to(dtype), device, "triton")
    assert calls
    assert (ours - exact).abs().max() < 2 * (theirs - exact).abs().max() + 1e-5
    for name, gradient in our_grads.items():
        error, bound = ((g.double() - exact_grads[name]).norm() for g in (gradient, their_grads[name]))
        assert error < 2 * bound + 1e-5, name


def test_dropout_is_the_same_as_of_two_ops(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused = pair(device, hidden_dropout_prob=0.2)
    fused.train()
    one_op = []
    for choice in (False, True):
        monkeypatch.setattr(modules, "feed_forward_is_fused", lambda x, weight, activation, choice=choice: choice)
        one_op.append(run(fused, device, "triton"))
    (before, before_grads), (after, after_grads) = one_op
    assert_close(after, before)
    for name, gradient in after_grads.items():
        assert_close(gradient, before_grads[name], atol=2e-5 * max(1.0, before_grads[name].abs().max().item()))


def test_plain_pytorch_keeps_its_path(calls: Calls) -> None:
    run(pair()[1], torch.device("cpu"), "torch")
    assert calls == []


class Linear(nn.Linear):
    """Somebody's own."""


def _own_linear(layer: Any) -> None:
    layer.output.dense.__class__ = Linear


def _own_intermediate(layer: Any) -> None:
    class Intermediate(type(layer.intermediate)):  # type: ignore[misc]
        pass

    layer.intermediate.__class__ = Intermediate


def _no_bias(layer: Any) -> None:
    layer.intermediate.dense.bias = None


def _unknown_activation(layer: Any) -> None:
    layer.intermediate.intermediate_act_fn = nn.Tanh()


@pytest.mark.filterwarnings("ignore:fastbert")
@pytest.mark.parametrize("change", [_own_linear, _own_intermediate, _no_bias, _unknown_activation])
def test_parts_that_are_not_plain_are_called(device: torch.device, calls: Calls, change: Callable[[Any], None]) -> None:
    plain, fused = pair(device)
    change(fused.encoder.layer[0])
    if change in (_no_bias, _unknown_activation):
        change(plain.encoder.layer[0])
    ours, theirs = run(fused, device, "triton")[0], run(plain, device, "torch")[0]
    assert len(calls) == 1
    assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["intermediate", "intermediate.dense", "intermediate.intermediate_act_fn", "output"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_fire(device: torch.device, calls: Calls, name: str, register: str) -> None:
    _, fused = pair(device)
    want, _ = run(fused, device, "triton")
    calls.clear()
    fired = []
    module = fused.encoder.layer[0].get_submodule(name)
    getattr(module, register)(lambda module, *_: fired.append(module))
    got, _ = run(fused, device, "triton")
    assert fired == [module]
    assert len(calls) == 1
    assert_close(got, want)


def test_chunks_are_called(device: torch.device, calls: Calls) -> None:
    _, fused = pair(device, chunk_size_feed_forward=11)
    with backend("triton"), torch.no_grad():
        fused(ids(device=device))
    assert calls == []


def test_explain_counts_the_parts_as_fused(device: torch.device) -> None:
    assert fastbert.explain(pair(device)[1]).fused

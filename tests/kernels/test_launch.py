"""Ops as torch sees them: past the dispatcher, through it, and by name in the graph of autograd."""

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert_kernels import (
    add_layer_norm,
    attention,
    backend,
    bias_activation,
    embed,
    feed_forward,
    relation_loss,
)
from fastbert_kernels.bias_activation import _backward, _forward


class Dispatched(TorchDispatchMode):
    """The names of the ops that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def gelu_and_gradient(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = bias_activation(x, None)
    return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]


def test_an_op_is_called_past_the_dispatcher_where_nobody_watches(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, 8, device=device)
    with backend("triton"):
        with Dispatched() as watcher:
            watched = gelu_and_gradient(x)
        assert {"fastbert::bias_activation", "fastbert::bias_activation_backward"} <= watcher.names
        for op in (_forward, _backward):
            monkeypatch.setattr(op, "registered", None)
        alone = gelu_and_gradient(x)
        with torch.inference_mode():
            assert torch.equal(bias_activation(x, None), alone[0])
    assert all(torch.equal(a, b) for a, b in zip(watched, alone, strict=True))


def test_tracers_see_the_op(device: torch.device) -> None:
    x = torch.randn(3, 8, device=device)
    with backend("triton"):
        scripted = torch.jit.trace(lambda x: bias_activation(x, None), x, check_trace=False)
        wanted = bias_activation(x + 1, None)
    assert "fastbert::bias_activation" in str(scripted.graph)
    assert torch.equal(scripted(x + 1), wanted)


def test_fake_tensors_take_the_fake_op(device: torch.device) -> None:
    with FakeTensorMode() as mode, backend("triton"):
        fake = mode.from_tensor(torch.empty(3, 8, device=device))
    with backend("triton"):
        assert bias_activation(fake, None).shape == (3, 8)


def steps_of(y: torch.Tensor) -> set[str]:
    """The names of the steps of autograd that made y."""
    names, to_visit = set(), [y.grad_fn]
    while to_visit:
        if (step := to_visit.pop()) is not None:
            names.add(step.name())
            to_visit += [before for before, _ in step.next_functions]
    return names


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_autograd_calls_the_relation_loss_by_its_name(device: torch.device, name: str) -> None:
    a, b = (torch.randn(6, 2, 8, device=device, requires_grad=True) for _ in range(2))
    with backend(name):
        assert "RelationLossBackward" in steps_of(relation_loss(a, b, a, b, None, 3))


def test_autograd_calls_a_step_by_its_op(device: torch.device) -> None:
    x, weight = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((6, 8), (8, 8)))
    vector, ids = weight[0], torch.zeros(6, dtype=torch.long, device=device)
    with backend("triton"):
        steps = {
            "AttentionBackward": attention(x.view(6, 1, 1, 8).expand(-1, 3, -1, -1), None, 3)[0],
            "AddLayerNormBackward": add_layer_norm(x, None, None, vector, vector, 1e-12),
            "BiasActivationBackward": bias_activation(x, vector),
            "EmbedBackward": embed(ids, ids, ids, weight, weight, weight, vector, vector, 1e-12),
            "FeedForwardBackward": feed_forward(x, weight, vector, weight),
        }
    for name, y in steps.items():
        found = steps_of(y)
        assert name in found
        assert not [step for step in found if step.startswith("_")]

"""In plain PyTorch, torch.func, forward-mode derivatives and second derivatives are eager's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import ids, pair
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

SHAPES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}


def _parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _pooled(model: nn.Module, parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return functional_call(model, parameters, (), {"input_ids": x}).pooler_output


def _of_inputs(model: Any, x: torch.Tensor, e: torch.Tensor) -> Any:
    return grad(lambda e: model(inputs_embeds=e).pooler_output.square().sum())(e)


def _jacobian(model: Any, x: torch.Tensor, e: torch.Tensor) -> Any:
    return jacrev(lambda e: model(inputs_embeds=e).pooler_output)(e)


def _of_parameters(model: Any, x: torch.Tensor, e: torch.Tensor) -> Any:
    return grad(lambda p: _pooled(model, p, x).square().sum())(_parameters(model))


def _per_sample(model: Any, x: torch.Tensor, e: torch.Tensor) -> Any:
    one = grad(lambda p, row: _pooled(model, p, row[None]).square().sum())
    return vmap(one, in_dims=(None, 0))(_parameters(model), x)


def _ensemble(model: Any, x: torch.Tensor, e: torch.Tensor) -> Any:
    stacked = {name: torch.stack([value, value * 1.1]) for name, value in _parameters(model).items()}
    return vmap(lambda p: _pooled(model, p, x))(stacked)


def _tangent(model: Any, x: torch.Tensor, e: torch.Tensor) -> Any:
    parameters = _parameters(model)
    ones = {name: torch.ones_like(value) for name, value in parameters.items()}
    return jvp(lambda p: _pooled(model, p, x), (parameters,), (ones,))


def _penalty(model: Any, x: torch.Tensor, e: torch.Tensor) -> Any:
    e = e.clone().requires_grad_()
    (found,) = torch.autograd.grad(model(inputs_embeds=e).pooler_output.sum(), e, create_graph=True)
    found.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _tensors(found: Any) -> list[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        return [found]
    return [each for value in (found.values() if isinstance(found, dict) else found) for each in _tensors(value)]


TRANSFORMS = [_of_inputs, _jacobian, _of_parameters, _per_sample, _ensemble, _tangent, _penalty]


@pytest.mark.parametrize("of", TRANSFORMS, ids=lambda of: of.__name__)
def test_transforms_are_eagers(of: Callable[..., Any]) -> None:
    plain, fused = pair(packing="auto", **SHAPES)
    x, e = ids(2, 3), torch.randn(2, 3, 16)
    ours, theirs = _tensors(of(fused, x, e)), _tensors(of(plain, x, e))
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-5

"""Outputs and gradients of a fused model beside eager's and beside those in float64."""

from typing import Any

import torch
from torch import nn

Tensors = dict[str, torch.Tensor]


def named_tensors(output: Any) -> Tensors:
    """Every tensor of an output by its name, those in tuples with their number."""
    named: Tensors = {}
    for name, value in output.items():
        if isinstance(value, torch.Tensor):
            named[name] = value
        else:
            named |= {f"{name}.{i}": each for i, each in enumerate(value) if each is not None}
    return named


def zeroed(plain: nn.Module, tensors: Tensors, mask: torch.Tensor) -> Tensors:
    """What an encoder model's outputs are where padding is dropped: zero there, and the pooler reads these zeros."""
    shapes = {3: (*mask.shape, 1), 4: (mask.shape[0], 1, mask.shape[1], 1)}
    made = {name: x * mask.view(shapes[x.dim()]) for name, x in tensors.items() if name != "pooler_output"}
    if "pooler_output" in tensors:
        made["pooler_output"] = plain.pooler(made["last_hidden_state"])  # type: ignore[operator]
    return made


def gradients(model: nn.Module, tensors: Tensors) -> Tensors:
    """The gradient of each parameter, by name, under a loss that weighs each element by a random number of its own."""
    generator = torch.Generator().manual_seed(7)
    model.zero_grad()
    loss: Any = 0.0
    for name in sorted(tensors):
        weights = torch.randn(tensors[name].shape, generator=generator, dtype=torch.float64)
        loss = loss + (tensors[name] * weights.to(tensors[name])).sum()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def worst(ours: Tensors, truth: Tensors) -> dict[str, float]:
    """Of each tensor, the largest difference."""
    assert ours.keys() == truth.keys()
    return {name: (x.double() - truth[name].double()).abs().max().item() for name, x in ours.items()}


def apart(ours: Tensors, truth: Tensors) -> dict[str, float]:
    """Of each gradient, the norm of the difference beside its own norm.

    A bias that moves all scores of a softmax by one number has a gradient of rounding alone, and is held against its
    weight's: a key's, and those of heads whose softmax runs over positions or choices.
    """
    assert ours.keys() == truth.keys()
    found = {}
    for name, x in ours.items():
        own, weights = (truth[each].double().norm().item() for each in (name, _weight_of(name, truth)))
        found[name] = (x.double() - truth[name].double()).norm().item() / (own if own > 1e-5 * weights else weights)
    return found


def _weight_of(name: str, tensors: Tensors) -> str:
    weight = name.removesuffix("bias") + "weight"
    return weight if name.endswith("bias") and weight in tensors else name


def assert_equals(ours: Tensors, theirs: Tensors, bound: float = 2e-5) -> None:
    """In float32, outputs of two models."""
    for name, x in ours.items():
        assert x.shape == theirs[name].shape, name
    off = {name: error for name, error in worst(ours, theirs).items() if not error <= bound}
    assert not off, off


def assert_equal_gradients(ours: Tensors, theirs: Tensors, bound: float = 1e-4) -> None:
    """In float32, gradients of two models."""
    off = {name: error for name, error in apart(ours, theirs).items() if not error <= bound}
    assert not off, off


def assert_as_good(ours: Tensors, theirs: Tensors, truth: Tensors, measure: Any) -> None:
    """In half precision: at most twice eager's error."""
    mine, eagers = measure(ours, truth), measure(theirs, truth)
    off = {name: (error, eagers[name]) for name, error in mine.items() if not error <= 2 * eagers[name]}
    assert not off, off

"""What a loss does not reach has no gradient, as in eager attention: an optimizer moves what has one of zeros."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from models import ids, mask_of, pair, randomize, tiny_config
from torch import nn

import fastbert
from fastbert_kernels import backend

STATES, MAPS = {"output_hidden_states": True}, {"output_attentions": True}

#: What is asked for, the loss of the output, and parts of parameters' names that are frozen.
LOSSES: dict[str, tuple[dict[str, Any], Callable[[Any], torch.Tensor], tuple[str, ...]]] = {
    "last state": ({}, lambda o: o.last_hidden_state.square().sum(), ()),
    "pooled": ({}, lambda o: o.pooler_output.square().sum(), ()),
    "embeddings": (STATES, lambda o: o.hidden_states[0].square().sum(), ()),
    "inner state": (STATES, lambda o: o.hidden_states[1].square().sum(), ()),
    "inner map": (MAPS, lambda o: o.attentions[0].square().sum(), ()),
    "last map": (MAPS, lambda o: o.attentions[1].square().sum(), ()),
    "map and state": (STATES | MAPS, lambda o: o.attentions[0].square().sum() + o.hidden_states[1].square().sum(), ()),
    "frozen values": (MAPS, lambda o: o.attentions[1].square().sum(), ("value", "query")),
    "frozen biases": ({}, lambda o: o.last_hidden_state.square().sum(), ("bias",)),
    "frozen weights": ({}, lambda o: o.last_hidden_state.square().sum(), ("weight",)),
    "frozen first layers": ({}, lambda o: o.last_hidden_state.square().sum(), ("embeddings", "layer.0")),
}


def reached(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.grad is not None}


#: Those that the kernels have steps of autograd of their own for.
KERNELS = ("inner state", "inner map", "map and state", "frozen biases")


@pytest.mark.parametrize(
    ("loss", "backend_name"),
    [*itertools.product(LOSSES, ["torch", "auto"]), *itertools.product(KERNELS, ["triton"])],
)
def test_parameters_that_a_loss_does_not_reach_have_no_gradient(
    device: torch.device, loss: str, backend_name: str
) -> None:
    asked, of, frozen = LOSSES[loss]
    models = pair(device, packing="auto")
    for model in models:
        for name, p in model.named_parameters():
            p.requires_grad_(not any(part in name for part in frozen))
        with backend(backend_name):
            of(model(ids(2, 5, device), mask_of([5, 3], 5, device), **asked)).backward()
    plain, fused = models
    assert reached(fused) == reached(plain) != set()


@pytest.mark.parametrize("backend_name", ["torch", "triton"])
def test_values_called_as_modules_have_no_gradient_of_maps_alone(device: torch.device, backend_name: str) -> None:
    found = []
    for model in pair(device):
        for layer in model.encoder.layer:
            layer.attention.self.value = nn.Sequential(layer.attention.self.value)
        with backend(backend_name):
            output = model(ids(2, 5, device), **MAPS)
            output.attentions[1].square().sum().backward(retain_graph=True)
            of_map = reached(model)
            output.last_hidden_state.square().sum().backward()  # which reaches them
        found.append((of_map, reached(model)))
    assert found[0] == found[1]
    assert found[0][0] < found[0][1]


@pytest.mark.parametrize(
    "head",
    [
        transformers.BertForMaskedLM, transformers.BertForSequenceClassification,
        transformers.BertForTokenClassification, transformers.BertForQuestionAnswering,
    ],
)  # fmt: skip
def test_heads_reach_what_eagers_reach(device: torch.device, head: type[Any]) -> None:
    names = []
    for fuse in (False, True):
        torch.manual_seed(0)
        model = head(tiny_config(num_hidden_layers=1))
        randomize(model)
        model = (fastbert.fuse(model) if fuse else model).to(device)
        output = model(ids(2, 5, device), mask_of([5, 3], 5, device))
        output[0].square().sum().backward()
        names.append(reached(model))
    assert names[0] == names[1] != set()


def products(compute: Callable[[], Any]) -> int:
    """How many products of matrices are computed."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        compute()
    kinds = ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise")
    return sum(event.count for event in profile.key_averages() if event.key in kinds)


@pytest.mark.parametrize("asked", [{}, MAPS], ids=["states", "maps"])
@pytest.mark.parametrize("backend_name", ["torch", "auto", "triton"])
def test_a_gradient_of_the_input_alone_costs_no_product_of_weights(
    device: torch.device, backend_name: str, asked: dict[str, bool]
) -> None:
    """What libraries of attribution ask for: `torch.autograd.grad` of the embeddings, the parameters as they are."""
    plain, fused = pair(device, packing="auto")
    x = torch.randn(2, 5, 32, device=device, requires_grad=True)

    def gradient(model: nn.Module, wanted: list[torch.Tensor]) -> tuple[int, torch.Tensor]:
        output = model(inputs_embeds=x, **asked)
        loss = output.last_hidden_state.square().sum() + sum(p.square().sum() for p in output.attentions or ())
        found: list[torch.Tensor] = []
        count = products(lambda: found.extend(torch.autograd.grad(loss, wanted)))
        return count, found[0]

    with backend(backend_name):
        count, found = gradient(fused, [x])
        with_weights, same = gradient(fused, [x, *fused.encoder.parameters()])
        fused.requires_grad_(False)
        frozen, _ = gradient(fused, [x])
    assert count == frozen < with_weights
    expected = gradient(plain, [x])[1]
    torch.testing.assert_close(found, same)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

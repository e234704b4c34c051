"""Returned attentions and hidden states are nodes of the graph: whoever asks for their gradients, keeps or changes them
finds what eager attention gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import ids, mask_of, pair
from transformers import DynamicCache

import fastbert
from fastbert.modules import layer
from fastbert_kernels import backend

#: Lengths of the sequences, and what becomes of padding.
BATCHES = [
    pytest.param([7, 7], "auto", id="full"),
    pytest.param([7, 3], "auto", id="ragged"),
    pytest.param([7, 3], True, id="packed"),
]
Tensors = list[torch.Tensor]


@pytest.fixture(
    params=[
        "torch", "triton", "triton, one by one", pytest.param("triton, attention block", marks=pytest.mark.slow),
    ]
)  # fmt: skip
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend, and of kernels, the steps that a layer is made of."""
    found, _, how = request.param.partition(", ")
    if how == "attention block":
        monkeypatch.setattr(
            layer.FusedLayer, "_feed_forward", lambda self, x, seed, readable: self.feed_forward_chunk(x)
        )
        monkeypatch.setattr(layer, "look_at", lambda module: None)
    if how == "one by one":
        monkeypatch.setattr(layer, "runs_as_block", lambda x: False)
    return found


def call(model: Any, lengths: list[int], device: torch.device, **inputs: Any) -> Any:
    torch.manual_seed(1)
    x, mask = ids(len(lengths), max(lengths), device), mask_of(lengths, max(lengths), device)
    return model(x, mask, output_attentions=True, output_hidden_states=True, **inputs)


def real_rows(lengths: list[int], parts: Tensors) -> Tensors:
    """The rows of tokens, of maps and states; a map's columns of padding are zeros."""
    real = mask_of(lengths, max(lengths), parts[0].device).bool()
    parts = [x.transpose(1, 2) * real[:, None, None] if x.dim() == 4 else x for x in parts]
    return [x[real] for x in parts]


def loss_of(output: Any, lengths: list[int]) -> torch.Tensor:
    """Of rows of tokens, and besides of a map and a state by themselves."""
    torch.manual_seed(2)
    read = [output.last_hidden_state, output.attentions[1], output.hidden_states[1]]
    parts = real_rows(lengths, read)
    loss = sum((part * torch.randn(part.shape).to(part)).sum() for part in parts)
    return loss + output.pooler_output.square().sum()


def assert_same(ours: Tensors, theirs: Tensors) -> None:
    """Equal to 1e-4 of the largest."""
    assert len(ours) == len(theirs) > 0
    for got, want in zip(ours, theirs, strict=True):
        assert got.shape == want.shape
        assert want.abs().max() > 0
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def compare(
    find: Callable[[Any], Tensors], name: str, device: torch.device, packing: bool | str = "auto", **changes: Any
) -> None:
    """Compare what is found with our model and with Hugging Face's."""
    plain, fused = pair(device, packing, **changes)
    with backend(name):
        ours = find(fused)
    assert_same(ours, find(plain))


def nodes(output: Any) -> Tensors:
    return [*output.attentions, *output.hidden_states]


@pytest.mark.parametrize(("lengths", "packing"), BATCHES)
def test_gradients_with_respect_to_outputs(
    device: torch.device, name: str, lengths: list[int], packing: bool | str
) -> None:
    def gradients(model: Any) -> Tensors:
        output = call(model, lengths, device)
        found = torch.autograd.grad(loss_of(output, lengths), nodes(output))
        return real_rows(lengths, list(found)) if packing is True else list(found)

    compare(gradients, name, device, packing)


@pytest.mark.parametrize(("lengths", "packing"), BATCHES)
def test_gradients_that_are_kept(device: torch.device, name: str, lengths: list[int], packing: bool | str) -> None:
    def gradients(model: Any) -> Tensors:
        output = call(model, lengths, device)
        for x in nodes(output):
            x.retain_grad()
        loss_of(output, lengths).backward()
        found = [x.grad for x in nodes(output)]
        found = real_rows(lengths, found) if packing is True else found
        return found + [p.grad for k, p in model.encoder.named_parameters() if "key.bias" not in k]

    compare(gradients, name, device, packing)


@pytest.mark.parametrize(("lengths", "packing"), BATCHES)
@pytest.mark.parametrize("of", ["attentions", "hidden_states"])
def test_hooks_change_gradients(
    device: torch.device, name: str, lengths: list[int], packing: bool | str, of: str
) -> None:
    def gradients(model: Any) -> Tensors:
        output = call(model, lengths, device)
        getattr(output, of)[0].register_hook(lambda grad: -3.0 * grad)
        getattr(output, of)[1].register_hook(torch.zeros_like)
        loss_of(output, lengths).backward()
        below = f"encoder.layer.{0 if of == 'hidden_states' else 1}.attention.self.query"  # what is zero then
        below = below if of == "attentions" else "encoder.layer.0"
        assert all(not p.grad.any() for k, p in model.named_parameters() if k.startswith(below))
        return [p.grad for k, p in model.named_parameters() if p.grad.any() and "key.bias" not in k]

    compare(gradients, name, device, packing)


def test_maps_of_masks_of_four_dimensions(device: torch.device, name: str) -> None:
    def gradients(model: Any) -> Tensors:
        torch.manual_seed(1)
        mask = torch.full((2, 1, 5, 5), torch.finfo(torch.float32).min, device=device).triu(1)
        output = model(ids(2, 5, device), mask, output_attentions=True)
        return list(torch.autograd.grad(output.last_hidden_state.square().sum(), output.attentions))

    compare(gradients, name, device)


def test_maps_with_a_prefix(device: torch.device, name: str) -> None:
    """Columns of the prefix have gradients, and their keys and values have theirs."""

    def gradients(model: Any) -> Tensors:
        torch.manual_seed(1)
        pairs = [tuple(torch.randn(2, 4, 3, 8, device=device).requires_grad_() for _ in "kv") for _ in range(2)]
        mask = torch.cat([torch.ones(2, 3, device=device).long(), mask_of([7, 4], 7, device)], dim=1)
        output = model(ids(2, 7, device), mask, past_key_values=DynamicCache(pairs), output_attentions=True)
        output.attentions[1].register_hook(lambda grad: 2.0 * grad)
        loss = (output.pooler_output.square()).sum()
        leaves = [x for pair in pairs for x in pair]
        return list(torch.autograd.grad(loss, [*output.attentions, *leaves]))

    compare(gradients, name, device)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_outputs_that_are_zeroed_at_kept_padding(device: torch.device, name: str) -> None:
    """packing=True, and a module inside that needs every row."""

    def gradients(model: Any) -> Tensors:
        output_module = model.encoder.layer[1].output
        output_module.__class__ = type("Strange", (type(output_module),), {})
        output = call(model, [7, 3], device)
        if model.__class__ is fastbert.BertModel:
            assert not output.attentions[0][1, :, 3:].any()
            assert not output.hidden_states[1][1, 3:].any()
            assert output.attentions[0].grad_fn.name() == "MaskedFillBackward0"
        output.attentions[0].register_hook(lambda grad: 2.0 * grad)
        output.hidden_states[1].register_hook(lambda grad: -grad)
        found = torch.autograd.grad(loss_of(output, [7, 3]), [*nodes(output), *model.encoder.layer[0].parameters()])
        count = len(nodes(output))
        parameters = dict(model.encoder.layer[0].named_parameters())
        kept = [g for k, g in zip(parameters, found[count:], strict=True) if "key.bias" not in k]
        return real_rows([7, 3], list(found[:count])) + kept

    compare(gradients, name, device, packing=True)


@pytest.mark.parametrize("packing", ["auto", True])
def test_checkpointing(device: torch.device, name: str, packing: bool | str) -> None:
    def gradients(model: Any) -> Tensors:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        output = call(model, [7, 3], device)
        output.attentions[0].register_hook(lambda grad: 2.0 * grad)
        for x in nodes(output):
            x.retain_grad()
        loss_of(output, [7, 3]).backward()
        found = [p.grad for k, p in model.encoder.named_parameters() if "key.bias" not in k]
        return found + real_rows([7, 3], [x.grad for x in nodes(output)])

    compare(gradients, name, device, packing)


@pytest.mark.parametrize("how", ["attention block", pytest.param("one by one", marks=pytest.mark.slow)])
def test_dropout_is_the_same_in_every_kind_of_step(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    _, fused = pair(device, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)
    fused.train()

    def gradients() -> Tensors:
        output = call(fused, [7, 3], device, head_mask=torch.linspace(0.5, 1.5, 8, device=device).view(2, 4))
        output.attentions[0].register_hook(lambda grad: 2.0 * grad)
        leaves = [p for k, p in fused.encoder.named_parameters() if "key.bias" not in k]
        return list(torch.autograd.grad(loss_of(output, [7, 3]), [*nodes(output), *leaves]))

    with backend("triton"):
        ours = gradients()
        if how == "one by one":
            monkeypatch.setattr(layer, "runs_as_block", lambda x: False)
        else:
            monkeypatch.setattr(layer, "look_at", lambda module: None)
        assert_same(ours, gradients())


@pytest.mark.parametrize(("lengths", "packing"), BATCHES)
def test_second_derivatives_in_plain_pytorch(device: torch.device, lengths: list[int], packing: bool | str) -> None:
    def gradients(model: Any) -> Tensors:
        output = call(model, lengths, device)
        first = torch.autograd.grad(output.pooler_output.square().sum(), output.attentions, create_graph=True)
        first = real_rows(lengths, list(first))
        parameters = {k: p for k, p in model.encoder.named_parameters() if "key.bias" not in k}
        found = torch.autograd.grad(sum(x.square().sum() for x in first), list(parameters.values()))
        return list(found)

    compare(gradients, "torch", device, packing)


def test_second_derivatives_of_kernels_are_refused(device: torch.device, name: str) -> None:
    if name == "torch":
        pytest.skip("plain PyTorch has them")
    _, fused = pair(device)
    with backend(name):
        output = call(fused, [7, 3], device)
        (first,) = torch.autograd.grad(output.last_hidden_state.square().sum(), output.attentions[1], create_graph=True)
        with pytest.raises(NotImplementedError, match="has no second derivative"):
            first.square().sum().backward()


def test_a_map_that_is_changed_in_place_is_an_error(device: torch.device, name: str) -> None:
    for model, which in zip(pair(device), ("torch", name), strict=True):
        with backend(which):
            output = call(model, [7, 7], device)
            output.attentions[0].mul_(0.0)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                output.last_hidden_state.square().sum().backward()


def test_a_map_that_nobody_holds_is_not_kept(device: torch.device) -> None:
    _, fused = pair(device)
    saved: list[int] = []
    with (
        backend("triton"),
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x),
    ):
        call(fused, [7, 7], device)
    assert 2 * 4 * 7 * 7 not in saved


def test_a_graph_that_is_kept_gives_the_same_again(device: torch.device, name: str) -> None:
    _, fused = pair(device)
    with backend(name):
        output = call(fused, [7, 3], device)
        loss, leaves = loss_of(output, [7, 3]), [*nodes(output), *fused.encoder.layer[0].parameters()]
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        torch.autograd.grad(loss, output.attentions[1], retain_graph=True)
        second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

"""What people rarely do to a model, and what then is eager's as well."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from models import assert_close, mask_of, pair, tiny_config
from torch import nn
from transformers.pytorch_utils import prune_linear_layer

import fastbert
from fastbert_kernels import backend

x, mask = torch.arange(18).view(2, 9) * 3 + 2, mask_of([9, 5], 9)


def longer_positions(model: Any) -> Any:
    """A position table longer than the configuration says."""
    embeddings, table = model.embeddings, nn.Embedding(60, 32)
    table.weight.data = embeddings.position_embeddings.weight.detach().repeat(2, 1)[:60] * 1.5
    embeddings.position_embeddings = table
    embeddings.register_buffer("position_ids", torch.arange(60)[None])
    embeddings.register_buffer("token_type_ids", torch.zeros(1, 60, dtype=torch.long))
    return model(x.repeat(1, 6)).last_hidden_state


def hooked_probabilities(model: Any) -> Any:
    """A hook on attention that reads the map, which nobody asked for."""
    seen = []
    model.encoder.layer[0].attention.self.register_forward_hook(lambda module, given, output: seen.append(output[1]))
    model(x, mask)
    return seen[0]


def sparse_projections(model: Any) -> Any:
    attention = model.encoder.layer[0].attention.self
    for linear in (attention.query, attention.key, attention.value):
        linear.weight = nn.Parameter(linear.weight.detach().to_sparse_csr(), requires_grad=False)
    with torch.no_grad():
        return model(x).last_hidden_state


def other_token_types(model: Any) -> Any:
    """The buffer of token types that come where none are passed."""
    first = model(x, mask).last_hidden_state
    model.embeddings.token_type_ids.fill_(1)
    second = model(x, mask).last_hidden_state
    assert not torch.allclose(first, second)
    return second


def tied_keys(model: Any) -> Any:
    """Keys in the memory of queries stay there, and both are moved by a step."""
    for layer in model.encoder.layer:
        layer.attention.self.key.weight.data = layer.attention.self.query.weight.data
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        model(x, mask).pooler_output.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    attention = model.encoder.layer[0].attention.self
    assert torch.equal(attention.key.weight, attention.query.weight)
    return attention.key.weight.detach()


def norm_over_the_sequence(model: Any) -> Any:
    model.encoder.layer[0].output.LayerNorm = nn.LayerNorm((9, 32))
    return model(x).last_hidden_state


def another_function_in_an_activation(model: Any) -> Any:
    first = model(x).last_hidden_state
    activation = model.encoder.layer[0].intermediate.intermediate_act_fn
    model.encoder.layer[0].intermediate.intermediate_act_fn = activation = copy.deepcopy(activation)
    same = model(x).last_hidden_state
    activation.act = torch.sin
    assert_close(first, same)
    return model(x).last_hidden_state


def rows_without_a_gradient(model: Any) -> Any:
    model.embeddings.position_embeddings.padding_idx = 3
    model.embeddings.token_type_embeddings.padding_idx = 0
    model(x, token_type_ids=x % 2).last_hidden_state.pow(3).mean().backward()
    embeddings = model.embeddings
    return torch.cat([embeddings.position_embeddings.weight.grad, embeddings.token_type_embeddings.weight.grad])


def pruned_heads(model: Any) -> Any:
    """One head of a layer's taken out, by what transformers has for it, and a step of training."""
    attention = model.encoder.layer[0].attention
    rows = torch.arange(attention.self.attention_head_size)
    for name in ("query", "key", "value"):
        setattr(attention.self, name, prune_linear_layer(getattr(attention.self, name), rows))
    attention.output.dense = prune_linear_layer(attention.output.dense, rows, dim=1)
    attention.self.num_attention_heads = 1
    attention.self.all_head_size = len(rows)
    out = model(x, mask, output_attentions=True)
    assert out.attentions[0].shape == (2, 1, 9, 9)
    out.last_hidden_state.pow(3).mean().backward()
    parts = out.last_hidden_state, out.attentions[0], *[p.grad for p in attention.parameters()]
    return torch.cat([part.detach().flatten() for part in parts])


EDITS = [
    pruned_heads,
    norm_over_the_sequence,
    another_function_in_an_activation,
    rows_without_a_gradient,
    longer_positions,
    hooked_probabilities,
    sparse_projections,
    other_token_types,
    tied_keys,
]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize(
    ("edit", "backend_name"),
    [*[(edit, "auto") for edit in EDITS], (hooked_probabilities, "triton"), (pruned_heads, "triton")],
)
def test_an_edited_model_is_eagers(edit: Callable[[Any], torch.Tensor], backend_name: str) -> None:
    plain, fused = pair(packing="auto", num_hidden_layers=1)
    with backend(backend_name):
        assert_close(edit(fused), edit(plain))


@pytest.mark.parametrize("backend_name", ["auto", "triton"])
def test_a_model_without_layers_trains(backend_name: str) -> None:
    grads = []
    for model in pair(packing="auto", num_hidden_layers=0):
        with backend(backend_name):
            model.train()(x, mask).last_hidden_state.pow(3).sum().backward()
        grads.append(model.embeddings.word_embeddings.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_an_encoder_fused_inside_its_head_follows_the_heads_configuration() -> None:
    model = transformers.BertForSequenceClassification(tiny_config(attn_implementation="sdpa")).eval()
    plain = copy.deepcopy(model)
    fastbert.fuse(model.bert)
    for each in (model, plain):
        each.config.output_hidden_states = True
    ours, theirs = model(x, mask), plain(x, mask)
    assert_close(ours.logits, theirs.logits)
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert_close(a, b)

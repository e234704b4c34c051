"""What the modules hand to the ops is theirs: an eps, a padding row, streams of dropout, masks; so are their hooks."""

import pytest
import torch
import transformers
from models import assert_close, ids, pair, tiny_config
from torch import nn

import fastbert
from fastbert.batch.masks import dense_bias
from fastbert.modules.qkv import qkv_parameters, rehome
from fastbert_kernels import backend, reference

#: So large that 1e-12 in its place is seen.
EPS = 0.3


@pytest.mark.parametrize("kind", ["block", "modules", "embeddings"])
@pytest.mark.parametrize("backend_name", ["torch", "triton"])
def test_layer_norms_eps_is_the_configurations(device: torch.device, backend_name: str, kind: str) -> None:
    plain, fused = pair(device, layer_norm_eps=EPS)
    if kind == "modules":  # a module in a Linear's place keeps the layer from running as one step
        for layer in fused.encoder.layer:
            layer.output.dense = nn.Sequential(layer.output.dense)
            layer.attention.output.dense = nn.Sequential(layer.attention.output.dense)
    x = ids(2, 6, device)
    with backend(backend_name), torch.no_grad():
        if kind == "embeddings":
            assert_close(fused.embeddings(x), plain.embeddings(x))
        else:
            assert_close(fused(x).last_hidden_state, plain(x).last_hidden_state)


@pytest.mark.parametrize("backend_name", ["torch", "triton"])
def test_the_padding_row_of_the_words_gets_no_gradient(device: torch.device, backend_name: str) -> None:
    plain, fused = pair(device, pad_token_id=3)
    x = ids(2, 6, device)
    x[0, 2] = x[1, 4] = 3
    grads = []
    with backend(backend_name):
        for model in (fused, plain):
            model(x).last_hidden_state.square().sum().backward()
            grads.append(model.embeddings.word_embeddings.weight.grad)
    assert (grads[0][3] == 0).all()
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4, rtol=1e-4)


def test_every_dropout_of_a_model_draws_a_stream_of_its_own() -> None:
    _, fused = pair()
    sites = [module for module in fused.modules() if hasattr(module, "dropout_stream")]
    assert len(sites) == 1 + 3 * len(fused.encoder.layer)
    assert len({site.dropout_stream for site in sites}) == len(sites)
    for layer in fused.encoder.layer:  # as the blocks are told
        arguments = layer.attention.block_arguments()
        second = layer.output.block_arguments()
        assert len({arguments["stream"], arguments["hidden_stream"], second["hidden_stream"]}) == 3


def test_a_backward_pre_hook_inside_a_layer_is_called(device: torch.device) -> None:
    _, fused = pair(device)
    seen = []
    fused.encoder.layer[0].output.dense.register_full_backward_pre_hook(lambda *_: seen.append("dense"))
    fused.encoder.layer[1].attention.self.query.register_full_backward_pre_hook(lambda *_: seen.append("query"))
    with backend("triton"):
        fused(ids(2, 5, device)).last_hidden_state.square().sum().backward()
    assert sorted(seen) == ["dense", "query"]


def test_parameters_in_shared_memory_stay_where_they_are() -> None:
    plain = transformers.BertModel(tiny_config())
    plain.share_memory()
    before = {name: p.data_ptr() for name, p in plain.named_parameters()}
    fused = fastbert.fuse(plain)
    fused(ids())
    assert {name: p.data_ptr() for name, p in fused.named_parameters()} == before
    attention = fused.encoder.layer[0].attention.self
    assert not any(rehome(parts) for parts in qkv_parameters(attention.query, attention.key, attention.value))


@pytest.mark.parametrize("lowest", [-65504.0, -40000.0, -32752.0])
def test_half_of_the_lowest_half_precision_value_masks_a_key_as_all_of_it_does(lowest: float) -> None:
    mask = torch.zeros(1, 1, 1, 8, dtype=torch.float16)
    mask[..., 5:] = lowest
    bias = dense_bias(mask, (1, 4, 8, 8))
    assert (bias[..., 5:] == reference.MASKED).all()
    assert (bias[..., :5] == 0).all()

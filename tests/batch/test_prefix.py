"""A cache as prefix tuning passes it to an encoder: keys and values before every sequence's own."""

import copy
import logging
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers
from models import assert_close, ids, mask_of, pair, tiny_config

import fastbert
from fastbert.batch.layout import packed_layout
from fastbert.batch.prefix import CACHE, place_prefix
from fastbert.distill import capture
from fastbert.graphs.inference import Graphed
from fastbert_kernels import backend

LENGTH = 5


def cache(device: torch.device | str = "cpu", layers: int = 2, **shape: int) -> transformers.DynamicCache:
    """A prefix a layer of the small model; its tensors require a gradient."""
    batch, heads, length, size = (
        shape.get(k, v) for k, v in {"batch": 3, "heads": 4, "length": LENGTH, "size": 8}.items()
    )
    made = transformers.DynamicCache()
    generator = torch.Generator().manual_seed(7)
    for layer in range(layers):
        key, value = torch.randn(2, batch, heads, length, size, generator=generator).to(device)
        made.update(key.clone().requires_grad_(), value.clone().requires_grad_(), layer)
    return made


def masks(seq: int) -> dict[str, torch.Tensor | None]:
    ragged = torch.cat([torch.ones(3, LENGTH, dtype=torch.long), mask_of([seq, 3, 7], seq)], 1)
    hidden_prefix = ragged.clone()
    hidden_prefix[1, 1:3] = 0
    some = torch.rand(3, 1, seq, LENGTH + seq, generator=torch.Generator().manual_seed(3)) < 0.8
    return {
        "none": None,
        "full": torch.ones(3, LENGTH + seq, dtype=torch.long),
        "ragged": ragged,
        "left": torch.cat([ragged[:, :LENGTH], ragged[:, LENGTH:].flip(1)], 1),
        "prefix partly hidden": hidden_prefix,
        "4-D": torch.zeros(some.shape).masked_fill(~some, torch.finfo(torch.float32).min),
    }


@pytest.mark.parametrize(("backend_name", "packing"), [("torch", True), ("torch", False), ("triton", True)])
@pytest.mark.parametrize("name", masks(1))
def test_a_prefix_gives_what_eager_gives(device: torch.device, backend_name: str, packing: bool, name: str) -> None:
    plain, fused = pair(device)
    fused.packing = packing
    x, mask = ids(device=device), masks(11)[name]
    mask = None if mask is None else mask.to(device)
    at = torch.ones(3, 11, dtype=torch.bool) if mask is None or mask.dim() == 4 else mask[:, LENGTH:].bool().cpu()
    wanted: dict[str, Any] = {"attention_mask": mask, "output_attentions": True, "output_hidden_states": True}
    runs = []
    for model, kind in ((plain, "torch"), (fused, backend_name)):
        past = cache(device)
        leaves = [part for layer in past.layers for part in (layer.keys, layer.values)]
        with backend(kind):
            out = model(x, **{CACHE: past}, **wanted)
            torch.manual_seed(1)
            loss = (out.last_hidden_state[at] * torch.randn(int(at.sum()), 32).to(device)).sum()
            loss = loss + (out.attentions[0][:, :, :, LENGTH:][at[:, None, :, None].expand(-1, 4, -1, 11)] ** 2).sum()
            runs.append((out, torch.autograd.grad(loss, [*leaves, model.embeddings.position_embeddings.weight])))
    (theirs, their_gradients), (ours, our_gradients) = runs
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert_close(a, b, at)
    for a, b in zip(ours.attentions, theirs.attentions, strict=True):
        assert a.shape == (3, 4, 11, LENGTH + 11)
        assert_close(a, b, at[:, None].expand(-1, 4, -1))
        if packing:
            assert (a[~at[:, None].expand(-1, 4, -1)] == 0).all()
    for a, b in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_a_prefix_keeps_the_order_of_the_sequences() -> None:
    layout = packed_layout(mask_of([4, 11, 7], 11).bool())
    assert place_prefix(cache(), layout, 4, 8).layout.order.tolist() == [1, 2, 0]


def test_the_cache_is_read_and_not_added_to() -> None:
    _, fused = pair()
    past = cache()
    fused(ids(), cache=past)
    assert past.get_seq_length() == LENGTH


def test_dropout_and_head_mask_reach_the_prefix_too(device: torch.device) -> None:
    _, fused = pair(device, attention_probs_dropout_prob=0.4)
    fused.train()
    heads = torch.tensor([1.0, 0.0, 0.5, 1.0], device=device)
    maps = fused(ids(device=device), cache=cache(device), head_mask=heads, output_attentions=True).attentions
    before = maps[0][:, :, :, :LENGTH]
    assert (before[:, 1] == 0).all()
    assert 0.2 < (before[:, 0] == 0).float().mean() < 0.6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"past": cache(batch=2)}, r"keys of layer 0 must be \(3, 4, 5, 8\), got \(2, 4, 5, 8\)"),
        ({"past": cache(heads=2, size=16)}, r"keys of layer 0 must be \(3, 4, 5, 8\), got \(3, 2, 5, 16\)"),
        ({"past": cache(length=30)}, "sequence length 41 is over the model's max_position_embeddings=40"),
        ({"attention_mask": mask_of([11, 3, 7], 11)}, r"\(batch, seq\) = \(3, 16\) .* got \(3, 11\)"),
    ],
)
def test_a_prefix_that_does_not_fit_is_an_error(changes: dict[str, Any], message: str) -> None:
    _, fused = pair()
    given = {"past": cache(), **changes}
    with pytest.raises(ValueError, match=message):
        fused(ids(), cache=given.pop("past"), **given)


def test_checkpointing_keeps_the_prefixs_gradient() -> None:
    _, fused = pair(attention_probs_dropout_prob=0.2)
    fused.train()
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            fused.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(2)
        past = cache()
        leaves = [part for layer in past.layers for part in (layer.keys, layer.values)]
        out = fused(ids(), masks(11)["ragged"], cache=past).last_hidden_state
        grads.append(torch.autograd.grad((out**3).sum(), leaves))
    assert grads[0][0].abs().max() > 0
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_reentrant_checkpointing_would_lose_the_prefixs_gradient() -> None:
    _, fused = pair()
    fused.train()
    fused.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="gives the cache no gradient"):
        fused(ids(), cache=cache())


def test_any_other_cache_takes_hugging_faces_path_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    plain, fused = pair()
    x = ids()
    fastbert.notices.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "fastbert"):
        ours = fused(x, cache=cache(layers=1)).last_hidden_state
    assert "not one prefix a layer" in caplog.text
    assert_close(ours, plain(x, **{CACHE: cache(layers=1)}).last_hidden_state)


#: A cache in a call, now and before transformers 5.24.
NAMES = ("cache", "past_key_values")


@pytest.mark.parametrize("name", NAMES)
def test_either_name_of_a_prefix_counts(name: str) -> None:
    plain, fused = pair()
    want = plain(x := ids(), **{CACHE: cache()}).last_hidden_state
    assert_close(fused(x, **{name: cache()}).last_hidden_state, want)
    assert (want - plain(x).last_hidden_state).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of Hugging Face's heads, that the older name is old
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head", ["BertForMaskedLM", "BertForSequenceClassification", "BertLMHeadModel"])
@pytest.mark.parametrize("made", ["fuse", "class"])
def test_a_prefix_reaches_the_encoder_through_a_head(made: str, head: str, name: str) -> None:
    plain = getattr(transformers, head)(tiny_config()).eval()
    if made == "fuse":
        fused = fastbert.fuse(copy.deepcopy(plain))
    else:
        fused = getattr(fastbert, head)(tiny_config()).eval()
        fused.load_state_dict(plain.state_dict())
    want = plain(x := ids(), **{CACHE: cache()}).logits
    assert_close(fused(x, **{name: cache()}).logits, want)
    assert (want - plain(x).logits).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_goes_on_from_a_cache(name: str) -> None:
    plain = transformers.BertLMHeadModel(tiny_config(is_decoder=True)).eval()
    fused = fastbert.BertLMHeadModel(tiny_config(is_decoder=True)).eval()
    fused.load_state_dict(plain.state_dict())
    want = plain(x := ids(seq=1), **{CACHE: cache()})
    got = fused(x, **{name: cache()})
    assert_close(got.logits, want.logits)
    assert got[CACHE].get_seq_length() == want[CACHE].get_seq_length() == LENGTH + 1
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fused.generate(x, **settings), plain.generate(x, **settings))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["empty", "of one layer", "of encoder and decoder"])
def test_a_cache_of_another_kind_gives_what_eager_gives(kind: str, name: str) -> None:
    def made() -> Any:
        if kind == "of encoder and decoder":
            return transformers.EncoderDecoderCache(cache(), transformers.DynamicCache())
        return cache(layers=1) if kind == "of one layer" else transformers.DynamicCache()

    plain, fused = pair()
    want = plain(x := ids(), **{CACHE: made()}, output_attentions=True)
    got = fused(x, **{name: made()}, output_attentions=True)
    for a, b in zip((got[0], *got.attentions), (want[0], *want.attentions), strict=True):
        assert_close(a, b)


def test_an_encoders_memory_is_ignored_as_hugging_face_ignores_it() -> None:
    plain, fused = pair()
    memory = {"encoder_hidden_states": torch.randn(3, 5, 32), "encoder_attention_mask": torch.ones(3, 5)}
    assert_close(fused(x := ids(), **memory)[0], plain(x, **memory)[0])


@pytest.mark.parametrize("name", NAMES)
def test_modules_called_on_their_own_take_either_name(name: str) -> None:
    plain, fused = pair()
    x, hidden = ids(), torch.randn(3, 11, 32)
    length = {"cache": "cache_length", "past_key_values": "past_key_values_length"}
    theirs = plain.embeddings(x, **{length[CACHE]: 4})
    assert_close(fused.embeddings(x, **{length[name]: 4}), theirs)
    for find in (lambda m: m, lambda m: m.attention, lambda m: m.attention.self):
        theirs, ours = (find(model.encoder.layer[0]) for model in (plain, fused))
        want, got = theirs(hidden, **{CACHE: cache()}), ours(hidden, **{name: cache()})
        if isinstance(want, tuple):
            want, got = want[0], got[0]
        assert_close(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_is_seen_by_what_knows_none(name: str) -> None:
    _, fused = pair()
    with pytest.raises(ValueError, match="capture knows no cache"), capture(fused):
        fused(ids(), **{name: cache()})
    graphed = Graphed(fused, (64,), 4, Mock())
    with torch.inference_mode():
        assert_close(graphed(x := ids(), **{name: cache()})[0], fused(x, **{name: cache()})[0])
    assert graphed.plain == {"the call has cache": 1}

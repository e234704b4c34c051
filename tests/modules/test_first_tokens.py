"""A last layer that is read at first tokens only computes no others, and nothing else changes."""

import logging
from typing import Any

import pytest
import torch
from models import assert_close, ids, onednn_enabled
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule
from unread import MASKS, POOLED, SEQ, Rows, assert_same_gradients, inputs_of, two

import fastbert
from fastbert import distill, notices


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("packing", [True, False])
def test_a_classifier_is_the_same(device: torch.device, backend_name: str, mask: str, packing: bool) -> None:
    whole, less = two("BertForSequenceClassification", device)
    whole.bert.packing = less.bert.packing = packing
    inputs = inputs_of("BertForSequenceClassification", mask, device)
    wanted, got = whole(**inputs), less(**inputs)
    assert_close(got.logits, wanted.logits)
    assert_close(got.loss, wanted.loss)
    wanted.loss.backward()
    got.loss.backward()
    assert_same_gradients(less, whole)


@pytest.mark.parametrize("head", POOLED)
def test_heads_of_the_pooled_output_are_the_same(device: torch.device, head: str) -> None:
    whole, less = two(head, device)
    inputs = inputs_of(head, "ragged", device)
    wanted, got = whole(**inputs), less(**inputs)
    assert_close(got.logits, wanted.logits)
    wanted.loss.backward()
    got.loss.backward()
    assert_same_gradients(less, whole)


def test_the_last_layer_sees_first_rows_only(
    device: torch.device, backend_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, less = two("BertForSequenceClassification", device)
    rows = Rows(monkeypatch)
    less(**inputs_of("BertForSequenceClassification", "ragged", device))
    assert rows.of(48) == [21, 3]  # the feed-forward products: 21 tokens, then 3 sequences
    assert rows.of(3 * 32) == [21]
    assert rows.of(2 * 32) == [21]  # keys and values
    rows.seen.clear()
    fastbert.skip_unread(less, skip=False)(**inputs_of("BertForSequenceClassification", "ragged", device))
    assert rows.of(48) == [21, 21]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_layer_behind_torchs_checkpoint_wrapper_sees_first_rows_only(
    monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    whole, less = two("BertForSequenceClassification", torch.device("cpu"))
    inputs = inputs_of("BertForSequenceClassification", "ragged", torch.device("cpu"))
    wrapper = less.bert.encoder.layer[-1] = checkpoint_wrapper(less.bert.encoder.layer[-1])
    if sharded:  # as fully_shard does, which needs processes
        wrapper.__class__ = type(f"FSDP{type(wrapper).__name__}", (FSDPModule, type(wrapper)), {})
    wanted, rows = whole(**inputs).logits, Rows(monkeypatch)
    with onednn_enabled(False):
        assert_close(less(**inputs).logits, wanted)
    assert rows.of(48) == [21, 3]


@pytest.mark.parametrize("mask", MASKS)
def test_a_model_told_so_gives_first_rows(device: torch.device, backend_name: str, mask: str) -> None:
    bert = two("BertForSequenceClassification", device)[0].bert.eval()
    where = None if MASKS[mask] is None else MASKS[mask].to(device)
    x = ids(3, SEQ, device)
    wanted = bert(x, where)
    bert.read_rows = "first"
    got = bert(x, where)
    assert_close(got.last_hidden_state, wanted.last_hidden_state[:, :1])
    assert_close(got.pooler_output, wanted.pooler_output)


def test_first_rows_of_a_batch_that_the_caller_packed(device: torch.device, backend_name: str) -> None:
    bert = two("BertForSequenceClassification", device)[0].bert.eval()
    cu_seqlens = torch.tensor([0, 4, 5, 11], dtype=torch.int32, device=device)
    lengths = dict.fromkeys(("max_length_q", "max_length_k"), 6)
    packed = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, **lengths}
    x = ids(1, SEQ, device)
    wanted = bert(x, **packed)
    got = bert(x, **packed, read_rows="first")
    assert_close(got.last_hidden_state, wanted.last_hidden_state[:, [0, 4, 5]])
    assert bert(x, **packed).last_hidden_state.shape == (1, SEQ, 32)


def test_masks_with_rows_and_head_masks(device: torch.device, backend_name: str) -> None:
    bert = two("BertForSequenceClassification", device)[0].bert.eval()
    x, head_mask = ids(3, SEQ, device), torch.rand(2, 4, device=device)
    mask = torch.rand(3, SEQ, SEQ, device=device) < 0.6
    mask[1, 0] = False  # a first row that sees nothing
    wanted = bert(x, mask, head_mask=head_mask)
    got = bert(x, mask, head_mask=head_mask, read_rows="first")
    assert_close(got.pooler_output, wanted.pooler_output)


@pytest.mark.parametrize("asked", ["output_attentions", "output_hidden_states"])
def test_what_is_asked_for_is_whole(device: torch.device, asked: str) -> None:
    whole, less = two("BertForSequenceClassification", device)
    inputs = inputs_of("BertForSequenceClassification", "ragged", device)
    wanted, got = whole(**inputs, **{asked: True}), less(**inputs, **{asked: True})
    name = asked.removeprefix("output_")
    for ours, theirs in zip(got[name], wanted[name], strict=True):
        assert_close(ours, theirs)


def test_dropout_drops_what_it_should(device: torch.device) -> None:
    """The mean over many draws is what no dropout gives: keys of zero attend evenly, and the context is linear."""
    bert = two("BertForSequenceClassification", device, attention_probs_dropout_prob=0.5)[1].bert
    block = bert.encoder.layer[-1].attention.self
    with torch.no_grad():
        block.key.weight.zero_()
    contexts: list[torch.Tensor] = []
    attend = type(block)._attend_first
    x = ids(1, SEQ, device)

    def kept(self: Any, *args: Any) -> torch.Tensor:
        contexts.append(attend(self, *args))
        return contexts[-1]

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(type(block), "_attend_first", kept)
        bert.encoder.layer[0].eval()
        for _ in range(400):
            bert(x)
        bert.eval()
        bert(x)
    *drawn, wanted = contexts
    mean, spread = torch.stack(drawn).mean(0), torch.stack(drawn).std(0)
    assert (spread > 0).all()
    assert ((mean - wanted).abs() < 5 * spread / 20).all()


def hook(model: Any) -> None:
    model.bert.encoder.layer[1].output.dense.register_forward_hook(lambda *args: None)


class OwnDropout(nn.Dropout):
    pass


def replace(model: Any) -> None:
    model.bert.encoder.layer[1].attention.self.dropout = OwnDropout(0.0)


@pytest.mark.parametrize(
    ("change", "reason"), [(hook, "forward hooks on encoder.layer.1"), (replace, "it is not fused")]
)
def test_a_last_layer_that_must_be_whole_says_so(caplog: pytest.LogCaptureFixture, change: Any, reason: str) -> None:
    notices.say_once.cache_clear()
    whole, less = two("BertForSequenceClassification", torch.device("cpu"))
    change(less)
    inputs = inputs_of("BertForSequenceClassification", "full", torch.device("cpu"))
    with caplog.at_level(logging.WARNING, "fastbert"):
        assert_close(less(**inputs).logits, whole(**inputs).logits)
    assert f"the last layer computes every row, read or not: {reason}" in caplog.text


def test_capture_sees_every_row() -> None:
    whole, less = two("BertForSequenceClassification", torch.device("cpu"))
    inputs = inputs_of("BertForSequenceClassification", "ragged", torch.device("cpu"))
    with distill.capture(whole.bert) as wanted:
        whole(**inputs)
    with distill.capture(less.bert) as got:
        less(**inputs)
    torch.testing.assert_close(got[0].qkv, wanted[0].qkv)


def test_explain_tells_of_first_rows() -> None:
    _, less = two("BertForSequenceClassification", torch.device("cpu"))
    explained = fastbert.explain(less)
    first, *_ = str(explained).splitlines()
    assert first == "every part is fused: embeddings and 2 layers; the last one computes first rows only"
    assert {part.layer for part in explained.parts if part.rows == "first"} == {1}
    fastbert.skip_unread(less, skip=False)
    assert str(fastbert.explain(less)).splitlines()[0] == "every part is fused: embeddings and 2 layers"

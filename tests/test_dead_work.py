"""Rows that nothing reads are not computed, and nothing else changes."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import assert_close, ids, mask_of, randomize, tiny_config
from torch import nn

import fastbert
import fastbert_kernels
from fastbert import distill, notices

SEQ = 11
MASKS = {
    "full": None,
    "ragged": mask_of([SEQ, 3, 7], SEQ),
    "left": mask_of([SEQ, 3, 7], SEQ).flip(1),
    "a row without a token": mask_of([3, 7, 0], SEQ),
}
POOLED = ["BertForSequenceClassification", "BertForNextSentencePrediction", "BertForMultipleChoice"]
MASKED_LM = ["BertForMaskedLM", "BertForPreTraining"]


@pytest.fixture(params=["torch", "triton"])
def life(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastbert_kernels.backend(request.param):
        yield request.param


def two(head: str, device: torch.device, **changes: Any) -> tuple[Any, Any]:
    """A fused head, and one with the same weights that skips what it does not read, both in training mode."""
    whole = getattr(transformers, head)(tiny_config(**changes))
    randomize(whole)
    less = getattr(transformers, head)(tiny_config(**changes))
    less.load_state_dict(whole.state_dict())
    whole, less = (fastbert.fuse(model).to(device).train() for model in (whole, less))
    return whole, fastbert.skip_unread(less)


def inputs_of(head: str, mask: str, device: torch.device) -> dict[str, Any]:
    x = ids(3, SEQ)
    inputs: dict[str, Any] = {"input_ids": x, "attention_mask": MASKS[mask]}
    if head == "BertForMultipleChoice":
        inputs = {name: None if value is None else value[None] for name, value in inputs.items()}
        inputs["labels"] = torch.tensor([1])
    elif head in MASKED_LM:
        inputs["labels"] = torch.where(torch.rand(3, SEQ) < 0.3, x, -100)
        inputs["labels"][0, 1] = 5
        if head == "BertForPreTraining":
            inputs["next_sentence_label"] = torch.tensor([0, 1, 1])
    else:
        inputs["labels"] = torch.tensor([0, 1, 1])
    return {name: None if value is None else value.to(device) for name, value in inputs.items()}


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    wanted = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert (p.grad is None) == (wanted[name].grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, wanted[name].grad, atol=2e-5, rtol=1e-3, msg=name)


class Rows:
    """Rows that went through the linear layers of each width, while it watches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[int, int]] = []
        linear = F.linear

        def watched(x: torch.Tensor, weight: torch.Tensor, *args: Any) -> torch.Tensor:
            self.seen.append((x.shape[:-1].numel(), weight.shape[0]))
            return linear(x, weight, *args)

        monkeypatch.setattr(F, "linear", watched)

    def of(self, width: int) -> list[int]:
        return [rows for rows, features in self.seen if features == width]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("packing", [True, False])
def test_a_classifier_is_the_same(device: torch.device, life: str, mask: str, packing: bool) -> None:
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


def test_the_last_layer_sees_first_rows_only(device: torch.device, life: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, less = two("BertForSequenceClassification", device)
    rows = Rows(monkeypatch)
    less(**inputs_of("BertForSequenceClassification", "ragged", device))
    assert rows.of(48) == [21, 3]  # the feed-forward products: 21 tokens, then 3 sequences
    assert rows.of(3 * 32) == [21]
    assert rows.of(2 * 32) == [21]  # keys and values
    rows.seen.clear()
    fastbert.skip_unread(less, skip=False)(**inputs_of("BertForSequenceClassification", "ragged", device))
    assert rows.of(48) == [21, 21]


@pytest.mark.parametrize("mask", MASKS)
def test_a_model_told_so_gives_first_rows(device: torch.device, life: str, mask: str) -> None:
    bert = two("BertForSequenceClassification", device)[0].bert.eval()
    where = None if MASKS[mask] is None else MASKS[mask].to(device)
    x = ids(3, SEQ, device)
    wanted = bert(x, where)
    bert.read_rows = "first"
    got = bert(x, where)
    assert_close(got.last_hidden_state, wanted.last_hidden_state[:, :1])
    assert_close(got.pooler_output, wanted.pooler_output)


def test_first_rows_of_a_batch_that_the_caller_packed(device: torch.device, life: str) -> None:
    bert = two("BertForSequenceClassification", device)[0].bert.eval()
    cu_seqlens = torch.tensor([0, 4, 5, 11], dtype=torch.int32, device=device)
    lengths = dict.fromkeys(("max_length_q", "max_length_k"), 6)
    packed = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, **lengths}
    x = ids(1, SEQ, device)
    wanted = bert(x, **packed)
    got = bert(x, **packed, read_rows="first")
    assert_close(got.last_hidden_state, wanted.last_hidden_state[:, [0, 4, 5]])
    assert bert(x, **packed).last_hidden_state.shape == (1, SEQ, 32)


def test_masks_with_rows_and_head_masks(device: torch.device, life: str) -> None:
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


@pytest.mark.parametrize("head", MASKED_LM)
@pytest.mark.parametrize("mask", ["full", "ragged", "left"])
def test_labelled_rows_make_the_same_loss(device: torch.device, life: str, head: str, mask: str) -> None:
    whole, less = two(head, device)
    inputs = inputs_of(head, mask, device)
    wanted, got = whole(**inputs), less(**inputs)
    assert_close(got.loss, wanted.loss)
    logits, whole_logits = got[1], wanted[1]
    assert_close(logits, whole_logits[inputs["labels"] != -100])
    wanted.loss.backward()
    got.loss.backward()
    assert_same_gradients(less, whole)


def test_the_head_sees_labelled_rows_only(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    _, less = two("BertForMaskedLM", device)
    inputs = inputs_of("BertForMaskedLM", "ragged", device)
    labelled = int((inputs["labels"] != -100).sum())
    rows = Rows(monkeypatch)
    less(**inputs)
    assert rows.of(60) == [labelled]  # the vocabulary


@pytest.mark.parametrize("head", MASKED_LM)
def test_no_label_at_all(device: torch.device, head: str) -> None:
    whole, less = two(head, device)
    inputs = inputs_of(head, "ragged", device)
    inputs["labels"].fill_(-100)
    wanted, got = whole(**inputs), less(**inputs)
    assert wanted.loss.isnan()
    assert got.loss.isnan()
    got.loss.backward()


def test_all_rows_are_there_without_labels_and_in_evaluation(device: torch.device) -> None:
    whole, less = two("BertForMaskedLM", device)
    inputs = inputs_of("BertForMaskedLM", "ragged", device)
    assert_close(less.eval()(**inputs).logits, whole.eval()(**inputs).logits)
    del inputs["labels"]
    assert_close(less.train()(**inputs).logits, whole.train()(**inputs).logits)
    assert less(inputs["input_ids"], return_dict=False)[0].shape == (3, SEQ, 60)


def test_labels_by_position_and_a_tuple(device: torch.device) -> None:
    _, less = two("BertForMaskedLM", device)
    x = ids(3, SEQ, device)
    loss, logits = less(x, None, None, None, None, None, None, x, return_dict=False)
    assert logits.shape == (3 * SEQ, 60)
    assert loss.isfinite()


def test_unfuse_computes_everything_again() -> None:
    for head in ("BertForSequenceClassification", "BertForMaskedLM"):
        _, less = two(head, torch.device("cpu"))
        fastbert.unfuse(less)
        assert type(less) is getattr(transformers, head)
        assert "read_rows" not in vars(less)
        assert "read_rows" not in vars(less.bert)


def test_explain_tells_of_first_rows() -> None:
    _, less = two("BertForSequenceClassification", torch.device("cpu"))
    explained = fastbert.explain(less)
    first, _ = str(explained).splitlines()
    assert first == "every part is fused: embeddings and 2 layers; the last one computes first rows only"
    assert {part.layer for part in explained.parts if part.rows == "first"} == {1}
    fastbert.skip_unread(less, skip=False)
    assert str(fastbert.explain(less)).splitlines()[0] == "every part is fused: embeddings and 2 layers"


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertForMaskedLM"])
def test_compiled(head: str) -> None:
    whole, less = two(head, torch.device("cpu"))
    inputs = inputs_of(head, "ragged", torch.device("cpu"))
    with fastbert_kernels.backend("torch"):
        wanted, got = whole(**inputs), torch.compile(less, backend="aot_eager", fullgraph=True)(**inputs)
        assert_close(got.logits, wanted.logits)
        wanted.loss.backward()
        got.loss.backward()
    assert_same_gradients(less, whole)


def test_bad_input() -> None:
    classifier = fastbert.BertForSequenceClassification(tiny_config())
    with pytest.raises(ValueError, match=r"BertModel holds no head that leaves rows unread: .* has read_rows"):
        fastbert.skip_unread(classifier.bert)
    with pytest.raises(ValueError, match="BertForTokenClassification holds no head that leaves rows unread"):
        fastbert.skip_unread(fastbert.BertForTokenClassification(tiny_config()))
    with pytest.raises(ValueError, match=r"BertForMaskedLM is not fused: call fastbert.fuse\(model\) first"):
        fastbert.skip_unread(transformers.BertForMaskedLM(tiny_config()))
    classifier.bert.read_rows = "second"
    with pytest.raises(ValueError, match="unknown read_rows 'second': a BertModel takes one of all, first"):
        classifier(ids())
    head = fastbert.BertForMaskedLM(tiny_config())
    head.read_rows = "first"
    with pytest.raises(ValueError, match="unknown read_rows 'first': a head takes one of all, labelled"):
        head(ids())
    fastbert.skip_unread(head)
    with pytest.raises(ValueError, match=r"labels must be \(batch, seq\) = \(3, 11\) like the input, got \(3, 10\)"):
        head(ids(3, SEQ), labels=ids(3, 10))


def test_a_head_of_ones_own_must_derive_from_ours() -> None:
    class Own(transformers.BertForMaskedLM):
        pass

    own = fastbert.fuse(Own(tiny_config()))
    with pytest.raises(ValueError, match="Own derives from Hugging Face's class: derive it from fastbert's"):
        fastbert.skip_unread(own)

"""A head for masked language modelling computes labelled rows only, when told, and nothing else changes."""

import pytest
import torch
import transformers
from models import assert_close, ids, tiny_config
from unread import MASKED_LM, SEQ, Rows, assert_same_gradients, inputs_of, two

import fastbert
import fastbert_kernels


@pytest.mark.parametrize("head", MASKED_LM)
@pytest.mark.parametrize("mask", ["full", "ragged", "left"])
def test_labelled_rows_make_the_same_loss(device: torch.device, backend_name: str, head: str, mask: str) -> None:
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

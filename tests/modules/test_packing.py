"""Padding is dropped where nobody reads it: with the defaults, whatever is handed out equals eager's, every row."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from models import assert_close, ids, mask_of, pair, randomize, tiny_config
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers.models.bert import modeling_bert

import fastbert
from fastbert import notices
from fastbert.batch.attend import Attend
from fastbert.modules import packing as packing_module
from fastbert.modules.encoder import FusedEncoder
from fastbert_kernels import backend

LENGTHS = [11, 4, 7]
HEADS = [
    "BertForPreTraining", "BertLMHeadModel", "BertForMaskedLM", "BertForNextSentencePrediction",
    "BertForSequenceClassification", "BertForMultipleChoice", "BertForTokenClassification", "BertForQuestionAnswering",
]  # fmt: skip


def heads(name: str, device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """One of Hugging Face's heads with eager attention, and the same fused in place with the defaults."""
    torch.manual_seed(2)
    plain = getattr(transformers, name)(tiny_config()).to(device).eval()
    randomize(plain)
    return plain, fastbert.fuse(copy.deepcopy(plain))


def batch(name: str, device: torch.device | str = "cpu", at_padding: int = -100) -> dict[str, torch.Tensor]:
    """A padded batch with the labels that the head's usual collator makes, and `at_padding` at padding."""
    torch.manual_seed(3)
    x, mask = ids(3, 11, device), mask_of(LENGTHS, 11, device)
    given = {"input_ids": x * mask, "attention_mask": mask}
    if name == "BertForMultipleChoice":
        given = {key: torch.stack([value, value.flip(0)], 1) for key, value in given.items()}
        return given | {"labels": torch.tensor([0, 1, 1], device=device)}
    if name == "BertForQuestionAnswering":
        at = {"start_positions": torch.tensor([1, 2, 0]), "end_positions": torch.tensor([3, 3, 6])}
        return given | {key: value.to(device) for key, value in at.items()}
    if name in ("BertForSequenceClassification", "BertForNextSentencePrediction"):
        return given | {"labels": torch.tensor([0, 1, 1], device=device)}
    labels = (x % 2 if name == "BertForTokenClassification" else x).masked_fill(mask == 0, at_padding)
    given["labels"] = labels
    if name == "BertForPreTraining":
        given["next_sentence_label"] = torch.tensor([0, 1, 1], device=device)
    return given


def tensors(output: Any) -> list[torch.Tensor]:
    found = []
    for value in output.values():
        found += [value] if isinstance(value, torch.Tensor) else [each for each in value if each is not None]
    return found


@pytest.mark.parametrize("side", ["right", "left", "holes"])
@pytest.mark.parametrize("backend_name", ["auto", "torch", "triton"])
def test_a_bare_model_hands_out_eagers_rows(device: torch.device, backend_name: str, side: str) -> None:
    plain, fused = pair(device, packing="auto")
    x, mask = ids(3, 11, device), mask_of(LENGTHS, 11, device)
    if side == "left":
        mask = mask.flip(1)
    if side == "holes":
        mask[0, 4:6] = 0
        mask[1] = 0  # a row with no visible key
    with backend(backend_name), torch.no_grad():
        for asked in ({}, {"output_hidden_states": True, "output_attentions": True}):
            ours, theirs = fused(x, mask, **asked), plain(x, mask, **asked)
            for a, b in zip(tensors(ours), tensors(theirs), strict=True):
                assert_close(a, b, atol=1e-5)


@pytest.mark.parametrize("name", ["BertModel", "BertForTokenClassification"])
def test_the_log_tells_once_how_much_padding_is_kept(caplog: pytest.LogCaptureFixture, name: str) -> None:
    notices.say_once.cache_clear()
    fused, given = heads(name)[1], batch(name, at_padding=0)
    if name == "BertModel":
        del given["labels"]
    full = given | {"attention_mask": torch.ones_like(given["attention_mask"])}
    with caplog.at_level("WARNING", "fastbert"):
        fused(**full)
        assert not caplog.messages
        fused(**given)
        fused(**given)
    reason, saved = caplog.messages
    assert "padding is kept: " in reason
    assert (
        saved == "fastbert: 67% of this batch are tokens: packing=True would leave the other 33% out of every product"
    )


@pytest.mark.parametrize("packing", ["auto", True])
def test_a_call_that_fails_takes_no_notice_of_padding(caplog: pytest.LogCaptureFixture, packing: bool | str) -> None:
    notices.say_once.cache_clear()
    fused = pair(packing=packing)[1]
    with caplog.at_level("WARNING", "fastbert"), pytest.raises(ValueError, match="sequence length 41 is over"):
        fused(ids(3, 41), mask_of([41, 4, 7], 41).flip(1))
    assert not caplog.messages


def test_attention_is_told_the_lengths_of_kept_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    run = FusedEncoder.forward

    def noted(*args: Any, attend: Attend, **kwargs: Any) -> Any:
        told.append(None if attend.key_spans is None else attend.key_spans.tolist())
        return run(*args, attend=attend, **kwargs)

    monkeypatch.setattr(FusedEncoder, "forward", noted)
    fused = pair(packing="auto")[1]
    x, mask = ids(3, 11), mask_of(LENGTHS, 11)
    fused(x, mask)
    fused(x, mask.flip(1))
    fused(x, mask[:, None, None].bool())  # of more dimensions: it might be anything
    fused(x, mask, packing=True)
    fused(x)
    assert told == [[[0, 11], [0, 4], [0, 7]], [[0, 11], [7, 11], [4, 11]], None, None, None]


def test_a_mask_that_a_hook_changes_counts() -> None:
    def hide_two(module: Any, args: Any, kwargs: Any) -> Any:
        def hidden(x: Any) -> Any:
            if not (isinstance(x, torch.Tensor) and x.dim() == 4):
                return x
            return x.index_fill(3, torch.tensor([0, 3]), torch.finfo(x.dtype).min)

        return tuple(map(hidden, args)), {name: hidden(x) for name, x in kwargs.items()}

    plain, fused = pair(packing="auto")
    x, mask = ids(3, 11), mask_of(LENGTHS, 11)
    with backend("triton"), torch.no_grad():
        before = fused(x, mask).last_hidden_state
        for model in (plain, fused):
            model.encoder.layer[1].attention.self.register_forward_pre_hook(hide_two, with_kwargs=True)
        after = fused(x, mask).last_hidden_state
    assert_close(after, plain(x, mask).last_hidden_state)
    assert (after - before).abs().max() > 0.01


@pytest.mark.parametrize("at_padding", [-100, 0])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("backend_name", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_every_heads_loss_and_gradients_are_eagers(
    device: torch.device, backend_name: str, name: str, at_padding: int
) -> None:
    plain, fused = heads(name, device)
    given = batch(name, device, at_padding)
    with backend(backend_name):
        ours, theirs = fused(**given), plain(**given)
        assert_close(ours.loss, theirs.loss, atol=1e-5)
        ours.loss.backward()
        theirs.loss.backward()
    for (where, p), q in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), where
        if q.grad is not None:
            assert (p.grad - q.grad).norm() <= 1e-4 * q.grad.norm() + 1e-5, where


@pytest.mark.parametrize("name", HEADS)
def test_every_heads_outputs_are_eagers_without_labels(device: torch.device, name: str) -> None:
    plain, fused = heads(name, device)
    given = {key: value for key, value in batch(name, device).items() if key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        for asked in ({}, {"output_hidden_states": True, "output_attentions": True}):
            for a, b in zip(tensors(fused(**given, **asked)), tensors(plain(**given, **asked)), strict=True):
                assert_close(a, b, atol=1e-5)


def _train(model: nn.Module, step: Callable[[Any], torch.Tensor]) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = step(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_question_answering_trains_as_eager_does() -> None:
    plain, fused = heads("BertForQuestionAnswering")
    given = batch("BertForQuestionAnswering")
    ours, theirs = (_train(model, lambda m: m(**given).loss) for model in (fused, plain))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert theirs[-1] < theirs[0] - 0.1


class Tagger(nn.Module):
    """A BiLSTM on an encoder's last hidden states, which runs over padding too."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.bert = bert
        self.lstm = nn.LSTM(32, 16, bidirectional=True, batch_first=True)
        self.out = nn.Linear(32, 3)

    def forward(self, **given: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(self.bert(**given).last_hidden_state)[0])


def test_a_tagger_with_an_lstm_trains_as_eager_does() -> None:
    plain, fused = pair(packing="auto")
    mask = mask_of(LENGTHS, 11)
    given, target = {"input_ids": ids() * mask, "attention_mask": mask}, ids() % 3

    def step(model: Tagger) -> torch.Tensor:
        return nn.functional.cross_entropy(model(**given)[mask.bool()], target[mask.bool()])

    ours, theirs = (_train(Tagger(model), step) for model in (fused, plain))
    assert ours == pytest.approx(theirs, rel=1e-4)


#: What is called, with which arguments besides ids and a mask -> whether padding is dropped under "auto".
CALLS: list[tuple[str, dict[str, Any], bool]] = [
    ("BertModel", {}, False),
    ("BertModel", {"output_attentions": True}, False),
    ("BertForSequenceClassification", {}, True),
    ("BertForSequenceClassification", {"labels": True}, True),
    ("BertForSequenceClassification", {"output_hidden_states": True}, False),
    ("BertForSequenceClassification", {"output_attentions": [0]}, False),
    ("BertForNextSentencePrediction", {}, True),
    ("BertForMultipleChoice", {}, True),
    ("BertForTokenClassification", {}, False),
    ("BertForTokenClassification", {"labels": True}, True),
    ("BertForTokenClassification", {"labels": 0}, False),
    ("BertForMaskedLM", {"labels": True}, True),
    ("BertForMaskedLM", {"labels": 0}, False),
    ("BertForMaskedLM", {}, False),
    ("BertForPreTraining", {"labels": True}, True),
    ("BertForPreTraining", {"labels": 0}, False),
    ("BertForQuestionAnswering", {}, False),
    ("BertForQuestionAnswering", {"labels": True}, False),
    ("BertLMHeadModel", {"labels": True}, False),
]


@pytest.mark.parametrize(("name", "asked", "drops"), CALLS)
def test_which_calls_drop_padding(packed: list[bool], name: str, asked: dict[str, Any], drops: bool) -> None:
    model = heads(name)[1]
    labels = asked.get("labels")
    given = batch(name, at_padding=0 if labels == 0 else -100)
    if labels is None:
        given = {key: value for key, value in given.items() if key in ("input_ids", "attention_mask")}
    model(**given, **{key: value for key, value in asked.items() if key != "labels"})
    assert any(packed) is drops
    packed.clear()
    model(**given, packing=True)
    assert packed == [True]
    packed.clear()
    model(**given, packing=False)
    assert not any(packed)


def test_a_row_that_starts_with_padding_is_kept_for_the_pooler(packed: list[bool]) -> None:
    plain, fused = heads("BertForSequenceClassification")
    given = batch("BertForSequenceClassification")
    given["attention_mask"] = given["attention_mask"].flip(1)
    assert_close(fused(**given).logits, plain(**given).logits)
    assert packed == [False]


def test_packing_true_leaves_paddings_logits_out_of_question_answering() -> None:
    plain, fused = heads("BertForQuestionAnswering")
    fused.bert.packing = True
    given = batch("BertForQuestionAnswering")
    ours, theirs = fused(**given), plain(**given)
    real = given["attention_mask"].bool()
    assert_close(ours.start_logits, theirs.start_logits, real)
    assert (ours.end_logits[~real] == torch.finfo(torch.float32).min).all()
    wanted = [
        nn.functional.cross_entropy(logits.masked_fill(~real, -torch.inf), given[at])
        for logits, at in ((theirs.start_logits, "start_positions"), (theirs.end_logits, "end_positions"))
    ]
    assert_close(ours.loss, sum(wanted) / 2)
    as_tuple = fused(**given, return_dict=False)
    assert_close(as_tuple[0], ours.loss)
    assert len(as_tuple) == 3


class Mean(nn.Module):
    """A pooler of one's own."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.mean(1)


class Centred(nn.Module):
    """What is in it, of rows less their mean."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden - hidden.mean(1, keepdim=True))


def replace_pooler(model: Any) -> None:
    model.bert.pooler = Mean()


def replace_poolers_forward(model: Any) -> None:
    model.bert.pooler.forward = lambda hidden: hidden.mean(1)


def patch_poolers_class(model: Any) -> None:
    pytest.MonkeyPatch().setattr(modeling_bert.BertPooler, "forward", lambda self, hidden: hidden.mean(1))


def replace_dropout(model: Any) -> None:
    model.dropout = Centred(model.dropout)


def replace_transform(model: Any) -> None:
    model.cls.predictions.transform = Centred(model.cls.predictions.transform)


def patch_head(model: Any) -> None:
    def forward(self: Any, input_ids: Any, attention_mask: Any, labels: Any) -> Any:
        last = self.bert(input_ids, attention_mask).last_hidden_state
        return {"loss": last.amax(1).square().mean()}

    pytest.MonkeyPatch().setattr(transformers.BertForSequenceClassification, "forward", forward)


@pytest.fixture
def _unpatched() -> Iterator[None]:
    classes = modeling_bert.BertPooler, transformers.BertForSequenceClassification
    forwards = [kind.forward for kind in classes]
    yield
    for kind, forward in zip(classes, forwards, strict=True):
        kind.forward = forward


@pytest.mark.usefixtures("_unpatched")
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("BertForSequenceClassification", replace_pooler),
        ("BertForSequenceClassification", replace_poolers_forward),
        ("BertForSequenceClassification", patch_poolers_class),
        ("BertForSequenceClassification", patch_head),
        ("BertForTokenClassification", replace_dropout),
        ("BertForMaskedLM", replace_transform),
    ],
)
def test_a_head_that_someone_changed_reads_every_row(name: str, change: Callable[[Any], None]) -> None:
    plain, fused = heads(name)
    change(plain)
    change(fused)
    ours, theirs = (model(**batch(name))["loss"] for model in (fused, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    if change is replace_pooler:
        assert "kept: every row of last_hidden_state" in str(fastbert.explain(fused))
        assert fastbert.skip_unread(fused)(**batch(name)).loss.item() == pytest.approx(theirs.item(), rel=1e-4)
    if change is replace_transform:
        loss = fastbert.skip_unread(fused).train()(**batch(name)).loss
        assert loss.item() == pytest.approx(theirs.item(), rel=1e-4)


@pytest.mark.parametrize("where", ["bert", "bert.pooler"])
def test_who_watches_a_classifiers_encoder_sees_every_row(where: str) -> None:
    seen = []
    for model in heads("BertForSequenceClassification"):
        of_pooler = where != "bert"
        note = lambda module, given, output, of_pooler=of_pooler: seen.append(given[0] if of_pooler else output[0])  # noqa: E731
        model.get_submodule(where).register_forward_hook(note)
        model(**batch("BertForSequenceClassification"))
    assert_close(seen[1], seen[0])


@pytest.mark.parametrize("layer", [0, 1])
def test_who_watches_torchs_wrapper_of_a_layer_sees_every_row(layer: int) -> None:
    seen = []
    for model in heads("BertForSequenceClassification"):
        layers = model.bert.encoder.layer
        layers[layer] = checkpoint_wrapper(layers[layer])
        layers[layer].register_forward_hook(lambda module, given, output: seen.append(given[0]))
        model(**batch("BertForSequenceClassification"))
    assert_close(seen[1], seen[0])


@pytest.mark.parametrize("packing", ["auto", False])
def test_strangers_are_looked_for_once_in_a_call(monkeypatch: pytest.MonkeyPatch, packing: bool | str) -> None:
    looked, find = [], packing_module.find_strangers
    monkeypatch.setattr(packing_module, "find_strangers", lambda model: looked.append(model) or find(model))
    _, fused = pair(packing=packing)
    fused(ids(3, 11), mask_of(LENGTHS, 11))
    assert looked == [fused]


def test_packing_is_one_of_three() -> None:
    with pytest.raises(ValueError, match="packing must be one of 'auto', True, False, got 'yes'"):
        fastbert.fuse(transformers.BertModel(tiny_config()), packing="yes")


def test_explain_tells_what_becomes_of_padding() -> None:
    classifier = heads("BertForSequenceClassification")[1]
    assert "padding is dropped, only the pooled output is read" in str(fastbert.explain(classifier))
    assert "padding is kept: every row of last_hidden_state is handed out" in str(fastbert.explain(classifier.bert))
    classifier.bert.packing = False
    assert "padding is kept: packing=False" in str(fastbert.explain(classifier))

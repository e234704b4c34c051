"""Every head of every family: losses, gradients, padding that is dropped, rows that nothing reads, replayed steps."""

import copy
from typing import Any

import pytest
import torch
from comparison import assert_equal_gradients, assert_equals, named_tensors, zeroed
from family_table import FAMILIES, LENGTHS, SEQ, VOCABULARY, Family, each_family, each_head
from recorders import rerun_calls, rerun_steps
from torch import nn
from unread import Rows

import fastbert
from fastbert import families
from fastbert_kernels import backend

ALL = {"output_hidden_states": True, "output_attentions": True}

#: What a head's labels are -> whether padding is dropped under "auto": without labels; with such as its collator makes;
#: where those at padding are 0; and where hidden states are asked for.
DROPS = {
    "sequence": (True, True, None, False),
    "choice": (True, True, None, False),
    "choice of a summary": (False, False, None, False),
    "words": (False, True, False, False),
    "words and sequence": (False, True, False, False),
    "tokens": (False, True, False, False),
    "replaced": (False, False, False, False),
    "causal": (False, False, False, False),
    "span": (False, False, None, False),
}


def heads_whose(*kinds: str) -> Any:
    """Parametrizes a test with the heads of each family whose labels are of one of these kinds."""
    return pytest.mark.parametrize(
        ("family", "head"),
        [
            pytest.param(family, head, id=f"{name}-{head}")
            for name, family in FAMILIES.items()
            for head, kind in family.heads.items()
            if kind in kinds
        ],
    )


def loss_gradients(model: Any, output: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output.loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@each_head
@pytest.mark.parametrize("at_padding", [-100, 0])
def test_losses_logits_and_gradients_are_eagers_and_float64s(family: Family, head: str, at_padding: int) -> None:
    if at_padding == 0 and DROPS[family.heads[head]][2] is None:
        pytest.skip("its labels are not those of tokens")
    plain, fused = family.pair(head)
    exact = copy.deepcopy(plain).double()
    given = family.labelled(head, at_padding)
    drops = DROPS[family.heads[head]][1 if at_padding else 2]
    ours = fused(**given)
    found = loss_gradients(fused, ours)
    for model in (plain, exact):
        theirs = model(**given)
        assert list(ours.keys()) == list(theirs.keys())
        assert type(ours) is type(theirs)
        assert abs(ours.loss.item() - theirs.loss.item()) <= 2e-5
        for name, x in named_tensors(ours).items():
            wanted = theirs[name]
            if drops and x.shape[:2] == given["input_ids"].shape and x.dim() == 3:  # labels say that nobody reads them
                tokens = given["attention_mask"].bool()
                x, wanted = x[tokens], wanted[tokens]
            assert_equals({name: x}, {name: wanted})
        assert_equal_gradients(found, loss_gradients(model, theirs))


@each_head
def test_outputs_without_labels_are_eagers(family: Family, head: str) -> None:
    plain, fused = family.pair(head)
    given = family.labelled(head)
    given = {name: given[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in given}
    with torch.no_grad():
        for asked in ({}, ALL):
            ours, theirs = fused(**given, **asked), plain(**given, **asked)
            assert list(ours.keys()) == list(theirs.keys())
            assert_equals(named_tensors(ours), named_tensors(theirs))


@each_head
def test_fastberts_head_takes_hugging_faces_weights_and_gives_them_back(family: Family, head: str) -> None:
    plain = family.plain(head)
    ours = getattr(fastbert, family.prefix + head)(family.config()).eval()
    assert isinstance(ours, type(plain))
    ours.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(ours.state_dict(), strict=True)
    assert fastbert.explain(ours).fused
    given = family.labelled(head)
    theirs = plain(**given)
    assert abs(ours(**given).loss.item() - theirs.loss.item()) <= 2e-5
    fastbert.unfuse(ours)
    assert [type(module) for module in ours.modules()] == [type(module) for module in plain.modules()]
    assert torch.equal(ours(**given).loss, theirs.loss)


@each_head
def test_which_calls_drop_padding(packed: list[bool], family: Family, head: str) -> None:
    _, fused = family.pair(head)
    labels = family.labelled(head)
    bare = {name: labels[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in labels}
    calls = (bare, labels, family.labelled(head, 0), bare | {"output_hidden_states": True})
    for call, drops in zip(calls, DROPS[family.heads[head]], strict=True):
        if drops is not None:
            packed.clear()
            fused(**call)
            assert any(packed) is drops
    packed.clear()
    fused(**labels, packing=True)
    assert packed == [True]
    packed.clear()
    fused(**labels, packing=False)
    assert not any(packed)


@heads_whose("sequence", "choice", "words", "words and sequence")
def test_rows_that_nothing_reads_are_skipped(monkeypatch: pytest.MonkeyPatch, family: Family, head: str) -> None:
    _, whole = family.pair(head)
    less = fastbert.skip_unread(copy.deepcopy(whole).train())
    given = family.labelled(head)
    wanted = whole.train()(**given)
    rows = Rows(monkeypatch)
    with backend("torch"):  # whose products are there to be watched
        got = less(**given)
    tokens = int(given["attention_mask"].sum())
    if "words" in family.heads[head]:
        assert rows.of(VOCABULARY) == [int((given["labels"] != -100).sum())]
    else:
        assert rows.of(48) == [tokens, given["input_ids"].shape[:-1].numel()]  # its feed-forward products
    monkeypatch.undo()
    assert abs(got.loss.item() - wanted.loss.item()) <= 2e-5
    assert_equal_gradients(loss_gradients(less, got), loss_gradients(whole, wanted))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)


@heads_whose("sequence", "tokens", "words", "words and sequence")
def test_replayed_steps_train_as_eager_does(family: Family, head: str) -> None:
    plain, fused = family.pair(head)
    if family.biases_scores:  # trained, that bias is plain PyTorch's
        for model in (plain, fused):
            model.base_model.encoder.relative_attention_bias.requires_grad_(False)
    plain.train()
    optimizer, step = sgd(plain), rerun_steps(fused.train(), sgd(fused), tokens=(sum(LENGTHS) + 3,))
    for _ in range(3):
        given = family.labelled(head)
        loss = plain(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert abs(step(**given).item() - loss.item()) <= 2e-5
    assert (step.captures, step.replays, step.plain.total()) == (1, 2, 0)
    assert_equals(dict(fused.named_parameters()), dict(plain.named_parameters()))


@each_family
@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
def test_replayed_calls_are_the_models_own(family: Family, head: str) -> None:
    plain, fused = family.pair(head, packing=True)
    graphed = rerun_calls(fused)
    with torch.no_grad():
        for kind in ("ragged", "pad inside", "holes", "full"):
            given = family.batch(kind)
            ours, theirs = named_tensors(graphed(**given)), named_tensors(plain(**given))
            assert_equals(ours, zeroed(plain, theirs, given["attention_mask"]) if head == "Model" else theirs)
    biased = family.biases_scores  # of columns, which have gaps in "holes"
    assert (graphed.captures, graphed.replays, graphed.plain.total()) == (1, 4 - biased, biased)


def test_steps_with_a_bias_of_scores_are_replayed_where_no_column_counts() -> None:
    family = FAMILIES["mpnet"]
    plain, fused = family.pair("ForTokenClassification")
    step = rerun_steps(fused.train(), sgd(fused), tokens=(sum(LENGTHS) + 3,))
    given = family.labelled("ForTokenClassification")
    step(**given)
    fused.base_model.encoder.relative_attention_bias.requires_grad_(False)
    step(**given)
    step(**given)
    mask = given["attention_mask"].clone()
    mask[0, 4:6] = 0
    labels = given["labels"].masked_fill(mask == 0, -100)
    plain.load_state_dict(fused.state_dict())
    loss = plain.train()(**given | {"attention_mask": mask, "labels": labels}).loss
    assert abs(step(**given | {"attention_mask": mask}).item() - loss.item()) <= 2e-5
    assert (step.captures, step.replays) == (1, 1)
    assert step.plain == {
        "encoder.relative_attention_bias is trained, in plain PyTorch, which makes the GPU wait: freeze it "
        "(requires_grad_(False))": 1,
        "padding is not at the end of every row, and the bias of its scores counts columns": 1,
    }


@each_family
def test_replays_take_positions_that_are_given(family: Family) -> None:
    plain, fused = family.pair(packing=True)
    graphed, given = rerun_calls(fused), family.batch("full")
    given["position_ids"] = torch.randint(2, 40, (3, SEQ))
    with torch.no_grad():
        assert_equals(named_tensors(graphed(**given)), named_tensors(plain(**given)))
    assert graphed.replays == 1


def test_the_heads_that_skip_rows_are_those_of_the_table() -> None:
    def names(*kinds: str) -> set[str]:
        return {f.prefix + head for f in FAMILIES.values() for head, kind in f.heads.items() if kind in kinds}

    assert {head.__name__ for head in families.POOLED_HEADS} == names("sequence", "choice")
    assert {head.__name__ for head in families.MASKED_LM_HEADS} == names("words", "words and sequence")

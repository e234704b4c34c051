"""Every family's encoder model beside Hugging Face's eager one and float64, over one table."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from comparison import (
    apart,
    assert_as_good,
    assert_equal_gradients,
    assert_equals,
    gradients,
    named_tensors,
    worst,
    zeroed,
)
from family_table import FAMILIES, LENGTHS, SEQ, Family, each_family
from models import assert_close
from torch.func import functional_call

import fastbert
from fastbert import families

ALL = {"output_hidden_states": True, "output_attentions": True}
KINDS = ["full", "ragged", "left", "holes", "pad inside"]


def bound_by(lengths: list[int]) -> dict[str, Any]:
    """The keywords of a batch that its caller packed."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return {
        "cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max(lengths), "max_length_k": max(lengths),
    }  # fmt: skip


def test_the_table_has_every_family_and_every_head() -> None:
    assert {family.model for family in FAMILIES.values()} == set(families.MODELS)
    names = {family.prefix + head for family in FAMILIES.values() for head in family.heads}
    assert names == {head.__name__ for head in families.HEADS}


@each_family
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_eagers_and_float64s(family: Family, kind: str, packing: bool) -> None:
    plain, fused = family.pair(packing=packing)
    exact = copy.deepcopy(plain).double()
    given = family.batch(kind)
    outputs = [model(**given, **ALL) for model in (fused, plain, exact)]
    assert list(outputs[0].keys()) == list(outputs[1].keys())
    assert type(outputs[0]) is type(outputs[1])
    ours, *others = map(named_tensors, outputs)
    if packing:
        others = [zeroed(m, found, given["attention_mask"]) for m, found in zip((plain, exact), others, strict=True)]
    found = gradients(fused, ours)
    for model, other in zip((plain, exact), others, strict=True):
        assert_equals(ours, other)
        assert_equal_gradients(found, gradients(model, other))
    missing = {name for name, p in plain.named_parameters() if p.grad is None}
    assert missing == {name for name, p in fused.named_parameters() if p.grad is None}


@each_family
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_at_most_twice_eagers_error(family: Family, dtype: torch.dtype) -> None:
    plain = family.plain().to(dtype)
    fused = fastbert.fuse(copy.deepcopy(plain), packing=False)
    exact = copy.deepcopy(plain).double()
    given = family.batch()
    ours, theirs, truth = (named_tensors(model(**given, **ALL)) for model in (fused, plain, exact))
    assert all(x.dtype == theirs[name].dtype for name, x in ours.items())
    assert_as_good(ours, theirs, truth, worst)
    found = [gradients(m, out) for m, out in ((fused, ours), (plain, theirs), (exact, truth))]
    assert_as_good(*found, apart)


@each_family
@pytest.mark.parametrize("kind", KINDS)
def test_by_default_every_row_that_is_handed_out_is_eagers(family: Family, kind: str) -> None:
    plain, fused = family.pair()
    given = family.batch(kind)
    ours, theirs = fused(**given), plain(**given)
    assert_equals(named_tensors(ours), named_tensors(theirs))
    assert ours.keys() == theirs.keys()


@each_family
def test_tuples_have_hugging_faces_order(family: Family) -> None:
    plain, fused = family.pair()
    given = family.batch()
    for asked in ({}, ALL, {"output_attentions": True}):
        ours, theirs = (model(**given, **asked, return_dict=False) for model in (fused, plain))
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert isinstance(a, tuple) == isinstance(b, tuple)
            pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
            for x, y in pairs:
                assert_close(x, y)


@each_family
@pytest.mark.parametrize("kind", ["ragged", "pad inside"])
@pytest.mark.parametrize("words", ["input_ids", "inputs_embeds"])
def test_a_batch_that_its_caller_packed(family: Family, kind: str, words: str) -> None:
    plain, fused = family.pair()
    given = family.batch(kind)
    if words == "inputs_embeds":
        given[words] = plain.get_input_embeddings()(given.pop("input_ids")).detach()
    mask = given.pop("attention_mask").bool()
    packed = {name: value[mask][None] for name, value in given.items()}
    ours = fused(**packed, **bound_by(LENGTHS), output_attentions=True)
    theirs = plain(**given, attention_mask=mask.long(), output_attentions=True)
    assert_close(ours.last_hidden_state[0], theirs.last_hidden_state[mask])
    for a, b in zip(ours.attentions, theirs.attentions, strict=True):
        assert_close(a, b * mask[:, None, :, None])
    weights = torch.randn(int(mask.sum()), 32)
    found = []
    for model, last in ((fused, ours.last_hidden_state[0]), (plain, theirs.last_hidden_state[mask])):
        (last * weights).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_equal_gradients(*found)


@each_family
@pytest.mark.parametrize("packing", [True, False])
def test_vectors_in_the_place_of_ids(family: Family, packing: bool) -> None:
    plain, fused = family.pair(packing=packing)
    given = family.batch()
    mask, shape = given["attention_mask"], given.pop("input_ids").shape
    vectors = torch.randn(*shape, plain.get_input_embeddings().embedding_dim)
    runs = []
    for model in (fused, plain):
        leaf = vectors.clone().requires_grad_()
        out = named_tensors(model(inputs_embeds=leaf, **given, **ALL))
        out = zeroed(plain, out, mask) if packing and model is plain else out
        runs.append((out, gradients(model, out), leaf.grad))
    (ours, found, ours_leaf), (theirs, wanted, theirs_leaf) = runs
    assert_equals(ours, theirs)
    assert_equal_gradients(found, wanted)
    assert (ours_leaf - theirs_leaf).norm() <= 1e-4 * theirs_leaf.norm()


@each_family
@pytest.mark.parametrize("packing", [True, False])
def test_positions_that_are_given(family: Family, packing: bool) -> None:
    plain, fused = family.pair(packing=packing)
    given = family.batch()
    for positions in (torch.randint(2, 40, (3, SEQ)), torch.randint(2, 40, (1, SEQ))):
        ours, theirs = (model(**given, position_ids=positions).last_hidden_state for model in (fused, plain))
        assert_close(ours, theirs * given["attention_mask"][:, :, None] if packing else theirs)
        assert not torch.allclose(theirs, plain(**given).last_hidden_state, atol=1e-2)


@each_family
@pytest.mark.parametrize("packing", [True, False])
def test_a_head_mask_scales_probabilities_and_has_a_gradient(family: Family, packing: bool) -> None:
    """Hugging Face's models know none. Probabilities times a factor give the context of values times that factor."""
    plain, fused = family.pair(packing=packing)
    given = family.batch()
    factors = torch.tensor([[1.0, 0.0, 0.5, 2.0], [0.0, 1.0, 1.5, 1.0]])
    rows = given["attention_mask"][:, :, None]
    weights = torch.randn(*rows.shape[:2], 32) * rows
    found = []
    for model in (fused, plain):
        leaf = factors.clone().requires_grad_()
        if model is fused:
            out = fused(**given, head_mask=leaf, output_attentions=True)
        else:
            parameters = dict(plain.named_parameters())
            for i in range(2):
                value, factor = family.name(family.projections[2], i), leaf[i].repeat_interleave(8)
                parameters[f"{value}.weight"] = parameters[f"{value}.weight"] * factor[:, None]
                parameters[f"{value}.bias"] = parameters[f"{value}.bias"] * factor
            out = functional_call(plain, parameters, (), {**given, "output_attentions": True})
        (out.last_hidden_state * weights).sum().backward()
        found.append((out, leaf.grad))
    (ours, ours_gradient), (theirs, theirs_gradient) = found
    assert_close(ours.last_hidden_state, theirs.last_hidden_state * (rows if packing else 1))
    for factor, a, b in zip(factors, ours.attentions, theirs.attentions, strict=True):
        assert_close(a, b * factor[:, None, None] * (rows[:, None] if packing else 1))
    assert (ours_gradient - theirs_gradient).norm() <= 1e-4 * theirs_gradient.norm()


@each_family
def test_dropout_repeats_with_the_seed(family: Family) -> None:
    _, fused = family.pair(packing=True, dropout=0.3)
    fused.train()
    given = family.batch()

    def run(seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(seed)
        out = fused(**given)
        return out.last_hidden_state.detach(), copy.deepcopy(gradients(fused, named_tensors(out)))

    (first, found), (again, found_again), (other, _) = run(1), run(1), run(2)
    assert torch.equal(first, again)
    assert all(torch.equal(found[name], found_again[name]) for name in found)
    assert not torch.equal(first, other)
    assert not torch.equal(first, fused.eval()(**given).last_hidden_state)


@each_family
def test_state_dicts_load_strictly_both_ways(family: Family) -> None:
    plain, fused = family.pair()
    other = family.plain()
    assert list(fused.state_dict()) == list(plain.state_dict())
    other.load_state_dict(fused.state_dict(), strict=True)
    given = family.batch()
    wanted = plain(**given).last_hidden_state
    assert torch.equal(other(**given).last_hidden_state, wanted)
    ours = getattr(fastbert, family.model.__name__)(family.config()).eval()
    ours.load_state_dict(plain.state_dict(), strict=True)
    assert isinstance(ours, family.model)
    assert_close(ours(**given).last_hidden_state, wanted)


@each_family
def test_what_is_saved_opens_in_both_libraries(family: Family, tmp_path: Path) -> None:
    _, fused = family.pair()
    given = family.batch()
    wanted = fused(**given).last_hidden_state
    fused.save_pretrained(tmp_path)
    ours = getattr(fastbert, family.model.__name__).from_pretrained(tmp_path)
    assert fastbert.explain(ours).fused
    assert torch.equal(ours(**given).last_hidden_state, wanted)
    for kind in (family.model, transformers.AutoModel):
        theirs = kind.from_pretrained(tmp_path, attn_implementation="eager")
        assert type(theirs) is family.model
        assert_close(theirs(**given).last_hidden_state, wanted)


@each_family
def test_copies_and_pickles_compute_the_same(family: Family) -> None:
    _, fused = family.pair(packing=True)
    given = family.batch()
    wanted = fused(**given).last_hidden_state
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(again) is type(fused)
        assert torch.equal(again(**given).last_hidden_state, wanted)
        assert fastbert.explain(again).fused


@each_family
def test_unfuse_gives_hugging_faces_model_back(family: Family) -> None:
    plain, fused = family.pair()
    given = family.batch()
    fused(**given)
    made = getattr(fastbert, family.model.__name__)(family.config()).eval()
    made.load_state_dict(plain.state_dict())
    wanted = named_tensors(plain(**given, **ALL))
    for model in (fused, made):
        assert fastbert.unfuse(model) is model
        assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
        found = named_tensors(model(**given, **ALL))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert {p.untyped_storage().data_ptr() for p in model.parameters()}.__len__() == len([*model.parameters()])


@each_family
def test_explain_and_print_say_that_every_part_is_fused(family: Family) -> None:
    plain, fused = family.pair()
    told = fastbert.explain(fused)
    assert told.fused
    assert str(told).startswith("every part is fused: embeddings and 2 layers")
    assert "fused" in repr(fused)
    assert not fastbert.explain(plain).fused
    assert "is not fused: call fastbert.fuse(model)" in str(fastbert.explain(plain))


@each_family
def test_explain_names_what_is_hooked(family: Family) -> None:
    _, fused = family.pair()
    family.layer(fused, 1).register_forward_hook(lambda *_: None)
    found = [(part.layer, part.reason) for part in fastbert.explain(fused).parts if part.reason]
    assert len(found) == 1
    assert found[0][0] == 1
    assert "with hooks" in str(found[0][1])

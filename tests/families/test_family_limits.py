"""What a family has not, or has its own rule for, in its own words; and what each adds to the kernels, interpreted."""

import copy
import logging
from collections.abc import Iterator

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
from family_table import FAMILIES, SEQ, Family, each_decoding, each_family
from models import assert_close

import fastbert
from fastbert_kernels import backend

ALL = {"output_hidden_states": True, "output_attentions": True}

each_counting = pytest.mark.parametrize(
    "family", [pytest.param(family, id=name) for name, family in FAMILIES.items() if family.counts]
)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the package says, each sentence anew."""
    fastbert.notices.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "fastbert"):
        yield caplog


# How long a text may be.


@each_family
@pytest.mark.parametrize("packing", ["auto", True, False])
def test_the_longest_text(family: Family, packing: bool | str) -> None:
    plain, fused = family.pair(packing=packing)
    longest = 40 - (family.pad + 1 if family.counts else 0)
    words = torch.randint(4, 60, (2, longest + 1))
    assert_close(fused(words[:, 1:]).last_hidden_state, plain(words[:, 1:]).last_hidden_state)
    limit = rf"{longest} tokens: max_position_embeddings=40, and positions begin at {family.pad + 1}"
    limit = limit if family.counts else "the model's max_position_embeddings=40"
    with pytest.raises(ValueError, match=f"sequence length {longest + 1} is over {limit}"):
        fused(words)
    with pytest.raises(ValueError, match=f"sequence length {longest + 1} is over {limit}"):
        fused(words, torch.ones_like(words))
    positions = torch.randint(2, 40, words.shape)
    assert_close(fused(words, position_ids=positions)[0], plain(words, position_ids=positions)[0])


@each_counting
@pytest.mark.parametrize("packing", ["auto", True, False])
def test_padding_is_no_part_of_a_texts_length(family: Family, packing: bool | str) -> None:
    """A batch padded past the longest text, to a multiple of eight for one, is Hugging Face's to take too."""
    plain, fused = family.pair(packing=packing)
    words = torch.randint(4, 60, (2, 40))
    words[:, 38:] = words[1, 30:] = family.pad
    mask = (words != family.pad).long()
    ours, theirs = fused(words, mask), plain(words, mask)
    wanted = named_tensors(theirs)
    assert_equals(named_tensors(ours), zeroed(plain, wanted, mask) if packing is True else wanted)
    assert_close(fused(words, packing=False).last_hidden_state, plain(words).last_hidden_state)
    with pytest.raises(ValueError, match="sequence length 40 is over 38 tokens"):
        fused(inputs_embeds=torch.randn(2, 40, 32))


# Positions.


@each_counting
def test_positions_come_from_ids_and_not_from_the_mask(family: Family) -> None:
    plain, fused = family.pair(packing=True)
    words, mask = torch.randint(4, 60, (2, SEQ)), torch.ones(2, SEQ, dtype=torch.long)
    mask[0, :4] = 0
    ours, theirs = fused(words, mask).last_hidden_state, plain(words, mask).last_hidden_state
    assert_close(ours, theirs * mask[:, :, None])
    counted = mask.cumsum(1) * mask + family.pad
    assert not torch.allclose(theirs[0, 4:], plain(words, mask, position_ids=counted)[0][0, 4:], atol=1e-2)


@each_counting
@pytest.mark.parametrize("packing", [True, False])
def test_the_positions_of_padding_get_no_gradient(family: Family, packing: bool) -> None:
    plain, fused = family.pair(packing=packing)
    given = family.batch("pad inside")
    for model in (plain, fused):
        gradients(model, {"last": model(**given).last_hidden_state * given["attention_mask"][:, :, None]})
        for table in (model.embeddings.position_embeddings, model.embeddings.word_embeddings):
            assert (table.weight.grad[family.pad] == 0).all()
            assert (table.weight.grad[family.pad + 1 :] != 0).any()


# Token types.


@each_counting
def test_a_token_type_that_there_is_not(family: Family) -> None:
    _, fused = family.pair()
    given = family.batch()
    given["token_type_ids"][1, 2] = 1  # as the tokenizer of a BERT marks a pair
    with pytest.raises(IndexError):
        fused(**given)


def test_distilbert_ignores_what_it_has_not_as_hugging_face_does() -> None:
    plain, fused = FAMILIES["distilbert"].pair()
    given = FAMILIES["distilbert"].batch()
    more = {"token_type_ids": torch.ones_like(given["input_ids"]), "encoder_hidden_states": torch.randn(3, 5, 32)}
    ours, theirs = fused(**given, **more), plain(**given, **more)
    assert_equals(named_tensors(ours), named_tensors(theirs))
    assert torch.equal(ours.last_hidden_state, fused(**given).last_hidden_state)


# The order of arguments.


def test_distilberts_third_argument_is_vectors() -> None:
    plain, fused = FAMILIES["distilbert"].pair()
    mask, vectors = FAMILIES["distilbert"].batch()["attention_mask"], torch.randn(3, SEQ, 32)
    assert_close(fused(None, mask, vectors).last_hidden_state, plain(None, mask, vectors).last_hidden_state)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds, got both"):
        fused(mask, mask, mask)


@pytest.mark.parametrize("name", ["roberta", "camembert", "data2vec-text"])
def test_a_multiple_choice_head_takes_token_types_second(name: str) -> None:
    family = FAMILIES[name]
    plain, fused = family.pair("ForMultipleChoice")
    given = family.labelled("ForMultipleChoice")
    arguments = (given["input_ids"], given["token_type_ids"], given["attention_mask"], given["labels"])
    ours, theirs = fused(*arguments), plain(*arguments)
    assert_equals(named_tensors(ours), named_tensors(theirs))
    assert torch.equal(ours.logits, fused(**given).logits)


# Decoders.


@each_decoding
def test_a_decoder_stays_hugging_faces(family: Family, said: pytest.LogCaptureFixture) -> None:
    plain, fused = family.pair(is_decoder=True, add_cross_attention=True)
    assert type(fused) is family.model
    assert "a decoder stays on Hugging Face's own path" in said.text
    given = family.batch() | {"encoder_hidden_states": torch.randn(3, 5, 32)}
    ours, theirs = fused(**given), plain(**given)
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
    assert "a decoder runs on Hugging Face's own path" in str(fastbert.explain(fused))
    made = getattr(fastbert, family.model.__name__)(plain.config).eval()
    made.load_state_dict(plain.state_dict())
    assert torch.equal(made(**given).last_hidden_state, theirs.last_hidden_state)
    assert "it is a decoder (config.is_decoder)" in said.text


@each_decoding
def test_a_causal_head_that_decodes_stays_hugging_faces(family: Family) -> None:
    head = "LMHeadModel" if family.prefix == "Bert" else "ForCausalLM"
    plain, fused = family.pair(head, is_decoder=True)
    given = family.labelled(head)
    ours, theirs = fused(**given), plain(**given)
    assert torch.equal(ours.loss, theirs.loss)
    assert type(fused) is type(plain)


@each_decoding
def test_states_of_another_encoder_take_hugging_faces_path(family: Family, said: pytest.LogCaptureFixture) -> None:
    plain, fused = family.pair()
    given = family.batch() | {"encoder_hidden_states": torch.randn(3, 5, 32)}
    assert_equals(named_tensors(fused(**given)), named_tensors(plain(**given)))
    assert "takes Hugging Face's own path: it was given encoder_hidden_states" in said.text


# What a family adds to the kernels.

ADDS = {
    "roberta": "counted positions",
    "electra, narrow": "narrow embeddings",
    "distilbert": "no token types",
    "mpnet": "a learned bias of attention",
}


@pytest.mark.parametrize("name", ADDS)
def test_interpreted_kernels_take_what_a_family_adds(device: torch.device, name: str) -> None:
    family = FAMILIES[name]
    plain, fused = (model.to(device) for model in family.pair(packing=True))
    exact = copy.deepcopy(plain).double()
    given = {key: value.to(device) for key, value in family.batch("pad inside").items()}
    with backend("triton"):
        ours = named_tensors(fused(**given, **ALL))
        found = gradients(fused, ours)
    for model in (plain, exact):
        theirs = zeroed(
            plain if model is plain else exact, named_tensors(model(**given, **ALL)), given["attention_mask"]
        )
        assert_equals(ours, theirs)
        assert_equal_gradients(found, gradients(model, theirs))


@pytest.mark.slow
@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_interpreted_kernels_are_as_good_as_eager(device: torch.device, family: Family, dtype: torch.dtype) -> None:
    plain = family.plain().to(device, dtype)
    fused = fastbert.fuse(copy.deepcopy(plain), packing=False)
    exact = copy.deepcopy(plain).double()
    given = {key: value.to(device) for key, value in family.batch().items()}
    with backend("triton"):
        ours = named_tensors(fused(**given, **ALL))
        found = gradients(fused, ours)
    theirs, truth = (named_tensors(model(**given, **ALL)) for model in (plain, exact))
    assert_as_good(ours, theirs, truth, worst)
    assert_as_good(found, gradients(plain, theirs), gradients(exact, truth), apart)


@pytest.mark.parametrize("name", ["distilbert", "electra, narrow"])
def test_interpreted_dropout_repeats_and_differs_between_layers(device: torch.device, name: str) -> None:
    family = FAMILIES[name]
    _, fused = family.pair(packing=True, dropout=0.3)
    fused.to(device).train()
    given = {key: value.to(device) for key, value in family.batch().items()}

    def run(seed: int) -> transformers.utils.ModelOutput:
        torch.manual_seed(seed)
        return fused(**given, output_attentions=True)

    with backend("triton"), torch.no_grad():
        first, again, other = run(1), run(1), run(2)
    assert torch.equal(first.last_hidden_state, again.last_hidden_state)
    assert not torch.equal(first.last_hidden_state, other.last_hidden_state)
    assert not torch.equal(first.attentions[0] == 0, first.attentions[1] == 0)

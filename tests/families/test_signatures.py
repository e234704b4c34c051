"""Hugging Face's classes take the arguments that fastbert was written against, and fastbert's take them too."""

import inspect
from typing import Any

import pytest
import transformers
from torch import nn

from fastbert import families
from fastbert.batch.prefix import CACHE
from fastbert.modules.swap import FUSED

_MODEL = "input_ids attention_mask token_type_ids position_ids inputs_embeds"
_CROSS = "encoder_hidden_states encoder_attention_mask"

#: The arguments of each forward, by what a class's name ends with, as transformers 5.24 names them.
WRITTEN_AGAINST = {
    "Embeddings": "input_ids token_type_ids position_ids inputs_embeds cache_length",
    "SelfAttention": "hidden_states attention_mask cache kwargs",
    "SelfOutput": "hidden_states input_tensor",
    "Attention": f"hidden_states attention_mask {_CROSS} cache kwargs",
    "Intermediate": "hidden_states",
    "Output": "hidden_states input_tensor",
    "Layer": f"hidden_states attention_mask {_CROSS} cache kwargs",
    "Encoder": f"hidden_states attention_mask {_CROSS} cache use_cache kwargs",
    "Model": f"{_MODEL} {_CROSS} cache use_cache kwargs",
    "ForMaskedLM": f"{_MODEL} {_CROSS} labels kwargs",
    "ForPreTraining": f"{_MODEL} labels next_sentence_label kwargs",
    "ElectraForMaskedLM": f"{_MODEL} labels kwargs",
    "ElectraForPreTraining": f"{_MODEL} labels kwargs",
    "ForCausalLM": f"{_MODEL} {_CROSS} labels cache use_cache logits_to_keep kwargs",
    "ForTokenClassification": f"{_MODEL} labels kwargs",
    "ForSequenceClassification": f"{_MODEL} labels kwargs",
    "ForNextSentencePrediction": f"{_MODEL} labels kwargs",
    "ForMultipleChoice": f"{_MODEL} labels kwargs",
    **dict.fromkeys(
        ("RobertaForMultipleChoice", "CamembertForMultipleChoice", "Data2VecTextForMultipleChoice"),
        "input_ids token_type_ids attention_mask labels position_ids inputs_embeds kwargs",
    ),
    "ForQuestionAnswering": f"{_MODEL} start_positions end_positions kwargs",
    "LMHeadModel": f"{_MODEL} {_CROSS} labels cache use_cache logits_to_keep kwargs",
}

_TAIL = "output_attentions output_hidden_states return_dict kwargs"
_SHORT = "input_ids attention_mask inputs_embeds"
_MPNET = "input_ids attention_mask position_ids inputs_embeds"

#: The same of the families whose arguments come in another order, by whole names.
WRITTEN_AGAINST |= {
    "DistilBertSelfAttention": "hidden_states attention_mask kwargs",
    "FFN": "input",
    "TransformerBlock": "hidden_states attention_mask kwargs",
    "Transformer": "hidden_states attention_mask kwargs",
    "DistilBertModel": f"{_SHORT} position_ids kwargs",
    **{f"DistilBertFor{task}": f"{_SHORT} labels position_ids kwargs" for task in (
        "MaskedLM", "SequenceClassification", "MultipleChoice", "TokenClassification")},
    "DistilBertForQuestionAnswering": f"{_SHORT} start_positions end_positions position_ids kwargs",
    "MPNetEmbeddings": "input_ids position_ids inputs_embeds kwargs",
    **{f"MPNet{part}": "hidden_states attention_mask position_bias output_attentions kwargs" for part in (
        "SelfAttention", "Attention", "Layer")},
    "MPNetEncoder": f"hidden_states attention_mask {_TAIL}",
    "MPNetModel": f"{_MPNET} {_TAIL}",
    **{f"MPNetFor{task}": f"{_MPNET} labels {_TAIL}" for task in (
        "MaskedLM", "SequenceClassification", "MultipleChoice", "TokenClassification")},
    "MPNetForQuestionAnswering": f"{_MPNET} start_positions end_positions {_TAIL}",
}  # fmt: skip

#: What transformers 5.24 renamed, and the names before it.
BEFORE_5_24 = {"cache": "past_key_values", "cache_length": "past_key_values_length"}


def written_against(kind: type[nn.Module]) -> list[str]:
    """The arguments of a class of Hugging Face's, as the installed transformers should name them."""
    ending = max(filter(kind.__name__.endswith, WRITTEN_AGAINST), key=len)
    names = WRITTEN_AGAINST[ending].split()
    if kind.__name__ == "Embeddings":  # DistilBERT's
        names = ["input_ids", "inputs_embeds", "position_ids"]
    return names if CACHE == "cache" else [BEFORE_5_24.get(name, name) for name in names]


def arguments(kind: type[Any]) -> list[str]:
    return list(inspect.signature(kind.forward).parameters)[1:]


@pytest.mark.parametrize("theirs", FUSED, ids=lambda kind: kind.__name__)
def test_hugging_faces_class_takes_what_fastbert_was_written_against(theirs: type[nn.Module]) -> None:
    known, found = written_against(theirs), arguments(theirs)
    new, gone = [n for n in found if n not in known], [n for n in known if n not in found]
    assert found == known, (
        f"transformers {transformers.__version__} changed {theirs.__name__}.forward: new {new}, gone {gone}. Let "
        f"{FUSED[theirs].__name__} take them, then change the table here"
    )


@pytest.mark.parametrize("theirs", FUSED, ids=lambda kind: kind.__name__)
def test_fastberts_class_takes_the_same_by_place_and_by_every_name(theirs: type[nn.Module]) -> None:
    ours = inspect.signature(FUSED[theirs].forward)
    names = [name for name in written_against(theirs) if name != "kwargs"]
    by_place = ours.bind("self", *names).arguments
    assert all(by_place.get(name, name) == name for name in names)
    ours.bind("self", **dict.fromkeys(names))
    if theirs not in families.HEADS:  # whose arguments are Hugging Face's own, and go on to the encoder model
        for renamed in (BEFORE_5_24, {old: new for new, old in BEFORE_5_24.items()}):
            ours.bind("self", **dict.fromkeys(renamed.get(name, name) for name in names))

"""One file a family of encoders: Hugging Face's classes, each beside the fused module that it is."""

from typing import Any

from fastbert.modules.embeddings import table_rows
from fastbert.modules.heads import FusedHead, FusedMaskedLM
from fastbert.modules.model import EncoderModel
from fastbert.modules.swap import FUSED

from . import bert as bert
from . import camembert as camembert
from . import data2vec_text as data2vec_text
from . import distilbert as distilbert
from . import electra as electra
from . import mpnet as mpnet
from . import roberta as roberta
from . import xlm_roberta as xlm_roberta

#: Hugging Face's encoder models that have a family here.
MODELS: tuple[type[Any], ...] = tuple(theirs for theirs, ours in FUSED.items() if issubclass(ours, EncoderModel))

#: What configurations call the families: Hugging Face's `model_type` -> the encoder model.
MODEL_TYPES: dict[str, type[Any]] = {theirs.config_class.model_type: theirs for theirs in MODELS}

#: Hugging Face's heads on them -> ours.
HEADS: dict[type[Any], type[FusedHead]] = {
    theirs: ours for theirs, ours in FUSED.items() if issubclass(ours, FusedHead)
}

#: Those that read the pooled output only; and those for masked language modelling, whose loss reads labelled rows only.
POOLED_HEADS = tuple(theirs for theirs, ours in HEADS.items() if ours.reads == "pooled")
MASKED_LM_HEADS = tuple(theirs for theirs, ours in HEADS.items() if issubclass(ours, FusedMaskedLM))


def longest_text(model: Any) -> int:
    """Tokens in the longest text that one of these encoder models takes, fused or Hugging Face's."""
    kind: Any = FUSED.get(type(model.embeddings), type(model.embeddings))
    first = kind.first_position(model.embeddings) if hasattr(kind, "first_position") else 0
    return table_rows(model.embeddings) - first


def head_of(model: type[Any], ending: str) -> type[Any]:
    """Hugging Face's head on one of these encoder models whose name ends so, as "ForSequenceClassification" does."""
    return next(head for head in HEADS if head.config_class is model.config_class and head.__name__.endswith(ending))


def intermediate_size(config: Any) -> int:
    """The width of the feed-forward block of one of these encoder models."""
    return config.intermediate_size if hasattr(config, "intermediate_size") else config.hidden_dim


def activation_name(config: Any) -> str:
    """What transformers calls the activation of one of these encoder models."""
    return config.hidden_act if hasattr(config, "hidden_act") else config.activation

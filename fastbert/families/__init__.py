"""One file a family of encoders: Hugging Face's classes, each beside the fused module that it is."""

from typing import Any

from fastbert.modules.heads import FusedHead, FusedMaskedLM
from fastbert.modules.model import EncoderModel
from fastbert.modules.swap import FUSED

from . import bert as bert

#: Hugging Face's encoder models that have a family here.
MODELS: tuple[type[Any], ...] = tuple(theirs for theirs, ours in FUSED.items() if issubclass(ours, EncoderModel))

#: Hugging Face's heads on them -> ours.
HEADS: dict[type[Any], type[FusedHead]] = {
    theirs: ours for theirs, ours in FUSED.items() if issubclass(ours, FusedHead)
}

#: Those that read the pooled output only; and those for masked language modelling, whose loss reads labelled rows only.
POOLED_HEADS = tuple(theirs for theirs, ours in HEADS.items() if ours.reads == "pooled")
MASKED_LM_HEADS = tuple(theirs for theirs, ours in HEADS.items() if issubclass(ours, FusedMaskedLM))

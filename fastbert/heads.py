"""Hugging Face's heads on the fused `BertModel`."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import CrossEntropyLoss
from transformers import BertConfig
from transformers.models.bert import modeling_bert as hf

from .modeling import BertModel, eager_semantics, own_config
from .modules import fuse_modules
from .notices import say_once

#: What `read_rows` of a head for masked language modelling may be.
MASKED_LM_ROWS = ("all", "labelled")


class FusedHead:
    """A Hugging Face head whose `bert` is fused."""

    bert: hf.BertModel

    def __init__(self, config: BertConfig) -> None:
        super().__init__(own_config(config))  # type: ignore[call-arg]
        self.bert.__class__ = BertModel
        fuse_modules(self.bert)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        return eager_semantics(attn_implementation)


def _of_labelled_rows(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A masked language model's forward that, as `read_rows` asks, gives its head only what has a label."""
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.read_rows not in MASKED_LM_ROWS:
            raise ValueError(f"unknown read_rows {self.read_rows!r}: a head takes one of {', '.join(MASKED_LM_ROWS)}")
        if "all" in (self.read_rows, kwargs.get("read_rows")) or not self.training:
            return forward(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            _say_compiled()
            return forward(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        labels, words = given.get("labels"), given.get("input_ids")
        if labels is None:
            return forward(self, *args, **kwargs)
        words = given.get("inputs_embeds") if words is None else words
        if words is not None and labels.shape != words.shape[:2]:
            raise ValueError(
                f"labels must be (batch, seq) = {tuple(words.shape[:2])} like the input, got {tuple(labels.shape)}"
            )
        labelled = labels != CrossEntropyLoss().ignore_index
        more = {**given.pop("kwargs", {}), "labels": labels[labelled], "labelled": labelled}
        return forward(**given | more)

    return wrapped


@torch.compiler.assume_constant_result
def _say_compiled() -> None:
    say_once("fastbert: a compiled head computes every row, labelled or not: no graph depends on how many there are")


class FusedMaskedLM(FusedHead):
    """A head for masked language modelling, whose loss reads labelled rows only."""

    #: Which rows the head computes in training: "all", or "labelled", those whose label is not -100. The logits are
    #: then (labelled rows, vocabulary), in the order of the batch. `fastbert.skip_unread` sets it.
    read_rows: str = "all"


class BertForPreTraining(FusedMaskedLM, hf.BertForPreTraining):
    """Hugging Face's `BertForPreTraining` on the fused `BertModel`."""

    forward = _of_labelled_rows(hf.BertForPreTraining.forward)


class BertLMHeadModel(FusedHead, hf.BertLMHeadModel):
    """Hugging Face's `BertLMHeadModel` on the fused `BertModel`; as a decoder, Hugging Face's own path."""


class BertForMaskedLM(FusedMaskedLM, hf.BertForMaskedLM):
    """Hugging Face's `BertForMaskedLM` on the fused `BertModel`."""

    forward = _of_labelled_rows(hf.BertForMaskedLM.forward)


class BertForNextSentencePrediction(FusedHead, hf.BertForNextSentencePrediction):
    """Hugging Face's `BertForNextSentencePrediction` on the fused `BertModel`."""


class BertForSequenceClassification(FusedHead, hf.BertForSequenceClassification):
    """Hugging Face's `BertForSequenceClassification` on the fused `BertModel`."""


class BertForMultipleChoice(FusedHead, hf.BertForMultipleChoice):
    """Hugging Face's `BertForMultipleChoice` on the fused `BertModel`."""


class BertForTokenClassification(FusedHead, hf.BertForTokenClassification):
    """Hugging Face's `BertForTokenClassification` on the fused `BertModel`."""


class BertForQuestionAnswering(FusedHead, hf.BertForQuestionAnswering):
    """Hugging Face's `BertForQuestionAnswering` on the fused `BertModel`."""

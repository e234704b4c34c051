"""Hugging Face's heads on a fused encoder model."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastbert.batch.batch import UNLABELLED
from fastbert.notices import say_once, warn_once

from .call import Plan
from .model import EncoderModel
from .strangers import why_mixes
from .swap import FUSED, eager_semantics, fuse_modules, hugging_face_class, is_patched, own_config

#: What `read_rows` of a head for masked language modelling may be.
MASKED_LM_ROWS = ("all", "labelled")


class FusedHead(nn.Module):
    """A Hugging Face head whose encoder model is fused."""

    #: What of the encoder's output the head reads, one of `packing.READS`: "labelled" where its loss does.
    reads = "all"
    #: The labels of each token, and of each sequence, of heads whose loss is a mean over labels other than -100.
    token_labels: tuple[str, ...] = ()
    sequence_labels: tuple[str, ...] = ()
    #: Whether `config.problem_type` chooses the loss.
    loss_by_problem_type = False

    base_model: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(own_config(config), *args, **kwargs)
        encoder = self.base_model
        encoder.__class__ = FUSED[type(encoder)]
        fuse_modules(encoder)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__bases__:
            if base.__module__.startswith("transformers."):
                cls.forward = _unless_patched(cls._around(base.forward))  # type: ignore[attr-defined]

    def why_mixes(self) -> str | None:
        """Why what is made of a row of the encoder's output may depend on others: a module that is not Hugging Face's
        own, untouched and unwatched."""
        encoder = self.base_model
        for name, part in self.named_children():
            why = None if part is encoder or type(part) is nn.CrossEntropyLoss else why_mixes(part)
            if why is not None:
                return f"{name} ({why}) may read them"
        return None

    def what_is_read(self) -> str:
        """What of the encoder's output is read now, one of `packing.READS`."""
        return "all" if self.reads == "labelled" and self.why_mixes() is not None else self.reads

    @classmethod
    def _around(cls, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Hugging Face's forward, in which the encoder is told what is read of its output."""
        return _tells_what_is_read(forward)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        return eager_semantics(attn_implementation)


def _unless_patched(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A head's forward, unless someone replaced that of Hugging Face's class."""

    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_patched(self):
            return hugging_face_class(type(self)).forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        return forward(self, *args, **kwargs)

    return wrapped


def _tells_what_is_read(forward: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        reads = "all" if torch.compiler.is_compiling() else self.what_is_read()
        if reads == "all":
            return forward(self, *args, **kwargs)
        plan = kwargs.get("plan") or Plan()
        labels = plan.labels
        if labels is None and reads == "labelled":
            given = signature.bind_partial(self, *args, **kwargs).arguments if args else kwargs
            labels = given.get("labels")
        return forward(self, *args, **kwargs | {"plan": replace(plan, reads=reads, labels=labels)})

    return wrapped


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
        why = self.why_mixes()
        if why is not None:
            warn_once(f"fastbert: {type(self).__name__} computes every row, labelled or not: {why}")
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
        labelled = labels != UNLABELLED
        others = given.pop("kwargs", {})
        plan = others.get("plan") or Plan()
        more = {**others, "labels": labels[labelled], "plan": replace(plan, labelled=labelled, labels=labels)}
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

    reads = "labelled"
    token_labels = ("labels",)

    @classmethod
    def _around(cls, forward: Callable[..., Any]) -> Callable[..., Any]:
        return _of_labelled_rows(_tells_what_is_read(forward))


class FusedQuestionAnswering(FusedHead):
    """A head for extractive question answering, whose softmax runs over all positions. Where padding is dropped by
    choice (`packing=True`), no answer starts or ends there: its logits are the lowest."""

    @classmethod
    def _around(cls, forward: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(forward)

        @functools.wraps(forward)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            packing = kwargs.get("packing", getattr(self.base_model, "packing", False))
            given = signature.bind(self, *args, **kwargs).arguments
            mask = given.get("attention_mask")
            if packing is not True or mask is None or mask.dim() != 2 or not isinstance(self.base_model, EncoderModel):
                return forward(self, *args, **kwargs)
            starts, ends = given.pop("start_positions", None), given.pop("end_positions", None)
            others = given.pop("kwargs", {})
            as_dict = others.pop("return_dict", getattr(self.config, "return_dict", True))
            output = forward(**given, **others, return_dict=True)
            mask = mask[:, mask.shape[1] - output.start_logits.shape[1] :]  # without a prefix
            lowest = torch.finfo(output.start_logits.dtype).min
            output.start_logits = output.start_logits.masked_fill(mask == 0, lowest)
            output.end_logits = output.end_logits.masked_fill(mask == 0, lowest)
            if starts is not None and ends is not None:
                losses = _position_loss(output.start_logits, starts), _position_loss(output.end_logits, ends)
                output = type(output)(loss=sum(losses) / 2, **output)
            return output if as_dict else output.to_tuple()

        return wrapped


class FusedSequenceClassification(FusedHead):
    """A head that classifies each sequence by its pooled output, or by its first row."""

    reads = "pooled"
    sequence_labels = ("labels",)
    loss_by_problem_type = True


class FusedMultipleChoice(FusedHead):
    """A head that compares the pooled outputs, or first rows, of several sequences."""

    reads = "pooled"


class FusedTokenClassification(FusedHead):
    """A head that classifies each token."""

    reads = "labelled"
    token_labels = ("labels",)


def _position_loss(logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Hugging Face's: positions (batch,) or (batch, 1) past the end are left out."""
    positions = positions.squeeze(-1) if positions.dim() > 1 else positions
    return F.cross_entropy(logits, positions.clamp(0, logits.shape[1]), ignore_index=logits.shape[1])

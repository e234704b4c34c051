"""Hugging Face's auto classes, whose models come fused."""

from typing import Any

import transformers

from .fusing import fuse


class _Fused:
    """An auto class of Hugging Face's, whose models pass through `fastbert.fuse`."""

    @classmethod
    def from_pretrained(cls, *args: Any, packing: bool | str = "auto", **kwargs: Any) -> Any:
        """Hugging Face's `from_pretrained`, fused.

        Args:
            packing: as `fastbert.fuse` takes it.

        Raises:
            ValueError: for an architecture of no family that fastbert has; the message lists those.
        """
        return fuse(super().from_pretrained(*args, **kwargs), packing)  # type: ignore[misc]

    @classmethod
    def from_config(cls, *args: Any, packing: bool | str = "auto", **kwargs: Any) -> Any:
        """Hugging Face's `from_config`, fused; the same of what it takes and raises."""
        return fuse(super().from_config(*args, **kwargs), packing)  # type: ignore[misc]


class AutoModel(_Fused, transformers.AutoModel): ...


class AutoModelForPreTraining(_Fused, transformers.AutoModelForPreTraining): ...


class AutoModelForMaskedLM(_Fused, transformers.AutoModelForMaskedLM): ...


class AutoModelForSequenceClassification(_Fused, transformers.AutoModelForSequenceClassification): ...


class AutoModelForTokenClassification(_Fused, transformers.AutoModelForTokenClassification): ...


class AutoModelForQuestionAnswering(_Fused, transformers.AutoModelForQuestionAnswering): ...


class AutoModelForMultipleChoice(_Fused, transformers.AutoModelForMultipleChoice): ...


class AutoModelForNextSentencePrediction(_Fused, transformers.AutoModelForNextSentencePrediction): ...

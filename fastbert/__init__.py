"""A drop-in Hugging Face `BertModel` on fused Triton kernels, forward and backward, attentions included."""

from importlib.metadata import version

from .fusing import Explanation, explain, fuse, unfuse
from .modeling import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
)

__version__ = version("fastbert")

__all__ = [
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertLMHeadModel",
    "BertModel",
    "Explanation",
    "explain",
    "fuse",
    "unfuse",
]

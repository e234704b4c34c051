"""ELECTRA: BERT's layers, without a pooler, on embeddings that may be narrower."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.electra import modeling_electra as hf

from fastbert.modules.add_norm import FusedAddNorm
from fastbert.modules.attention import FusedSelfAttention
from fastbert.modules.embeddings import FusedEmbeddings
from fastbert.modules.encoder import FusedEncoder
from fastbert.modules.feed_forward import FusedIntermediate
from fastbert.modules.heads import (
    FusedHead,
    FusedMaskedLM,
    FusedQuestionAnswering,
    FusedSequenceClassification,
    FusedTokenClassification,
)
from fastbert.modules.layer import FusedAttention, FusedLayer
from fastbert.modules.model import EncoderModel
from fastbert.modules.swap import register


class ElectraEmbeddings(FusedEmbeddings, hf.ElectraEmbeddings): ...


class ElectraSelfAttention(FusedSelfAttention, hf.ElectraSelfAttention): ...


class ElectraSelfOutput(FusedAddNorm, hf.ElectraSelfOutput): ...


class ElectraAttention(FusedAttention, hf.ElectraAttention): ...


class ElectraIntermediate(FusedIntermediate, hf.ElectraIntermediate): ...


class ElectraOutput(FusedAddNorm, hf.ElectraOutput): ...


class ElectraLayer(FusedLayer, hf.ElectraLayer): ...


class ElectraEncoder(FusedEncoder, hf.ElectraEncoder): ...


class ElectraModel(EncoderModel, hf.ElectraModel):
    output_class = BaseModelOutputWithPastAndCrossAttentions

    def embed(self, words: Mapping[str, torch.Tensor | None], seed: torch.Tensor | None = None) -> torch.Tensor:
        narrow = self._modules.get("embeddings_project")
        embedded = super().embed(words, seed)
        return embedded if narrow is None else narrow(embedded)

    def named_before_layers(self) -> list[tuple[str, nn.Module]]:
        narrow = self._modules.get("embeddings_project")
        before = super().named_before_layers()
        return before if narrow is None else [*before, ("embeddings_project", narrow)]


class ElectraForMaskedLM(FusedMaskedLM, hf.ElectraForMaskedLM): ...


class ElectraForCausalLM(FusedHead, hf.ElectraForCausalLM): ...


class ElectraForSequenceClassification(FusedSequenceClassification, hf.ElectraForSequenceClassification): ...


class ElectraForMultipleChoice(FusedHead, hf.ElectraForMultipleChoice):
    """Its summary of a sequence is the configuration's to choose, so every row may be read."""


class ElectraForTokenClassification(FusedTokenClassification, hf.ElectraForTokenClassification): ...


class ElectraForQuestionAnswering(FusedQuestionAnswering, hf.ElectraForQuestionAnswering): ...


class ElectraForPreTraining(FusedHead, hf.ElectraForPreTraining): ...


register(__name__)

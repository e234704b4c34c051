"""BERT: the family that the modules are written after."""

from transformers.models.bert import modeling_bert as hf

from fastbert.modules.add_norm import FusedAddNorm
from fastbert.modules.attention import FusedSelfAttention
from fastbert.modules.embeddings import FusedEmbeddings
from fastbert.modules.encoder import FusedEncoder
from fastbert.modules.feed_forward import FusedIntermediate
from fastbert.modules.heads import (
    FusedHead,
    FusedMaskedLM,
    FusedMultipleChoice,
    FusedQuestionAnswering,
    FusedSequenceClassification,
    FusedTokenClassification,
)
from fastbert.modules.layer import FusedAttention, FusedLayer
from fastbert.modules.model import EncoderModel
from fastbert.modules.swap import register


class BertEmbeddings(FusedEmbeddings, hf.BertEmbeddings): ...


class BertSelfAttention(FusedSelfAttention, hf.BertSelfAttention): ...


class BertSelfOutput(FusedAddNorm, hf.BertSelfOutput): ...


class BertAttention(FusedAttention, hf.BertAttention): ...


class BertIntermediate(FusedIntermediate, hf.BertIntermediate): ...


class BertOutput(FusedAddNorm, hf.BertOutput): ...


class BertLayer(FusedLayer, hf.BertLayer): ...


class BertEncoder(FusedEncoder, hf.BertEncoder): ...


class BertModel(EncoderModel, hf.BertModel): ...


class BertForMaskedLM(FusedMaskedLM, hf.BertForMaskedLM): ...


class BertLMHeadModel(FusedHead, hf.BertLMHeadModel): ...


class BertForSequenceClassification(FusedSequenceClassification, hf.BertForSequenceClassification): ...


class BertForMultipleChoice(FusedMultipleChoice, hf.BertForMultipleChoice): ...


class BertForTokenClassification(FusedTokenClassification, hf.BertForTokenClassification): ...


class BertForQuestionAnswering(FusedQuestionAnswering, hf.BertForQuestionAnswering): ...


class BertForPreTraining(FusedMaskedLM, hf.BertForPreTraining):
    sequence_labels = ("next_sentence_label",)


class BertForNextSentencePrediction(FusedHead, hf.BertForNextSentencePrediction):
    reads = "pooled"
    sequence_labels = ("labels",)


register(__name__)

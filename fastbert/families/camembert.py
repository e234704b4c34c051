"""CamemBERT: BERT's layers; positions count the ids that are not padding."""

from transformers.models.camembert import modeling_camembert as hf

from fastbert.modules.add_norm import FusedAddNorm
from fastbert.modules.attention import FusedSelfAttention
from fastbert.modules.embeddings import CountedPositions
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


class CamembertEmbeddings(CountedPositions, hf.CamembertEmbeddings): ...


class CamembertSelfAttention(FusedSelfAttention, hf.CamembertSelfAttention): ...


class CamembertSelfOutput(FusedAddNorm, hf.CamembertSelfOutput): ...


class CamembertAttention(FusedAttention, hf.CamembertAttention): ...


class CamembertIntermediate(FusedIntermediate, hf.CamembertIntermediate): ...


class CamembertOutput(FusedAddNorm, hf.CamembertOutput): ...


class CamembertLayer(FusedLayer, hf.CamembertLayer): ...


class CamembertEncoder(FusedEncoder, hf.CamembertEncoder): ...


class CamembertModel(EncoderModel, hf.CamembertModel): ...


class CamembertForMaskedLM(FusedMaskedLM, hf.CamembertForMaskedLM): ...


class CamembertForCausalLM(FusedHead, hf.CamembertForCausalLM): ...


class CamembertForSequenceClassification(FusedSequenceClassification, hf.CamembertForSequenceClassification): ...


class CamembertForMultipleChoice(FusedMultipleChoice, hf.CamembertForMultipleChoice): ...


class CamembertForTokenClassification(FusedTokenClassification, hf.CamembertForTokenClassification): ...


class CamembertForQuestionAnswering(FusedQuestionAnswering, hf.CamembertForQuestionAnswering): ...


register(__name__)

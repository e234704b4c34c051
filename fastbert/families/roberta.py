"""RoBERTa: BERT's layers; positions count the ids that are not padding."""

from transformers.models.roberta import modeling_roberta as hf

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


class RobertaEmbeddings(CountedPositions, hf.RobertaEmbeddings): ...


class RobertaSelfAttention(FusedSelfAttention, hf.RobertaSelfAttention): ...


class RobertaSelfOutput(FusedAddNorm, hf.RobertaSelfOutput): ...


class RobertaAttention(FusedAttention, hf.RobertaAttention): ...


class RobertaIntermediate(FusedIntermediate, hf.RobertaIntermediate): ...


class RobertaOutput(FusedAddNorm, hf.RobertaOutput): ...


class RobertaLayer(FusedLayer, hf.RobertaLayer): ...


class RobertaEncoder(FusedEncoder, hf.RobertaEncoder): ...


class RobertaModel(EncoderModel, hf.RobertaModel): ...


class RobertaForMaskedLM(FusedMaskedLM, hf.RobertaForMaskedLM): ...


class RobertaForCausalLM(FusedHead, hf.RobertaForCausalLM): ...


class RobertaForSequenceClassification(FusedSequenceClassification, hf.RobertaForSequenceClassification): ...


class RobertaForMultipleChoice(FusedMultipleChoice, hf.RobertaForMultipleChoice): ...


class RobertaForTokenClassification(FusedTokenClassification, hf.RobertaForTokenClassification): ...


class RobertaForQuestionAnswering(FusedQuestionAnswering, hf.RobertaForQuestionAnswering): ...


register(__name__)

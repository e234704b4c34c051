"""XLM-RoBERTa: BERT's layers; positions count the ids that are not padding."""

from transformers.models.xlm_roberta import modeling_xlm_roberta as hf

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


class XLMRobertaEmbeddings(CountedPositions, hf.XLMRobertaEmbeddings): ...


class XLMRobertaSelfAttention(FusedSelfAttention, hf.XLMRobertaSelfAttention): ...


class XLMRobertaSelfOutput(FusedAddNorm, hf.XLMRobertaSelfOutput): ...


class XLMRobertaAttention(FusedAttention, hf.XLMRobertaAttention): ...


class XLMRobertaIntermediate(FusedIntermediate, hf.XLMRobertaIntermediate): ...


class XLMRobertaOutput(FusedAddNorm, hf.XLMRobertaOutput): ...


class XLMRobertaLayer(FusedLayer, hf.XLMRobertaLayer): ...


class XLMRobertaEncoder(FusedEncoder, hf.XLMRobertaEncoder): ...


class XLMRobertaModel(EncoderModel, hf.XLMRobertaModel): ...


class XLMRobertaForMaskedLM(FusedMaskedLM, hf.XLMRobertaForMaskedLM): ...


class XLMRobertaForCausalLM(FusedHead, hf.XLMRobertaForCausalLM): ...


class XLMRobertaForSequenceClassification(FusedSequenceClassification, hf.XLMRobertaForSequenceClassification): ...


class XLMRobertaForMultipleChoice(FusedMultipleChoice, hf.XLMRobertaForMultipleChoice): ...


class XLMRobertaForTokenClassification(FusedTokenClassification, hf.XLMRobertaForTokenClassification): ...


class XLMRobertaForQuestionAnswering(FusedQuestionAnswering, hf.XLMRobertaForQuestionAnswering): ...


register(__name__)

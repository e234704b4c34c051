"""data2vec's text encoder: BERT's layers; positions count the ids that are not padding."""

from transformers.models.data2vec import modeling_data2vec_text as hf

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


class Data2VecTextEmbeddings(CountedPositions, hf.Data2VecTextEmbeddings): ...


class Data2VecTextSelfAttention(FusedSelfAttention, hf.Data2VecTextSelfAttention): ...


class Data2VecTextSelfOutput(FusedAddNorm, hf.Data2VecTextSelfOutput): ...


class Data2VecTextAttention(FusedAttention, hf.Data2VecTextAttention): ...


class Data2VecTextIntermediate(FusedIntermediate, hf.Data2VecTextIntermediate): ...


class Data2VecTextOutput(FusedAddNorm, hf.Data2VecTextOutput): ...


class Data2VecTextLayer(FusedLayer, hf.Data2VecTextLayer): ...


class Data2VecTextEncoder(FusedEncoder, hf.Data2VecTextEncoder): ...


class Data2VecTextModel(EncoderModel, hf.Data2VecTextModel): ...


class Data2VecTextForMaskedLM(FusedMaskedLM, hf.Data2VecTextForMaskedLM): ...


class Data2VecTextForCausalLM(FusedHead, hf.Data2VecTextForCausalLM): ...


class Data2VecTextForSequenceClassification(FusedSequenceClassification, hf.Data2VecTextForSequenceClassification): ...


class Data2VecTextForMultipleChoice(FusedMultipleChoice, hf.Data2VecTextForMultipleChoice): ...


class Data2VecTextForTokenClassification(FusedTokenClassification, hf.Data2VecTextForTokenClassification): ...


class Data2VecTextForQuestionAnswering(FusedQuestionAnswering, hf.Data2VecTextForQuestionAnswering): ...


register(__name__)

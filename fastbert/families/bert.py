"""BERT: the family that the modules are written after."""

from transformers.models.bert import modeling_bert as hf

from fastbert.modules.add_norm import FusedAddNorm
from fastbert.modules.attention import FusedSelfAttention
from fastbert.modules.embeddings import FusedEmbeddings
from fastbert.modules.encoder import FusedEncoder
from fastbert.modules.feed_forward import FusedIntermediate
from fastbert.modules.heads import FusedHead, FusedMaskedLM, FusedQuestionAnswering
from fastbert.modules.layer import FusedAttention, FusedLayer
from fastbert.modules.model import EncoderModel
from fastbert.modules.swap import register


class BertEmbeddings(FusedEmbeddings, hf.BertEmbeddings):
    """`FusedEmbeddings`."""


class BertSelfAttention(FusedSelfAttention, hf.BertSelfAttention):
    """`FusedSelfAttention`."""


class BertSelfOutput(FusedAddNorm, hf.BertSelfOutput):
    """`FusedAddNorm` of the attention block."""


class BertAttention(FusedAttention, hf.BertAttention):
    """`FusedAttention`."""


class BertIntermediate(FusedIntermediate, hf.BertIntermediate):
    """`FusedIntermediate`."""


class BertOutput(FusedAddNorm, hf.BertOutput):
    """`FusedAddNorm` of the feed-forward block."""


class BertLayer(FusedLayer, hf.BertLayer):
    """`FusedLayer`."""


class BertEncoder(FusedEncoder, hf.BertEncoder):
    """`FusedEncoder`."""


class BertModel(EncoderModel, hf.BertModel):
    """Hugging Face's `BertModel` on fused kernels: same parameters, same call, same outputs."""


register(
    BertEmbeddings, BertSelfAttention, BertSelfOutput, BertAttention, BertIntermediate, BertOutput, BertLayer,
    BertEncoder, BertModel,
)  # fmt: skip


class BertForPreTraining(FusedMaskedLM, hf.BertForPreTraining):
    """Hugging Face's `BertForPreTraining` on the fused `BertModel`."""

    token_labels, sequence_labels = ("labels",), ("next_sentence_label",)


class BertLMHeadModel(FusedHead, hf.BertLMHeadModel):
    """Hugging Face's `BertLMHeadModel` on the fused `BertModel`; as a decoder, Hugging Face's own path."""


class BertForMaskedLM(FusedMaskedLM, hf.BertForMaskedLM):
    """Hugging Face's `BertForMaskedLM` on the fused `BertModel`."""

    token_labels = ("labels",)


class BertForNextSentencePrediction(FusedHead, hf.BertForNextSentencePrediction):
    """Hugging Face's `BertForNextSentencePrediction` on the fused `BertModel`."""

    reads = "pooled"
    sequence_labels = ("labels",)


class BertForSequenceClassification(FusedHead, hf.BertForSequenceClassification):
    """Hugging Face's `BertForSequenceClassification` on the fused `BertModel`."""

    reads = "pooled"
    sequence_labels = ("labels",)
    loss_by_problem_type = True


class BertForMultipleChoice(FusedHead, hf.BertForMultipleChoice):
    """Hugging Face's `BertForMultipleChoice` on the fused `BertModel`."""

    reads = "pooled"


class BertForTokenClassification(FusedHead, hf.BertForTokenClassification):
    """Hugging Face's `BertForTokenClassification` on the fused `BertModel`."""

    reads = "labelled"
    token_labels = ("labels",)


class BertForQuestionAnswering(FusedQuestionAnswering, hf.BertForQuestionAnswering):
    """Hugging Face's `BertForQuestionAnswering` on the fused `BertModel`."""


register(
    BertForMaskedLM, BertForPreTraining, BertForTokenClassification, BertForSequenceClassification,
    BertForNextSentencePrediction, BertForMultipleChoice, BertForQuestionAnswering, BertLMHeadModel,
)  # fmt: skip

"""DistilBERT: BERT's layer in modules of its own; no token types, no pooler, no dropout after the attention."""

from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.distilbert import modeling_distilbert as hf

from fastbert.batch.attend import Attend
from fastbert.modules.add_norm import add_norm_arguments
from fastbert.modules.attention import MapSlot
from fastbert.modules.embeddings import FusedEmbeddings
from fastbert.modules.encoder import FusedEncoder
from fastbert.modules.feed_forward import KERNEL_ACTIVATIONS, FusedIntermediate
from fastbert.modules.heads import (
    FusedMaskedLM,
    FusedMultipleChoice,
    FusedQuestionAnswering,
    FusedSequenceClassification,
    FusedTokenClassification,
)
from fastbert.modules.inner_output import InnerOutput, add_norm_anyhow, attend_and_norm, attention_arguments
from fastbert.modules.layer import FusedLayer
from fastbert.modules.model import NOT_EVERYWHERE, EncoderModel
from fastbert.modules.qkv import project
from fastbert.modules.readable import is_called
from fastbert.modules.strangers import takes_ours
from fastbert.modules.swap import register
from fastbert_kernels import bias_activation


class Embeddings(FusedEmbeddings, hf.Embeddings):
    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        *,
        seed: torch.Tensor | None = None,
        **ignored: Any,
    ) -> torch.Tensor:
        return super().forward(input_ids, None, position_ids, inputs_embeds, seed=seed)

    def _hugging_faces(self, input_ids: Any, _: Any, position_ids: Any, inputs_embeds: Any, __: int) -> torch.Tensor:
        return hf.Embeddings.forward(self, input_ids, inputs_embeds, position_ids)


class DistilBertSelfAttention(InnerOutput, hf.DistilBertSelfAttention):
    projections = ("q_lin", "k_lin", "v_lin")
    output_projection = "out_lin"
    is_decoder = False
    num_attention_heads = property(lambda self: self.n_heads)
    all_head_size = property(lambda self: self.n_heads * self.attention_head_size)

    def _hugging_faces(self, hidden: Any, mask: Any, _: Any, /, **kwargs: Any) -> Any:
        return hf.DistilBertSelfAttention.forward(self, hidden, mask, **kwargs)


class FFN(FusedIntermediate, hf.FFN):
    """Hugging Face's forward; a layer reads the first product and the activation as those of `FusedIntermediate`."""

    dense = property(lambda self: self.lin1)
    intermediate_act_fn = property(lambda self: self.activation)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # as Hugging Face calls it
        return hf.FFN.forward(self, input)


class TransformerBlock(FusedLayer, hf.TransformerBlock):
    is_decoder = False
    dropout_stream = 0

    def attention_arguments(self) -> dict[str, Any] | None:
        return attention_arguments(self.attention, None, self.sa_layer_norm, 0)

    def feed_forward_arguments(self) -> dict[str, Any] | None:
        ffn: Any = self.ffn
        first = ffn.block_arguments() if takes_ours(ffn) else None
        if first is None or self.calls_chunks():
            return None
        second = add_norm_arguments(ffn.lin2, ffn.dropout, self.output_layer_norm, self.dropout_stream)
        return None if second is None else first | second

    def calls_chunks(self) -> bool:
        ffn: Any = self.ffn
        return not takes_ours(ffn) or is_called(ffn) or ffn.chunk_size_feed_forward > 0 or "ff_chunk" in ffn.__dict__

    def _hugging_faces(self, hidden: Any, mask: Any, _: Any, __: Any, ___: Any, /, **kwargs: Any) -> Any:
        return hf.TransformerBlock.forward(self, hidden, mask, **kwargs)

    def _attend(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        attend: Attend,
        head_mask: torch.Tensor | None,
        map_slot: MapSlot | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        attended, _ = attend_and_norm(
            self.attention, None, self.sa_layer_norm, 0, hidden, mask, attend, head_mask, map_slot, kwargs
        )
        return attended

    def _feed_forward(self, attended: torch.Tensor, seed: torch.Tensor | None, readable: bool) -> torch.Tensor:
        done = self.feed_forward_by_block(attended, seed) if readable else None
        if done is not None:
            return done
        ffn: Any = self.ffn
        if self.calls_chunks() or ffn.unfused_reason() is not None:
            return add_norm_anyhow(ffn(attended), None, attended, None, self.output_layer_norm, None, 0)
        x, bias = project(ffn.lin1, attended)
        x, bias = project(ffn.lin2, bias_activation(x, bias, KERNEL_ACTIVATIONS[type(ffn.activation)]))
        return add_norm_anyhow(x, bias, attended, ffn.dropout, self.output_layer_norm, seed, self.dropout_stream)


class Transformer(FusedEncoder, hf.Transformer): ...


class DistilBertModel(EncoderModel, hf.DistilBertModel):
    encoder_name = "transformer"
    layer_parts = ("attention", "sa_layer_norm", "ffn", "output_layer_norm")
    output_class = BaseModelOutput
    encoder = property(lambda self: self._modules["transformer"])

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """`EncoderModel.forward`, in Hugging Face's order; what DistilBERT has not is ignored, as there."""
        for name in NOT_EVERYWHERE:
            kwargs.pop(name, None)
        return super().forward(
            input_ids, attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )


class DistilBertForMaskedLM(FusedMaskedLM, hf.DistilBertForMaskedLM): ...


class DistilBertForSequenceClassification(FusedSequenceClassification, hf.DistilBertForSequenceClassification): ...


class DistilBertForMultipleChoice(FusedMultipleChoice, hf.DistilBertForMultipleChoice): ...


class DistilBertForTokenClassification(FusedTokenClassification, hf.DistilBertForTokenClassification): ...


class DistilBertForQuestionAnswering(FusedQuestionAnswering, hf.DistilBertForQuestionAnswering): ...


register(__name__)

"""MPNet: BERT's layer, whose attention holds its output product and adds a learned bias of relative positions, the same
in every layer; RoBERTa's positions; no token types."""

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.mpnet import modeling_mpnet as hf

from fastbert.batch.attend import Attend
from fastbert.modules.add_norm import FusedAddNorm
from fastbert.modules.attention import MapSlot, leave_foreign_map, mask_like
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
from fastbert.modules.inner_output import InnerOutput, attend_and_norm, attention_arguments
from fastbert.modules.layer import FusedLayer, refuse_packed
from fastbert.modules.model import NOT_EVERYWHERE, EncoderModel
from fastbert.modules.readable import fused_repr, is_called, norm_reason
from fastbert.modules.strangers import takes_ours
from fastbert.modules.swap import is_ours, register
from fastbert.notices import warn_once
from fastbert_kernels import uses_triton


class MPNetEmbeddings(CountedPositions, hf.MPNetEmbeddings):
    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        *,
        seed: torch.Tensor | None = None,
        **ignored: Any,
    ) -> torch.Tensor:
        return super().forward(input_ids, None, position_ids, inputs_embeds, seed=seed)

    def _hugging_faces(self, input_ids: Any, _: Any, position_ids: Any, inputs_embeds: Any, __: int) -> torch.Tensor:
        return hf.MPNetEmbeddings.forward(self, input_ids, position_ids, inputs_embeds)


class MPNetSelfAttention(InnerOutput, hf.MPNetSelfAttention):
    """Called without `attend`, as Hugging Face's layer does, it is Hugging Face's, which takes the position bias."""

    projections = ("q", "k", "v")
    output_projection = "o"
    is_decoder = is_causal = False
    scaling = property(lambda self: self.attention_head_size**-0.5)

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        output_attentions: bool = False,
        *,
        attend: Attend | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ...]:
        if attend is None:
            return hf.MPNetSelfAttention.forward(self, hidden_states, attention_mask, position_bias, output_attentions)
        x, probs = super().forward(hidden_states, attention_mask, attend=attend, **kwargs)
        return (x,) if probs is None else (x, probs)

    def _hugging_faces(self, hidden: Any, mask: Any, _: Any, /, **kwargs: Any) -> Any:
        return hf.MPNetSelfAttention.forward(self, hidden, mask, output_attentions=True)


class MPNetAttention(hf.MPNetAttention):
    """Self-attention and its norm; called without `attend`, Hugging Face's."""

    dropout_stream = 0

    def unfused_reason(self) -> str | None:
        return norm_reason(self.LayerNorm, self.dropout)

    def note(self) -> str | None:
        return None

    def extra_repr(self) -> str:
        return fused_repr(self)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        output_attentions: bool = False,
        *,
        attend: Attend | None = None,
        head_mask: torch.Tensor | None = None,
        map_slot: MapSlot | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ...]:
        if attend is None:
            return super().forward(hidden_states, attention_mask, position_bias, output_attentions)
        attended, probs = attend_and_norm(
            self.attn, self.dropout, self.LayerNorm, self.dropout_stream,
            hidden_states, attention_mask, attend, head_mask, map_slot, kwargs,
        )  # fmt: skip
        return (attended,) if probs is None else (attended, probs)


class MPNetIntermediate(FusedIntermediate, hf.MPNetIntermediate): ...


class MPNetOutput(FusedAddNorm, hf.MPNetOutput): ...


class MPNetLayer(FusedLayer, hf.MPNetLayer):
    is_decoder = False
    chunk_size_feed_forward = 0

    def attention_arguments(self) -> dict[str, Any] | None:
        outer = self.attention
        if not is_ours(outer) or is_called(outer):
            return None
        return attention_arguments(outer.attn, outer.dropout, outer.LayerNorm, outer.dropout_stream)

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        output_attentions: bool = False,
        *,
        attend: Attend | None = None,
        map_slot: MapSlot | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        """`FusedLayer.forward`, whose mask has the position bias in it, as a tuple: with the map where one is asked
        for. Without `attend`, Hugging Face's."""
        if attend is None:
            return hf.MPNetLayer.forward(self, hidden_states, attention_mask, position_bias, output_attentions)
        hidden = super().forward(hidden_states, attention_mask, attend=attend, map_slot=map_slot, **kwargs)
        return (hidden,) if map_slot is None else (hidden, map_slot.probs)

    def _attend(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        attend: Attend,
        head_mask: torch.Tensor | None,
        map_slot: MapSlot | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        if takes_ours(self.attention):
            return self.attention(hidden, mask, attend=attend, head_mask=head_mask, map_slot=map_slot, **kwargs)[0]
        refuse_packed(self.attention, attend, head_mask)
        attended, *maps = self.attention(hidden, mask_like(mask, hidden), output_attentions=map_slot is not None)
        leave_foreign_map(map_slot, maps[0] if maps else None)
        return attended


class MPNetEncoder(FusedEncoder, hf.MPNetEncoder):
    relative_attention_bias: Any

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        attend: Attend | None = None,
        **kwargs: Any,
    ) -> Any:
        """`FusedEncoder.forward`, which adds the position bias to the mask."""
        if attend is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        bias = self.relative_bias(hidden_states, attend)
        if bias.requires_grad and uses_triton(hidden_states):
            warn_once(
                "fastbert: MPNet's attention runs in plain PyTorch while its position bias is trained: freeze "
                "encoder.relative_attention_bias (requires_grad_(False)) to train the rest on the kernels"
            )
        if attention_mask is not None:
            bias, attend = bias + attention_mask, replace(attend, key_spans=None)
        return super().forward(hidden_states, bias, attend=attend, **kwargs)

    def relative_bias(self, hidden: torch.Tensor, attend: Attend) -> torch.Tensor:
        """The position bias of a batch: float32 (1, heads, longest, longest), or (batch, ...) of packed tokens whose
        columns have gaps, which count."""
        longest = hidden.shape[1] if attend.max_seqlen is None else attend.max_seqlen
        places = torch.arange(longest, device=hidden.device)[None]
        if attend.map_columns is not None and attend.cu_seqlens is not None:
            tokens = (attend.cu_seqlens[:-1, None] + places).clamp(max=max(0, hidden.shape[1] - 1))
            places = attend.map_columns[tokens].long()
        buckets = hf.MPNetEncoder.relative_position_bucket(places[:, None, :] - places[:, :, None])
        return self.relative_attention_bias(buckets).permute(0, 3, 1, 2).float()


#: What a head was given and hands to its encoder model, though Hugging Face's forward does not.
_HANDED_ON: ContextVar[tuple[nn.Module, dict[str, Any]] | None] = ContextVar("fastbert_mpnet", default=None)


class MPNetModel(EncoderModel, hf.MPNetModel):
    layer_parts = ("attention.attn", "attention", "intermediate", "output")
    output_class = BaseModelOutputWithPooling
    score_bias = property(lambda self: self.encoder.relative_attention_bias)

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | int | list[int] | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """`EncoderModel.forward`, in Hugging Face's order; what MPNet has not is ignored, as there."""
        handed = None if torch.compiler.is_compiling() else _HANDED_ON.get()
        if handed is not None and handed[0] is self:
            kwargs = handed[1] | kwargs
        for name in NOT_EVERYWHERE:
            kwargs.pop(name, None)
        return super().forward(
            input_ids, attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict,
            **kwargs,
        )  # fmt: skip

    @staticmethod
    def as_tuple(output: Any) -> tuple[Any, ...]:
        """With a place for the pooled output, whether there is one or not: heads count on it."""
        more = [output[name] for name in ("hidden_states", "attentions") if name in output]
        return output.last_hidden_state, output.pooler_output, *more


class _HandsOn(FusedHead):
    """A head that hands keywords on to its encoder model, which Hugging Face's forward of it drops."""

    @classmethod
    def _around(cls, forward: Callable[..., Any]) -> Callable[..., Any]:
        known = inspect.signature(forward).parameters

        @functools.wraps(forward)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            more = {name: kwargs.pop(name) for name in [*kwargs] if name not in known}
            if not more or torch.compiler.is_compiling():
                return forward(self, *args, **kwargs)
            token = _HANDED_ON.set((self.base_model, more))
            try:
                return forward(self, *args, **kwargs)
            finally:
                _HANDED_ON.reset(token)

        return super()._around(wrapped)


class MPNetForMaskedLM(_HandsOn, FusedMaskedLM, hf.MPNetForMaskedLM): ...


class MPNetForSequenceClassification(_HandsOn, FusedSequenceClassification, hf.MPNetForSequenceClassification): ...


class MPNetForMultipleChoice(_HandsOn, FusedMultipleChoice, hf.MPNetForMultipleChoice): ...


class MPNetForTokenClassification(_HandsOn, FusedTokenClassification, hf.MPNetForTokenClassification): ...


class MPNetForQuestionAnswering(_HandsOn, FusedQuestionAnswering, hf.MPNetForQuestionAnswering): ...


register(__name__)

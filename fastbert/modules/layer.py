"""One encoder layer: a single step of autograd where every module in it can be read, else its blocks and modules."""

from typing import Any

import torch
from torch import nn

from fastbert.batch.attend import Attend
from fastbert.batch.prefix import CACHE, either
from fastbert_kernels import (
    AttentionArguments,
    FeedForwardArguments,
    attention_block,
    feed_forward_block,
    feed_forward_is_fused,
    layer_block,
    runs_as_block,
)
from fastbert_kernels.attention_map import HandOut

from .attention import MapSlot, hand_out_of, leave_foreign_map, leave_map, mask_like, wants_map
from .dropout import seed_for
from .look import block_arguments, chunk_is_replaced, look_at
from .readable import is_called, is_capturing
from .strangers import takes_ours
from .swap import is_ours, is_patched


def _attends_as_block(hidden: torch.Tensor, attend: Attend) -> bool:
    """Whether a block with the attention in it may run on these hidden states: no block knows a prefix."""
    return runs_as_block(hidden) and attend.fits_block and not is_capturing()


def _is_trained(mask: torch.Tensor | None) -> bool:
    """Whether a mask has a learned bias in it that wants a gradient, which no block gives."""
    return mask is not None and mask.requires_grad and torch.is_grad_enabled()


def _attention_arguments(
    block: dict[str, Any],
    hidden: torch.Tensor,
    mask: torch.Tensor | None,
    attend: Attend,
    head_mask: torch.Tensor | None,
    wants_map: bool,
    hand_out: HandOut | None,
) -> AttentionArguments:
    """The attention block's arguments from its modules' and from those of `FusedSelfAttention.forward`."""
    seq = hidden.shape[1]
    return AttentionArguments(
        **block,
        cu_seqlens=attend.cu_seqlens,
        max_seqlen=seq if attend.max_seqlen is None else attend.max_seqlen,
        mask=mask,
        head_mask=head_mask,
        probs_seq=attend.map_side(seq) if wants_map else None,
        columns=attend.map_columns if wants_map else None,
        order=attend.order,
        key_spans=attend.key_spans,
        seed=seed_for(attend.seed, max(block["dropout_p"], block["hidden_dropout_p"]), hidden),
        hand_out=hand_out,
    )


def _feed_forward_arguments(
    block: dict[str, Any], hidden: torch.Tensor, seed: torch.Tensor | None
) -> FeedForwardArguments:
    fused = block["up_bias"] is not None and feed_forward_is_fused(hidden, block["up_weight"], block["activation"])
    return FeedForwardArguments(**block, fused=fused, seed=seed_for(seed, block["hidden_dropout_p"], hidden))


def refuse_packed(module: nn.Module, attend: Attend, head_mask: torch.Tensor | None) -> None:
    if attend.cu_seqlens is not None or head_mask is not None:
        raise ValueError(
            f"{type(module).__name__} is not fastbert's and knows neither packed sequences nor head_mask: pass a "
            "padded batch, and leave head_mask out"
        )


def call_output(output: Any, x: torch.Tensor, residual: torch.Tensor, seed: torch.Tensor | None) -> torch.Tensor:
    """A block's output module, ours or someone else's, which knows no seed."""
    return output(x, residual, seed) if takes_ours(output) else output(x, residual)


class FusedAttention(nn.Module):
    """Self-attention and its output, sharing the forward pass's seed."""

    self: Any
    output: Any
    is_cross_attention: bool

    def block_arguments(self) -> dict[str, Any] | None:
        """What a block needs of this module; None where the module has to be called itself."""
        if not is_ours(self) or is_called(self) or self.is_cross_attention:
            return None
        return block_arguments(self.self, self.output)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        attend: Attend | None = None,
        head_mask: torch.Tensor | None = None,
        map_slot: MapSlot | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The block's hidden states and its map or None; the arguments are those of `FusedSelfAttention.forward`."""
        cache = either(cache, past_key_values)
        if self.is_cross_attention or args or is_patched(self):
            named = {} if cache is None else {CACHE: cache}
            return super().forward(hidden_states, attention_mask, *args, **named, **kwargs)
        attend = attend or Attend.of_keywords(kwargs)
        if not takes_ours(self.self):
            refuse_packed(self.self, attend, head_mask)
            context, probs = self.self(
                hidden_states, attention_mask=mask_like(attention_mask, hidden_states), **{CACHE: cache}, **kwargs
            )
            leave_foreign_map(map_slot, probs)
            return call_output(self.output, context, hidden_states, attend.seed), probs
        if _attends_as_block(hidden_states, attend) and cache is None and not _is_trained(attention_mask):
            block = block_arguments(self.self, self.output)
            if block is not None:
                wanted, hand_out = wants_map(map_slot, kwargs), hand_out_of(map_slot)
                hidden, probs = attention_block(
                    hidden_states,
                    _attention_arguments(block, hidden_states, attention_mask, attend, head_mask, wanted, hand_out),
                )
                leave_map(map_slot, probs)
                return hidden, probs
        context, probs = self.self(
            hidden_states, attention_mask, cache, attend=attend, head_mask=head_mask, map_slot=map_slot, **kwargs
        )
        residual = hidden_states if attend.first is None else attend.first.take(hidden_states)
        return call_output(self.output, context, residual, attend.seed), probs


class FusedLayer(nn.Module):
    """One encoder layer. Returns the hidden states alone, as Hugging Face's does."""

    attention: Any
    intermediate: Any
    output: Any
    is_decoder: bool
    chunk_size_feed_forward: int
    seq_len_dim: int
    feed_forward_chunk: Any

    def attention_arguments(self) -> dict[str, Any] | None:
        """What the attention block needs of its modules; None where one has to be called itself."""
        return block_arguments(self.attention)

    def feed_forward_arguments(self) -> dict[str, Any] | None:
        """What the feed-forward block needs of its modules; None where one has to be called itself."""
        return block_arguments(self.intermediate, self.output)

    def calls_chunks(self) -> bool:
        """Whether the feed-forward half runs in chunks, or as a function that someone put in the place of Hugging
        Face's."""
        return self.chunk_size_feed_forward > 0 or chunk_is_replaced(self)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        *,
        attend: Attend | None = None,
        head_mask: torch.Tensor | None = None,
        map_slot: MapSlot | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One layer on (batch, seq, hidden), or packed (1, tokens, hidden). The other arguments are those of
        `FusedSelfAttention.forward`; a decoder's go to Hugging Face's own."""
        cache = either(cache, past_key_values)
        if self.is_decoder or cache is not None or is_patched(self):
            return self._hugging_faces(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, cache, **kwargs
            )
        attend = attend or Attend.of_keywords(kwargs)
        look = look_at(self) if runs_as_block(hidden_states) and not is_capturing() else None
        if look is not None and look.whole and attend.fits_block and not _is_trained(attention_mask):
            block, wanted, hand_out = look.attention, map_slot is not None, hand_out_of(map_slot)
            hidden, probs = layer_block(
                hidden_states,
                _attention_arguments(block, hidden_states, attention_mask, attend, head_mask, wanted, hand_out),
                _feed_forward_arguments(look.feed_forward, hidden_states, attend.seed),
            )
            leave_map(map_slot, probs)
            return hidden
        attended = self._attend(hidden_states, attention_mask, attend, head_mask, map_slot, kwargs)
        return self._feed_forward(attended, attend.seed, not attend.by_modules)

    def _hugging_faces(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, other: Any, other_mask: Any, cache: Any, /, **kwargs: Any
    ) -> Any:
        """Hugging Face's own forward; `other` is what a decoder looks at."""
        return super().forward(hidden, mask, other, other_mask, **{CACHE: cache}, **kwargs)

    def _attend(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        attend: Attend,
        head_mask: torch.Tensor | None,
        map_slot: MapSlot | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """The attention half, by its modules."""
        if takes_ours(self.attention):
            attended, _ = self.attention(hidden, mask, attend=attend, head_mask=head_mask, map_slot=map_slot, **kwargs)
            return attended
        refuse_packed(self.attention, attend, head_mask)
        attended, probs = self.attention(hidden, mask_like(mask, hidden), **{CACHE: None}, **kwargs)
        leave_foreign_map(map_slot, probs)
        return attended

    def _feed_forward(self, attended: torch.Tensor, seed: torch.Tensor | None, readable: bool) -> torch.Tensor:
        if self.chunk_size_feed_forward > 0:
            # Every chunk draws a seed of its own, or all would drop the same elements.
            chunks = attended.split(self.chunk_size_feed_forward, dim=self.seq_len_dim)
            return torch.cat([self.feed_forward_chunk(chunk) for chunk in chunks], dim=self.seq_len_dim)
        if chunk_is_replaced(self):
            return self.feed_forward_chunk(attended)
        done = self.feed_forward_by_block(attended, seed) if readable else None
        return call_output(self.output, self.intermediate(attended), attended, seed) if done is None else done

    def feed_forward_by_block(self, attended: torch.Tensor, seed: torch.Tensor | None) -> torch.Tensor | None:
        """The feed-forward half as one step, where its modules can be read."""
        block = self.feed_forward_arguments() if runs_as_block(attended) else None
        return None if block is None else feed_forward_block(attended, _feed_forward_arguments(block, attended, seed))

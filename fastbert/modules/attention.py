"""Self-attention: one product for query, key and value, then one kernel."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastbert.batch.attend import Attend
from fastbert.batch.first_tokens import FirstTokens
from fastbert.batch.prefix import Prefix, either
from fastbert_kernels import attention
from fastbert_kernels.attention_arguments import MAX_HEAD_DIM
from fastbert_kernels.attention_map import HandOut, handed_out
from fastbert_kernels.backend import is_traced
from fastbert_kernels.stacked import ContextUse

from .dropout import seed_for
from .qkv import (
    APART,
    can_be_neighbours,
    can_stack,
    in_own_storage,
    made_one,
    project_qkv,
    project_together,
    qkv_parameters,
    rehome,
    separate,
)
from .readable import (
    PATCHED,
    called,
    foreign_hooks,
    fused_repr,
    is_called,
    is_capturing,
    is_plain_dropout,
    leave,
    not_plain,
)
from .swap import is_ours, is_patched


class MapSlot:
    """Where a layer leaves its attention map. Not a container: wrappers that move or cast arguments rebuild those.

    Attributes:
        probs: the map as it is handed out to the model's caller.
        hand_out: what makes that of the layer's probabilities.
    """

    probs: torch.Tensor | None = None

    def __init__(self, hand_out: HandOut | None = None) -> None:
        self.hand_out = hand_out


def leave_map(slot: MapSlot | None, probs: torch.Tensor | None) -> None:
    """Leave a map that was handed out."""
    if slot is not None and slot.probs is None:  # a checkpointed layer comes here twice
        slot.probs = probs


def leave_foreign_map(slot: MapSlot | None, probs: torch.Tensor | None) -> None:
    """Leave a map of attention that is not ours, whose context is made already."""
    if slot is not None and probs is not None:
        leave_map(slot, handed_out(probs, slot.hand_out)[0])


def hand_out_of(slot: MapSlot | None, prefix: Prefix | None = None) -> HandOut | None:
    """How a map is handed out: as the slot says, without the rows of a prefix."""
    hand_out = None if slot is None else slot.hand_out
    return hand_out if prefix is None else prefix.hand_out_map(hand_out)


def mask_like(mask: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor | None:
    """An additive mask as Hugging Face's own attention takes it: in the dtype of the scores, finite."""
    return None if mask is None else mask.clamp(min=torch.finfo(hidden.dtype).min).to(hidden.dtype)


def wants_map(slot: MapSlot | None, kwargs: dict[str, Any]) -> bool:
    """Whether a map is asked for: by the encoder, by Hugging Face's keyword where a module is called on its own, or by
    Hugging Face's own path, which records what modules return."""
    return slot is not None or bool(kwargs.get("output_attentions")) or is_capturing()


class FusedSelfAttention(nn.Module):
    """One product for query, key and value, then one attention kernel that reads its result in place."""

    #: What the projections are called.
    projections = ("query", "key", "value")

    dropout: Any
    num_attention_heads: int
    attention_head_size: int
    all_head_size: int
    scaling: float
    is_decoder: bool
    is_causal: bool
    layer_idx: int
    dropout_stream = 0
    #: Given the projections (tokens, 3, heads, head_dim), cu_seqlens, max_seqlen and the mask of every forward pass,
    #: while `distill.capture` looks on. A hook would cost the batch its packing.
    watcher: Callable[[torch.Tensor, torch.Tensor | None, int, torch.Tensor | None], None] | None = None

    def unfused_reason(self) -> str | None:
        if is_patched(self):
            return PATCHED
        if self.is_decoder or self.is_causal:
            return "causal attention is Hugging Face's own path"
        if self.attention_head_size > MAX_HEAD_DIM:
            return f"head_dim {self.attention_head_size} is over the kernels' {MAX_HEAD_DIM}"
        return None if is_plain_dropout(self.dropout) else not_plain("dropout", self.dropout, nn.Dropout)

    def extra_repr(self) -> str:
        return fused_repr(self)

    def note(self) -> str | None:
        linears = self.linears()
        if can_stack(*linears):
            if torch.compiler.is_compiling():  # a graph stacks copies, wherever the parameters lie
                return None
            groups = qkv_parameters(*linears)
            return None if all(parts[0].is_meta or can_be_neighbours(parts) for parts in groups) else APART
        return called(**dict(zip(self.projections, linears, strict=True)))

    def linears(self) -> tuple[Any, Any, Any]:
        """The three projections."""
        found = self._modules  # a module's attributes are looked up slowly; a function may stand in a module's place
        query, key, value = [found[name] if name in found else getattr(self, name) for name in self.projections]
        return query, key, value

    def rehome(self) -> None:
        """Put the three projections' parameters next to each other."""
        if can_stack(*self.linears()):
            for parts in qkv_parameters(*self.linears()):
                rehome(parts)

    def separate(self) -> None:
        """Give the three projections' parameters storages of their own again."""
        if can_stack(*self.linears()):
            for parts in qkv_parameters(*self.linears()):
                separate(parts)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Every module's, but each projection in a storage of its own: what saves a model may keep one tensor a
        storage, as accelerate does, or refuse to save a part of one, as safetensors does."""
        state = super().state_dict(*args, **kwargs)
        if not kwargs.get("keep_vars"):
            for name, value in state.items():
                if name.startswith(kwargs.get("prefix", "")) and isinstance(value, torch.Tensor):
                    state[name] = in_own_storage(value)
        return state

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        *,
        attend: Attend | None = None,
        head_mask: torch.Tensor | None = None,
        map_slot: MapSlot | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of each sequence with itself.

        Args:
            hidden_states: (batch, seq, hidden), or packed (1, tokens, hidden).
            attention_mask: additive or bool (batch | 1, heads | 1, seq | 1, seq); None when packed.
            attend: how the tokens lie. Without, as Hugging Face's keywords `cu_seq_lens_q` and `max_length_q` say.
            head_mask: (heads,).
            map_slot: where to leave the probabilities too: nothing between here and the encoder returns them.

        Returns:
            The context, like hidden_states, and, where they are wanted, the probabilities (batch, heads, map_seq,
            map_seq), else None.
        """
        attend = attend or Attend.of_keywords(kwargs)
        reason, cache = self.unfused_reason(), either(cache, past_key_values)
        if reason is None and cache is not None:
            reason = "a cache is Hugging Face's own path"
        if reason is not None:
            leave(self, reason)
            if attend.cu_seqlens is not None or head_mask is not None:
                raise ValueError(
                    f"unfused attention ({reason}) knows neither packed sequences nor head_mask: pass a padded batch, "
                    "and leave head_mask out"
                )
            attention_mask = mask_like(attention_mask, hidden_states)
            context, probs = self._hugging_faces(hidden_states, attention_mask, cache, **kwargs)
            leave_foreign_map(map_slot, probs)
            return context, probs
        context, probs = self.contexts(hidden_states, attention_mask, attend, head_mask, map_slot, kwargs)
        return self.output_product(context), probs

    def _hugging_faces(self, hidden: torch.Tensor, mask: torch.Tensor | None, cache: Any, /, **kwargs: Any) -> Any:
        """Hugging Face's own forward."""
        return super().forward(hidden, mask, cache, **kwargs)

    def output_product(self, context: torch.Tensor) -> torch.Tensor:
        """What a family's attention does with the context before it returns it."""
        return context

    def contexts(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attend: Attend,
        head_mask: torch.Tensor | None,
        map_slot: MapSlot | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`forward` where it is fused, without the output product."""
        if attend.first is not None:
            return self._attend_first(hidden_states, attention_mask, head_mask, attend.first), None
        batch, seq = hidden_states.shape[:2]
        wanted = wants_map(map_slot, kwargs) or foreign_hooks(self)  # Hugging Face's returns a map in any case
        use = ContextUse() if wanted and torch.is_grad_enabled() and not is_traced() else None
        qkv = project_qkv(*self.linears(), hidden_states, use)
        if torch.compiler.is_compiling():
            qkv = qkv.view(-1)  # or a graph is guarded by the number of tokens
        qkv = qkv.view(batch * seq, 3, self.num_attention_heads, self.attention_head_size)
        hand_out = hand_out_of(map_slot, attend.prefix)
        context, probs = self._attend(qkv, seq, attention_mask, attend, head_mask, wanted, hand_out)
        leave_map(map_slot, probs)
        if use is not None:
            use.watch(context)
        return context.reshape(batch, seq, self.all_head_size), probs

    def _attend(
        self,
        qkv: torch.Tensor,
        seq: int,
        bias: torch.Tensor | None,
        attend: Attend,
        head_mask: torch.Tensor | None,
        wants_map: bool,
        hand_out: HandOut | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The context (tokens, heads, head_dim) and the map of projections (tokens, 3, heads, head_dim)."""
        max_seqlen = seq if attend.max_seqlen is None else attend.max_seqlen
        if self.watcher is not None:
            self.watcher(qkv, attend.cu_seqlens, max_seqlen, bias)
        prefix = attend.prefix
        if prefix is not None:
            qkv = prefix.prepend(qkv, self.layer_idx)
        dropout_p = self.dropout.p if self.training else 0.0
        context, probs = attention(
            qkv,
            attend.cu_seqlens,
            max_seqlen,
            bias=bias,
            head_mask=head_mask,
            scale=self.scaling,
            dropout_p=dropout_p,
            seed=seed_for(attend.seed, dropout_p, qkv),
            stream=self.dropout_stream,
            probs_seq=attend.map_side(seq) if wants_map else None,
            columns=attend.map_columns if wants_map else None,
            order=attend.order,
            key_spans=attend.key_spans,
            hand_out=hand_out,
        )
        if prefix is not None:
            context = context.index_select(0, prefix.token_rows)
        return context, probs

    def block_arguments(self) -> dict[str, Any] | None:
        """What a block needs of this module; None where the module has to be called itself."""
        dropout: Any
        linears, dropout = self.linears(), self._modules.get("dropout")
        if not is_ours(self) or is_called(self) or self.watcher is not None or self.scaling <= 0.0:
            return None
        if self.unfused_reason() is not None or not can_stack(*linears):
            return None
        weights, *biases = qkv_parameters(*linears)
        weight, bias = made_one(weights), made_one(biases[0]) if biases else None
        if weight is None or (biases and bias is None):
            return None
        return {
            "qkv_weight": weight,
            "qkv_bias": bias,
            "qkv_parameters": weights + (biases[0] if biases else (None, None, None)),
            "heads": self.num_attention_heads,
            "scale": self.scaling,
            "dropout_p": dropout.p if self.training else 0.0,
            "stream": self.dropout_stream,
        }

    def _attend_first(
        self, hidden: torch.Tensor, bias: torch.Tensor | None, head_mask: torch.Tensor | None, first: FirstTokens
    ) -> torch.Tensor:
        """The context of the first tokens, as `first.take` leaves them."""
        project_query, *rest = self.linears()
        pair = project_together(tuple(rest), hidden)
        query = project_query(first.take(hidden))
        size = (self.num_attention_heads, self.attention_head_size)
        dropout_p = self.dropout.p if self.training else 0.0
        context = first.attend(
            query.view(first.batch, *size), pair.view(-1, 2, *size), bias, head_mask, self.scaling, dropout_p
        )
        return context.reshape(query.shape)


def self_attention(layer: Any) -> tuple[str, FusedSelfAttention] | None:
    """A layer's self-attention, if it is ours, behind its name in the layer."""
    outer = layer._modules.get("attention")
    if isinstance(outer, FusedSelfAttention):
        return "attention", outer
    for name, inner in () if outer is None else outer._modules.items():
        if isinstance(inner, FusedSelfAttention):
            return f"attention.{name}", inner
    return None


def attends_fused(layer: Any) -> bool:
    """Whether a layer's attention runs on the kernel, which packed sequences need."""
    found = self_attention(layer)
    return found is not None and found[1].unfused_reason() is None

"""The attention half of a layer whose attention holds its output product, as DistilBERT's and MPNet's do."""

from typing import Any

import torch
from torch import nn

from fastbert.batch.attend import Attend

from .add_norm import add_norm, add_norm_arguments
from .attention import FusedSelfAttention, MapSlot, leave_foreign_map, mask_like
from .layer import refuse_packed
from .qkv import project
from .readable import called, is_called, norm_reason
from .strangers import takes_ours


class InnerOutput(FusedSelfAttention):
    """`FusedSelfAttention` whose forward ends with its output product."""

    #: What the output product is called.
    output_projection: str

    def output_linear(self) -> Any:
        return getattr(self, self.output_projection)

    def output_product(self, context: torch.Tensor) -> torch.Tensor:
        return self.output_linear()(context)

    def note(self) -> str | None:
        notes = [super().note(), called(**{self.output_projection: self.output_linear()})]
        return ", ".join(note for note in notes if note is not None) or None

    def is_split(self) -> bool:
        """Whether the context may be taken from it, and the product left to what follows."""
        return takes_ours(self) and not is_called(self) and self.unfused_reason() is None


def attend_and_norm(
    attention: Any,
    dropout: nn.Module | None,
    norm: Any,
    stream: int,
    hidden: torch.Tensor,
    mask: torch.Tensor | None,
    attend: Attend,
    head_mask: torch.Tensor | None,
    map_slot: MapSlot | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """norm(dropout(attention(hidden)) + hidden), and the map or None; the last are `FusedSelfAttention.forward`'s."""
    residual = hidden if attend.first is None else attend.first.take(hidden)
    bias = None
    if isinstance(attention, InnerOutput) and attention.is_split():
        context, probs = attention.contexts(hidden, mask, attend, head_mask, map_slot, kwargs)
        x, bias = project(attention.output_linear(), context)
    elif takes_ours(attention):
        x, *maps = attention(hidden, mask, attend=attend, head_mask=head_mask, map_slot=map_slot, **kwargs)
        probs = maps[0] if maps else None
    else:
        refuse_packed(attention, attend, head_mask)
        x, *maps = attention(hidden, mask_like(mask, hidden), **kwargs)
        probs = maps[0] if maps else None
        leave_foreign_map(map_slot, probs)
    return add_norm_anyhow(x, bias, residual, dropout, norm, attend.seed, stream), probs


def attention_arguments(attention: Any, dropout: nn.Module | None, norm: Any, stream: int) -> dict[str, Any] | None:
    """What the attention block needs; None where a module has to be called itself."""
    if not isinstance(attention, InnerOutput):
        return None
    first = attention.block_arguments()
    second = add_norm_arguments(attention.output_linear(), dropout, norm, stream)
    return None if first is None or second is None else first | second


def add_norm_anyhow(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    dropout: Any,
    norm: Any,
    seed: torch.Tensor | None,
    stream: int,
) -> torch.Tensor:
    """`add_norm`; by the modules themselves where they cannot be read."""
    if norm_reason(norm, dropout) is None:
        return add_norm(x, bias, residual, dropout, norm, seed, stream)
    x = x if bias is None else x + bias
    return norm((x if dropout is None else dropout(x)) + residual)

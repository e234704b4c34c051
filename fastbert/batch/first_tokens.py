"""A last layer that is read at the first token of each sequence only, as classifiers read it.

Keys and values are needed of every token; queries, and all that follows the attention, of the first ones. A few queries
are no work for a kernel of tiles: plain PyTorch attends here, on keys and values laid out by sequence.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastbert_kernels.reference import upcast

from .layout import Layout
from .records import Movable

#: What a model's `read_rows` may be.
READ_ROWS = ("all", "first")


@dataclass(frozen=True)
class FirstTokens(Movable):
    """The first token of each sequence among the tokens of a batch.

    Attributes:
        batch, longest: sequences, and tokens in the longest.
        starts: int64 (batch,), each sequence's first place in the packed tokens. None, as all below: a batch that is
            not packed.
        places: int64 (tokens,), each packed token's place in (batch * longest).
        hidden_keys: bool (batch, 1, 1, longest), True where a sequence has no token.
        absent: bool (batch,), True where a sequence has no token in its first column, which therefore is zero.
    """

    batch: int
    longest: int
    starts: torch.Tensor | None = None
    places: torch.Tensor | None = None
    hidden_keys: torch.Tensor | None = None
    absent: torch.Tensor | None = None

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, seq, hidden) to (batch, 1, hidden); packed (1, tokens, hidden) to (1, batch, hidden)."""
        return x[:, :1] if self.starts is None else x.index_select(1, self.starts)

    def attend(
        self,
        query: torch.Tensor,
        pair: torch.Tensor,
        bias: torch.Tensor | None,
        head_mask: torch.Tensor | None,
        scale: float,
        dropout_p: float,
    ) -> torch.Tensor:
        """The context of the first tokens.

        Args:
            query: (batch, heads, head_dim).
            pair: (tokens, 2, heads, head_dim), keys and values.
            bias: additive float32 (batch | 1, heads | 1, seq | 1, seq), or None.
            head_mask: (heads,), or None.

        Returns:
            Like query.
        """
        if self.places is not None:
            flat = pair.new_zeros(self.batch * self.longest, *pair.shape[1:])
            pair = flat.index_copy(0, self.places, pair)
        pair = pair.view(self.batch, self.longest, *pair.shape[1:])
        key, value = pair.permute(2, 0, 3, 1, 4)  # (batch, heads, longest, head_dim)
        scores = upcast(query[:, :, None] @ key.transpose(2, 3)) * scale
        if bias is not None:
            scores = scores + bias[:, :, :1, : self.longest]
        if self.hidden_keys is not None:
            scores = scores.masked_fill(self.hidden_keys, torch.finfo(scores.dtype).min)
        probs = F.dropout(torch.softmax(scores, dim=-1), dropout_p, training=True)
        if head_mask is not None:
            probs = probs * head_mask[:, None, None]
        return (probs.to(value.dtype) @ value)[:, :, 0]


def first_tokens(layout: Layout, tokens: int) -> FirstTokens:
    """The first tokens of a batch that lies as `layout` says, with `tokens` of them, at least one."""
    if layout.cu_seqlens is None:
        return FirstTokens(layout.batch, layout.max_seqlen)
    cu_seqlens = layout.cu_seqlens.long()
    starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    sequences = torch.arange(layout.batch, device=cu_seqlens.device)
    gaps = sequences * layout.max_seqlen - starts
    places = torch.arange(tokens, device=cu_seqlens.device) + gaps.repeat_interleave(lengths, output_size=tokens)
    beyond = torch.arange(layout.max_seqlen, device=cu_seqlens.device) >= lengths[:, None]
    starts = starts.clamp(max=tokens - 1)  # of an empty sequence at the end
    absent = lengths == 0
    if layout.columns is not None:
        absent |= layout.columns[starts] != 0
    return FirstTokens(layout.batch, layout.max_seqlen, starts, places, beyond[:, None, None], absent)

"""Keys and values that every sequence sees before its own: what prefix tuning trains, one pair a layer.

The attention kernel has as many queries as keys. So a prefix becomes extra tokens of the attention alone, before those
of each sequence and with queries of zero; what they would attend to is dropped.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from fastbert_kernels.attention_map import HandOut, handed_out, in_graph

from .layout import Layout
from .records import Movable

#: What a call and an output of Hugging Face's name the cache: transformers 5.24 renamed it.
CACHE = next(
    field.name
    for field in fields(BaseModelOutputWithPoolingAndCrossAttentions)
    if field.name in ("cache", "past_key_values")
)


def either(cache: Any, past_key_values: Any) -> Any:
    """The cache of a call that may name it either way; of two the newer name's, as in transformers 5.24."""
    return past_key_values if cache is None else cache


def prefix_length(cache: Any, layers: int) -> int | None:
    """How many positions each layer's prefix has; None where a cache holds anything else than one prefix a layer."""
    if type(cache) is not DynamicCache or len(cache.layers) != layers:
        return None
    if any(type(layer) is not DynamicLayer or layer.keys is None for layer in cache.layers):
        return None
    lengths = {layer.get_seq_length() for layer in cache.layers}
    return lengths.pop() if len(lengths) == 1 and lengths != {0} else None


@dataclass(frozen=True)
class Prefix(Movable):
    """The prefixes of all layers and their place among the tokens of a batch.

    Attributes:
        pairs: the key and the value of each layer, (batch, heads, length, head_dim).
        length: positions in each.
        rows: int64 (batch * length,), the place of each position of the prefix in the attention's arrays.
        token_rows: int64 (tokens,), the place of each token there.
        layout: how all of them lie there.
    """

    pairs: list[tuple[torch.Tensor, torch.Tensor]]
    length: int
    rows: torch.Tensor
    token_rows: torch.Tensor
    layout: Layout

    def prepend(self, qkv: torch.Tensor, layer: int) -> torch.Tensor:
        """qkv (tokens, 3, heads, head_dim) with one layer's prefix before each sequence."""
        key, value = self.pairs[layer]
        pair = torch.stack([torch.zeros_like(key), key, value], dim=2).to(qkv.dtype)  # batch, heads, 3, length, size
        rows = pair.permute(0, 3, 2, 1, 4).flatten(0, 1)
        both = qkv.new_empty(qkv.shape[0] + rows.shape[0], *qkv.shape[1:])
        return both.index_copy(0, self.token_rows, qkv).index_copy(0, self.rows, rows)

    def hand_out_map(self, hand_out: HandOut | None) -> HandOut:
        """Of probabilities (batch, heads, length + seq, length + seq) the tokens' rows, as `hand_out` makes them; and
        the whole, made of those."""

        def of_tokens(probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            handed, inner = handed_out(probs[:, :, self.length :], hand_out)
            if not in_graph(probs):
                return handed, probs
            return handed, torch.cat([probs[:, :, : self.length], inner], dim=2)

        return of_tokens

    def widen(self, bias: torch.Tensor) -> torch.Tensor:
        """A bias (batch | 1, heads | 1, seq | 1, length + seq) with rows for the prefix."""
        return bias if bias.shape[2] == 1 else F.pad(bias, (0, 0, self.length, 0))


def place_prefix(cache: DynamicCache, layout: Layout, heads: int, head_dim: int) -> Prefix:
    """The prefixes in a cache before the sequences of a batch.

    Raises:
        ValueError: for a prefix of another batch or another model; both shapes are named.
    """
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    length = pairs[0][0].shape[-2]
    wanted = (layout.batch, heads, length, head_dim)
    for i, pair in enumerate(pairs):
        for name, part in zip(("keys", "values"), pair, strict=True):
            if part.shape != wanted:
                raise ValueError(f"the prefix's {name} of layer {i} must be {wanted}, got {tuple(part.shape)}")
    device = pairs[0][0].device
    sequences = torch.arange(layout.batch, device=device)
    if layout.cu_seqlens is None:
        starts, of_token = sequences * layout.seq, sequences.repeat_interleave(layout.seq)
        cu_seqlens = None
    else:
        ends = layout.cu_seqlens
        starts, of_token = ends[:-1], sequences.repeat_interleave(ends.diff(), output_size=layout.tokens)
        cu_seqlens = ends + length * torch.arange(len(ends), device=device, dtype=ends.dtype)
    rows = starts.repeat_interleave(length) + torch.arange(layout.batch * length, device=device)
    token_rows = torch.arange(len(of_token), device=device) + length * (of_token + 1)
    columns = None
    if layout.columns is not None:
        columns = torch.empty(len(rows) + len(token_rows), dtype=layout.columns.dtype, device=device)
        columns[rows] = torch.arange(length, dtype=columns.dtype, device=device).repeat(layout.batch)
        columns[token_rows] = layout.columns + length
    seq, longest = length + layout.seq, length + layout.max_seqlen
    wide = Layout(layout.batch, seq, None, cu_seqlens, longest, columns, layout.order)
    return Prefix(pairs, length, rows, token_rows, wide)

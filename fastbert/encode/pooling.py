"""From the hidden states of packed texts to one vector each, as sentence-transformers does it."""

from collections.abc import Callable

import torch
from torch import Tensor


def _mean(hidden: Tensor, lengths: Tensor) -> Tensor:
    return torch.segment_reduce(hidden, "mean", lengths=lengths)


def _mean_sqrt_length(hidden: Tensor, lengths: Tensor) -> Tensor:
    return torch.segment_reduce(hidden, "sum", lengths=lengths) / lengths.sqrt()[:, None]


def _weighted_mean(hidden: Tensor, lengths: Tensor) -> Tensor:
    """Weighted by position, from 1."""
    starts = lengths.cumsum(0) - lengths
    places = torch.arange(1, len(hidden) + 1, device=hidden.device) - starts.repeat_interleave(lengths)
    return (
        torch.segment_reduce(hidden * places[:, None], "sum", lengths=lengths)
        * (2 / (lengths * (lengths + 1)))[:, None]
    )


def _max(hidden: Tensor, lengths: Tensor) -> Tensor:
    return torch.segment_reduce(hidden, "max", lengths=lengths)


def _first(hidden: Tensor, lengths: Tensor) -> Tensor:
    return hidden if len(hidden) == len(lengths) else hidden[lengths.cumsum(0) - lengths]


def _last(hidden: Tensor, lengths: Tensor) -> Tensor:
    return hidden[lengths.cumsum(0) - 1]


#: Pooling, by sentence-transformers' name -> packed hidden states float32 (tokens, hidden), for `cls` those of first
#: tokens if no others were computed, and lengths int64 (texts,) to (texts, hidden).
POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "cls": _first,
    "max": _max,
    "mean_sqrt_len_tokens": _mean_sqrt_length,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}


def pool(poolings: tuple[str, ...], hidden: Tensor, lengths: Tensor) -> Tensor:
    """What each pooling makes of the texts, side by side: (texts, hidden times poolings)."""
    return torch.cat([POOLINGS[name](hidden, lengths) for name in poolings], dim=1)

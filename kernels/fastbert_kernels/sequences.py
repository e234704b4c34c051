"""Sequences packed one after the other: `cu_seqlens` says where each begins; without it all are `max_seqlen` long."""

import itertools

import torch

from .backend import check_mode
from .launch import cdiv


def batch_size(x: torch.Tensor, cu_seqlens: torch.Tensor | None, max_seqlen: int) -> int:
    """How many sequences the tokens of `x` (tokens, ...) are."""
    return x.shape[0] // max_seqlen if cu_seqlens is None else cu_seqlens.shape[0] - 1


def blocked_length(cu_seqlens: torch.Tensor | None, max_seqlen: int) -> int:
    """What kernels are told of max_seqlen. Where they read lengths, it only counts blocks: a multiple of 16, for which
    they are compiled once and not for every other length again."""
    return max_seqlen if cu_seqlens is None else cdiv(max_seqlen, 16) * 16


def key_spans(visible: torch.Tensor) -> torch.Tensor:
    """Of each row of a mask, bool (batch, keys), up to where a masked key comes before a visible one, and where the
    last visible key ends: int32 (batch, 2). Both are 0 where no key is visible, the first where none is masked before
    the end."""
    ends = torch.arange(1, visible.shape[1] + 1, device=visible.device, dtype=torch.int32)
    end = (visible * ends).amax(1, keepdim=True)
    masked = (~visible & (ends < end)) * ends
    return torch.cat([masked.amax(1, keepdim=True), end], dim=1)


def check_lengths(name: str, x: torch.Tensor, cu_seqlens: torch.Tensor | None, max_seqlen: int) -> None:
    """Raise ValueError unless the sequences make up the tokens of `x` (tokens, ...), which the message calls `name`."""
    if max_seqlen < 1:
        raise ValueError(f"max_seqlen must be at least 1, got {max_seqlen}")
    if cu_seqlens is None and x.shape[0] % max_seqlen != 0:
        raise ValueError(
            f"without cu_seqlens every sequence has max_seqlen={max_seqlen} tokens, but {name} has {x.shape[0]} "
            "tokens, not a multiple: pass cu_seqlens"
        )
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32):
        raise ValueError(
            f"cu_seqlens must be int32 of shape (batch + 1,), got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens is not None and (not cu_seqlens.is_cuda or check_mode()) and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        steps = [after - before for before, after in itertools.pairwise(bounds)]
        if not steps or bounds[0] != 0 or bounds[-1] != x.shape[0] or min(steps) < 0 or max(steps) > max_seqlen:
            raise ValueError(
                f"cu_seqlens must rise from 0 to the {x.shape[0]} tokens of {name} in steps of at most "
                f"max_seqlen={max_seqlen}, got {bounds}"
            )

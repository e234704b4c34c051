"""What the products inside kernels cost, for `torch.utils.flop_counter.FlopCounterMode`: as computed, scores again in
each kernel of a backward pass included. A multiplication with its addition is two operations, as it counts."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import attention, attention_map, feed_forward, relation  # noqa: F401 - they register the ops


def _pairs(tokens: int, cu_seqlens: torch.Tensor | None, max_seqlen: int) -> int:
    """Pairs of tokens of one sequence, in all sequences."""
    if cu_seqlens is None:
        return tokens * max_seqlen
    return int(cu_seqlens.diff().long().square().sum())


def _formula(op: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    register: Any = register_flop_formula(getattr(torch.ops.fastbert, op), get_raw=True)
    return lambda formula: register(formula)


@_formula("attention")
def _attention(qkv: Any, cu_seqlens: Any, max_seqlen: int, *_: Any, **__: Any) -> int:
    """Q K^T and P V."""
    return 2 * 2 * _pairs(qkv.shape[0], cu_seqlens, max_seqlen) * qkv[0, 0].numel()


@_formula("attention_backward")
def _attention_backward(
    dout: Any, dprobs: Any, qkv: Any, out: Any, stats: Any, cu_seqlens: Any, max_seqlen: int, *_: Any, **__: Any
) -> int:
    """S, dP and dQ; then S, dP, dV and dK."""
    return 7 * 2 * _pairs(qkv.shape[0], cu_seqlens, max_seqlen) * qkv[0, 0].numel()


@_formula("attention_map_gradient")
def _map_gradient(
    dout: Any, qkv: Any, cu_seqlens: Any, max_seqlen: int, columns: Any, side: int, *_: Any, **__: Any
) -> int:
    """dO V^T, padding included."""
    batch = qkv.shape[0] // max_seqlen if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return 2 * batch * side**2 * qkv[0, 0].numel()


@_formula("feed_forward")
def _feed_forward(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * x.shape[0] * weight.numel()


@_formula("feed_forward_backward")
def _feed_forward_backward(dout: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * dout.shape[0] * weight.numel()


def _relation_pairs(student: Any, teacher: Any, cu_seqlens: Any, max_seqlen: int) -> tuple[int, int]:
    """Products of the scores of both models."""
    pairs = _pairs(student.shape[0], cu_seqlens, max_seqlen)
    return pairs * student[0].numel(), pairs * teacher[0].numel()


@_formula("relation_loss")
def _relation(a: Any, b: Any, c: Any, d: Any, cu_seqlens: Any, max_seqlen: int, *_: Any, **__: Any) -> int:
    """The scores of both models."""
    return 2 * sum(_relation_pairs(a, c, cu_seqlens, max_seqlen))


@_formula("relation_loss_backward")
def _relation_backward(
    dloss: Any, lse: Any, a: Any, b: Any, c: Any, d: Any, cu_seqlens: Any, max_seqlen: int, *_: Any, **__: Any
) -> int:
    """The scores of both models and a gradient of the student's, twice."""
    student, teacher = _relation_pairs(a, c, cu_seqlens, max_seqlen)
    return 2 * 2 * (2 * student + teacher)

"""What the attention op takes: checked, and brought to the form that its kernels know."""

from typing import NamedTuple

import torch

from . import reference
from .backend import check_mode, check_same_device
from .sequences import batch_size, check_lengths
from .sequences import key_spans as spans_of

MAX_HEAD_DIM = 128


class OpArguments(NamedTuple):
    """The arguments of the op, as `attention` names them, but that no default is left: `probs_seq` of 0 is for none."""

    qkv: torch.Tensor
    cu_seqlens: torch.Tensor | None
    max_seqlen: int
    bias: torch.Tensor | None
    head_mask: torch.Tensor | None
    scale: float
    dropout_p: float
    seed: torch.Tensor | None
    stream: int
    probs_seq: int
    columns: torch.Tensor | None
    order: torch.Tensor | None
    key_spans: torch.Tensor | None


def op_arguments(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    bias: torch.Tensor | None,
    head_mask: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    stream: int,
    probs_seq: int | None,
    columns: torch.Tensor | None,
    order: torch.Tensor | None,
    key_spans: torch.Tensor | None,
) -> OpArguments:
    """The arguments of `attention` as its op takes them, checked: `scale` is above zero."""
    check(qkv, cu_seqlens, max_seqlen, bias, head_mask, dropout_p, seed, probs_seq, columns, order, key_spans)
    if dropout_p > 0.0 and seed is None:
        raise ValueError(f"attention with dropout_p={dropout_p} needs a seed: an int64 scalar tensor on {qkv.device}")
    if bias is not None:
        bias = reference.additive(bias) if bias.dtype == torch.bool else bias
        bias = bias if bias.stride(-1) == 1 else bias.contiguous()
        bias = bias.expand(batch_size(qkv, cu_seqlens, max_seqlen), qkv.shape[2], max(max_seqlen, bias.shape[2]), -1)
    return OpArguments(
        qkv.contiguous(),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        max_seqlen,
        bias,
        None if head_mask is None else head_mask.contiguous(),
        scale,
        dropout_p,
        seed,
        stream,
        probs_seq or 0,
        None if columns is None else columns.contiguous(),
        None if order is None else order.contiguous(),
        None if key_spans is None else key_spans.contiguous(),
    )


def check(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    bias: torch.Tensor | None,
    head_mask: torch.Tensor | None,
    dropout_p: float,
    seed: torch.Tensor | None,
    probs_seq: int | None,
    columns: torch.Tensor | None,
    order: torch.Tensor | None,
    key_spans: torch.Tensor | None,
) -> None:
    """Raise ValueError for arguments of `attention.attention` that do not fit each other."""
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"attention needs qkv of shape (tokens, 3, heads, head_dim), got {tuple(qkv.shape)}")
    heads, head_dim = qkv.shape[2:]
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"attention has kernels for head_dim up to {MAX_HEAD_DIM}, got {head_dim}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1], got {dropout_p}")
    check_lengths("qkv", qkv, cu_seqlens, max_seqlen)
    if bias is not None:
        wanted = (batch_size(qkv, cu_seqlens, max_seqlen), heads, max_seqlen, max_seqlen)
        fits = bias.dim() == 4 and all(
            have == want or (have == 1 and dim < 3) or (have > want and dim > 1)
            for dim, (have, want) in enumerate(zip(bias.shape, wanted, strict=True))
        )
        if not fits:
            raise ValueError(
                f"attention bias must broadcast to (batch, heads, seq, seq) = {wanted}, got {tuple(bias.shape)}"
            )
    if head_mask is not None and head_mask.shape != (heads,):
        raise ValueError(f"head_mask must have shape (heads,) = ({heads},), got {tuple(head_mask.shape)}")
    if probs_seq is not None and probs_seq < max_seqlen:
        raise ValueError(f"probs_seq={probs_seq} is shorter than the longest sequence, max_seqlen={max_seqlen}")
    if columns is not None and (columns.shape != qkv.shape[:1] or columns.dtype != torch.int32):
        raise ValueError(
            f"columns must be int32 of shape (tokens,) = ({qkv.shape[0]},), got {columns.dtype} {tuple(columns.shape)}"
        )
    reads_back = (not qkv.is_cuda or check_mode()) and not torch.compiler.is_compiling()
    if columns is not None and probs_seq is not None and columns.numel() > 0 and reads_back:
        low, high = (int(x) for x in torch.aminmax(columns))
        if low < 0 or high >= probs_seq:
            raise ValueError(f"columns must lie in maps of side probs_seq={probs_seq}, got {low} to {high}")
    if order is not None:
        batch = batch_size(qkv, cu_seqlens, max_seqlen)
        if cu_seqlens is None:
            raise ValueError("without cu_seqlens every sequence is as long as the others: pass no order")
        if order.shape != (batch,) or order.dtype != torch.int32:
            raise ValueError(
                f"order must be int32 of shape (batch,) = ({batch},), got {order.dtype} {tuple(order.shape)}"
            )
        if reads_back and sorted(order.tolist()) != [*range(batch)]:
            raise ValueError(f"order must name each of the {batch} sequences once, got {order.tolist()}")
    if key_spans is not None:
        _check_spans(key_spans, batch_size(qkv, cu_seqlens, max_seqlen), max_seqlen, bias)
        if cu_seqlens is not None:
            raise ValueError("key_spans are of sequences of one length: pass no cu_seqlens")
    check_same_device(
        "attention", qkv=qkv, cu_seqlens=cu_seqlens, bias=bias, head_mask=head_mask, seed=seed, columns=columns,
        order=order, key_spans=key_spans,
    )  # fmt: skip


def _check_spans(key_spans: torch.Tensor, batch: int, max_seqlen: int, bias: torch.Tensor | None) -> None:
    if key_spans.shape != (batch, 2) or key_spans.dtype != torch.int32:
        raise ValueError(
            f"key_spans must be int32 of shape (batch, 2) = ({batch}, 2), got {key_spans.dtype} "
            f"{tuple(key_spans.shape)}"
        )
    wanted = (batch, 1, 1, max_seqlen)
    if bias is None or bias.shape != wanted:
        raise ValueError(
            f"key_spans need a bias (batch, 1, 1, max_seqlen) = {wanted}, got "
            f"{None if bias is None else tuple(bias.shape)}"
        )
    if check_mode() and not torch.compiler.is_compiling():
        added = reference.additive(bias)[:, 0, 0]
        said = spans_of(added == 0.0)
        if not ((added == 0.0) | (added == reference.MASKED)).all() or not torch.equal(said, key_spans):
            raise ValueError(f"key_spans must say what the bias masks, {said.tolist()}, got {key_spans.tolist()}")

"""Masked multi-head attention over packed sequences, forward and backward, with optional differentiable probabilities.

With S = scale * Q K^T + bias, P = softmax(S), D the inverted dropout mask and g the head's mask value:

    P~ = g * D * P            the probabilities that leave the op
    O  = P~ V                 the context

The softmax streams over key tiles with a running maximum (Milakov and Gimelshein, arXiv:1805.02867; Dao et al.,
arXiv:2205.14135), in base 2, in float32. Only the log-sum-exp of each row is kept for the backward pass.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl

from . import reference
from .backend import check_mode, check_same_device, forbid_double_backward, register_op, uses_triton, wrap_triton
from .numerics import LN2, LOG2E, MASKED, cast, dot, dropout_keep
from .tiles import attention_tiles

MAX_HEAD_DIM = 128


@triton.jit
def _sequence(cu_seqlens_ptr, b, max_seqlen, HAS_CU_SEQLENS: tl.constexpr):
    """First token (int64) and length of sequence b."""
    if HAS_CU_SEQLENS:
        start = tl.load(cu_seqlens_ptr + b)
        length = tl.load(cu_seqlens_ptr + b + 1) - start
    else:
        start = b * max_seqlen
        length = max_seqlen
    return tl.cast(start, tl.int64), length


@triton.jit
def _load_heads(ptr, rows, row_stride, length, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head, zeros past `length` and past HEAD_DIM: [rows, BLOCK_D]."""
    dims = tl.arange(0, BLOCK_D)
    mask = rows[:, None] < length
    if HEAD_DIM != BLOCK_D:
        mask = mask & (dims[None, :] < HEAD_DIM)
    return tl.load(ptr + rows[:, None].to(tl.int64) * row_stride + dims[None, :], mask=mask, other=0.0)


@triton.jit
def _store_heads(ptr, x, rows, row_stride, length, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    mask = rows[:, None] < length
    if HEAD_DIM != BLOCK_D:
        mask = mask & (dims[None, :] < HEAD_DIM)
    ptrs = ptr + rows[:, None].to(tl.int64) * row_stride + dims[None, :]
    tl.store(ptrs, cast(x, ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bias_tile(bias_ptr, rows, cols, row_stride, length, masked_below):
    """The additive mask of one tile, in base 2, masked entries at MASKED: [BLOCK_M, BLOCK_N]."""
    mask = (rows[:, None] < length) & (cols[None, :] < length)
    ptrs = bias_ptr + rows[:, None].to(tl.int64) * row_stride + cols[None, :]
    bias = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    return tl.where(bias <= masked_below, MASKED, bias * LOG2E)


@triton.jit
def _probs_offsets(columns_ptr, rows, cols, probs_seq, length, HAS_COLUMNS: tl.constexpr):
    """Offsets of a tile inside one (probs_seq, probs_seq) map: int64 [BLOCK_M, BLOCK_N]."""
    if HAS_COLUMNS:
        rows = tl.load(columns_ptr + rows, mask=rows < length, other=0)
        cols = tl.load(columns_ptr + cols, mask=cols < length, other=0)
    return rows[:, None].to(tl.int64) * probs_seq + cols[None, :]


@triton.jit
def _softmax_tile(s, lse, valid, length, HAS_BIAS: tl.constexpr):
    """P of one tile from base-2 scores and the base-2 log-sum-exp, zero where not valid.

    In a row with no visible key the maximum swallows log(sum); such a row is uniform over its sequence.
    """
    p = tl.exp2(s - lse)
    if HAS_BIAS:
        p = tl.where(lse < 0.5 * MASKED, 1.0 / length, p)
    return tl.where(valid, p, 0.0)


@triton.jit(do_not_specialize=["stream", "keep_threshold"])
def _attention_forward(
    qkv_ptr,  # (tokens, 3, heads, HEAD_DIM)
    out_ptr,  # (tokens, heads, HEAD_DIM), dtype of qkv
    lse_ptr,  # (heads, tokens) float32, natural log-sum-exp
    probs_ptr,  # (batch, heads, probs_seq, probs_seq), dtype of qkv; unused without HAS_PROBS
    cu_seqlens_ptr,  # (batch + 1,) int32; unused without HAS_CU_SEQLENS
    columns_ptr,  # (tokens,) int32; unused without HAS_COLUMNS
    bias_ptr,  # (batch, heads, max_seqlen, max_seqlen) by strides, last one 1; unused without HAS_BIAS
    head_mask_ptr,  # (heads,) any float; unused without HAS_HEAD_MASK
    seed_ptr,  # int64 scalar; unused without HAS_DROPOUT
    tokens,
    heads,
    max_seqlen,
    probs_seq,
    bias_batch_stride,
    bias_head_stride,
    bias_row_stride,
    masked_below,  # bias entries at or under this are masked keys
    scale,
    stream,  # int32, which dropout of the model this is
    keep_threshold,  # int32, see dropout_keep
    keep_scale,  # 1 / (1 - dropout_p)
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_CU_SEQLENS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_HEAD_MASK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_PROBS: tl.constexpr,
):
    """One program: BLOCK_M rows of one head of one sequence."""
    if HAS_PROBS:
        blocks = tl.cdiv(tl.maximum(max_seqlen, probs_seq), BLOCK_M)
    else:
        blocks = tl.cdiv(max_seqlen, BLOCK_M)
    pid = tl.program_id(0)
    plane = pid // blocks
    b = plane // heads
    h = plane % heads
    row_start = (pid % blocks) * BLOCK_M
    start, length = _sequence(cu_seqlens_ptr, b, max_seqlen, HAS_CU_SEQLENS)
    if HAS_PROBS and not HAS_COLUMNS:
        # Blocks of padding rows only have zeros of the map to write.
        length_read = tl.where(row_start < length, length, 0)
    else:
        if row_start >= length:
            return
        length_read = length

    rows = row_start + tl.arange(0, BLOCK_M)
    row_stride = 3 * heads * HEAD_DIM
    qkv_ptr += start * row_stride + h * HEAD_DIM
    k_ptr = qkv_ptr + heads * HEAD_DIM
    v_ptr = k_ptr + heads * HEAD_DIM
    if HAS_BIAS:
        bias_ptr += b.to(tl.int64) * bias_batch_stride + h.to(tl.int64) * bias_head_stride
    scale_log2 = scale * LOG2E

    q = _load_heads(qkv_ptr, rows, row_stride, length, HEAD_DIM, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for col_start in range(0, length_read, BLOCK_N):
        cols = col_start + tl.arange(0, BLOCK_N)
        k = _load_heads(k_ptr, cols, row_stride, length, HEAD_DIM, BLOCK_D)
        s = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)) * scale_log2
        if HAS_BIAS:
            s += _bias_tile(bias_ptr, rows, cols, bias_row_stride, length, masked_below)
        s = tl.where(cols[None, :] < length, s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, axis=1))
        rescale = tl.exp2(row_max - new_max)
        p = tl.exp2(s - new_max[:, None])
        row_sum = row_sum * rescale + tl.sum(p, axis=1)
        if HAS_DROPOUT:
            keep = dropout_keep(seed_ptr, stream, plane, rows, col_start, keep_threshold, BLOCK_N)
            p = tl.where(keep, p, 0.0)
        v = _load_heads(v_ptr, cols, row_stride, length, HEAD_DIM, BLOCK_D)
        acc = dot(cast(p, v.dtype), v, acc * rescale[:, None])
        row_max = new_max

    factor = 1.0
    if HAS_DROPOUT:
        factor = keep_scale
    if HAS_HEAD_MASK:
        factor *= tl.load(head_mask_ptr + h).to(tl.float32)
    out_ptr += start * heads * HEAD_DIM + h * HEAD_DIM
    _store_heads(out_ptr, acc * (factor / row_sum)[:, None], rows, heads * HEAD_DIM, length, HEAD_DIM, BLOCK_D)
    lse = row_max + tl.log2(row_sum)
    tl.store(lse_ptr + h.to(tl.int64) * tokens + start + rows, lse * LN2, mask=rows < length)

    if HAS_PROBS:
        if HAS_COLUMNS:
            cols_end = length  # the rest of the map was zeroed by the host
            columns_ptr += start
        else:
            cols_end = probs_seq
        probs_ptr += plane.to(tl.int64) * probs_seq * probs_seq
        for col_start in range(0, cols_end, BLOCK_N):
            cols = col_start + tl.arange(0, BLOCK_N)
            k = _load_heads(k_ptr, cols, row_stride, length, HEAD_DIM, BLOCK_D)
            s = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)) * scale_log2
            if HAS_BIAS:
                s += _bias_tile(bias_ptr, rows, cols, bias_row_stride, length, masked_below)
            valid = (rows[:, None] < length) & (cols[None, :] < length)
            p = _softmax_tile(s, lse[:, None], valid, length, HAS_BIAS) * factor
            if HAS_DROPOUT:
                keep = dropout_keep(seed_ptr, stream, plane, rows, col_start, keep_threshold, BLOCK_N)
                p = tl.where(keep, p, 0.0)
            offsets = _probs_offsets(columns_ptr, rows, cols, probs_seq, length, HAS_COLUMNS)
            if HAS_COLUMNS:
                written = valid
            else:
                written = (rows[:, None] < probs_seq) & (cols[None, :] < probs_seq)
            tl.store(probs_ptr + offsets, cast(p, probs_ptr.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["stream", "keep_threshold"])
def _attention_backward_dq(
    dout_ptr,  # (tokens, heads, HEAD_DIM), dtype of qkv
    dprobs_ptr,  # (batch, heads, probs_seq, probs_seq), dtype of qkv; unused without HAS_DPROBS
    qkv_ptr,  # (tokens, 3, heads, HEAD_DIM)
    out_ptr,  # (tokens, heads, HEAD_DIM)
    lse_ptr,  # (heads, tokens) float32
    delta_ptr,  # (heads, tokens) float32, written here and read by _attention_backward_dkv
    dqkv_ptr,  # (tokens, 3, heads, HEAD_DIM), the query third is written
    dhead_mask_ptr,  # (heads, batch, blocks) float32 partial sums; unused without HAS_HEAD_MASK
    cu_seqlens_ptr,  # as in _attention_forward, and so on
    columns_ptr,
    bias_ptr,
    head_mask_ptr,
    seed_ptr,
    tokens,
    batch,
    heads,
    max_seqlen,
    probs_seq,
    bias_batch_stride,
    bias_head_stride,
    bias_row_stride,
    masked_below,
    scale,
    stream,
    keep_threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_CU_SEQLENS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_HEAD_MASK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_DPROBS: tl.constexpr,
):
    """One program: dQ of BLOCK_M rows of one head of one sequence, and the rows' delta."""
    blocks = tl.cdiv(max_seqlen, BLOCK_M)
    pid = tl.program_id(0)
    plane = pid // blocks
    b = plane // heads
    h = plane % heads
    row_start = (pid % blocks) * BLOCK_M
    start, length = _sequence(cu_seqlens_ptr, b, max_seqlen, HAS_CU_SEQLENS)
    if row_start >= length:
        if HAS_HEAD_MASK:
            tl.store(dhead_mask_ptr + (h.to(tl.int64) * batch + b) * blocks + pid % blocks, 0.0)
        return

    rows = row_start + tl.arange(0, BLOCK_M)
    row_stride = 3 * heads * HEAD_DIM
    qkv_ptr += start * row_stride + h * HEAD_DIM
    k_ptr = qkv_ptr + heads * HEAD_DIM
    v_ptr = k_ptr + heads * HEAD_DIM
    head_offset = start * heads * HEAD_DIM + h * HEAD_DIM
    if HAS_BIAS:
        bias_ptr += b.to(tl.int64) * bias_batch_stride + h.to(tl.int64) * bias_head_stride
    if HAS_DPROBS:
        dprobs_ptr += plane.to(tl.int64) * probs_seq * probs_seq
        if HAS_COLUMNS:
            columns_ptr += start
    scale_log2 = scale * LOG2E
    factor = 1.0
    if HAS_DROPOUT:
        factor = keep_scale
    g = 1.0
    if HAS_HEAD_MASK:
        g = tl.load(head_mask_ptr + h).to(tl.float32)

    q = _load_heads(qkv_ptr, rows, row_stride, length, HEAD_DIM, BLOCK_D)
    dout = _load_heads(dout_ptr + head_offset, rows, heads * HEAD_DIM, length, HEAD_DIM, BLOCK_D)
    out = _load_heads(out_ptr + head_offset, rows, heads * HEAD_DIM, length, HEAD_DIM, BLOCK_D)
    row_offset = h.to(tl.int64) * tokens + start + rows
    lse = tl.load(lse_ptr + row_offset, mask=rows < length, other=0.0) * LOG2E
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)

    if HAS_DPROBS:
        for col_start in range(0, length, BLOCK_N):
            cols = col_start + tl.arange(0, BLOCK_N)
            k = _load_heads(k_ptr, cols, row_stride, length, HEAD_DIM, BLOCK_D)
            s = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)) * scale_log2
            if HAS_BIAS:
                s += _bias_tile(bias_ptr, rows, cols, bias_row_stride, length, masked_below)
            valid = (rows[:, None] < length) & (cols[None, :] < length)
            p = _softmax_tile(s, lse[:, None], valid, length, HAS_BIAS) * (factor * g)
            if HAS_DROPOUT:
                keep = dropout_keep(seed_ptr, stream, plane, rows, col_start, keep_threshold, BLOCK_N)
                p = tl.where(keep, p, 0.0)
            offsets = _probs_offsets(columns_ptr, rows, cols, probs_seq, length, HAS_COLUMNS)
            dprobs = tl.load(dprobs_ptr + offsets, mask=valid, other=0.0)
            delta += tl.sum(p * dprobs.to(tl.float32), axis=1)
    tl.store(delta_ptr + row_offset, delta, mask=rows < length)

    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    dhead_mask = tl.zeros([BLOCK_M], dtype=tl.float32)
    for col_start in range(0, length, BLOCK_N):
        cols = col_start + tl.arange(0, BLOCK_N)
        k = _load_heads(k_ptr, cols, row_stride, length, HEAD_DIM, BLOCK_D)
        s = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)) * scale_log2
        if HAS_BIAS:
            s += _bias_tile(bias_ptr, rows, cols, bias_row_stride, length, masked_below)
        valid = (rows[:, None] < length) & (cols[None, :] < length)
        p = _softmax_tile(s, lse[:, None], valid, length, HAS_BIAS)
        v = _load_heads(v_ptr, cols, row_stride, length, HEAD_DIM, BLOCK_D)
        dp = dot(dout, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32))
        if HAS_DPROBS:
            offsets = _probs_offsets(columns_ptr, rows, cols, probs_seq, length, HAS_COLUMNS)
            dp += tl.load(dprobs_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        dp *= factor
        if HAS_DROPOUT:
            keep = dropout_keep(seed_ptr, stream, plane, rows, col_start, keep_threshold, BLOCK_N)
            dp = tl.where(keep, dp, 0.0)
        if HAS_HEAD_MASK:
            dhead_mask += tl.sum(p * dp, axis=1)
            dp *= g
        ds = p * (dp - delta[:, None])
        dq = dot(cast(ds, k.dtype), k, dq)
    dqkv_ptr += start * row_stride + h * HEAD_DIM
    _store_heads(dqkv_ptr, dq * scale, rows, row_stride, length, HEAD_DIM, BLOCK_D)
    if HAS_HEAD_MASK:
        partial = dhead_mask_ptr + (h.to(tl.int64) * batch + b) * blocks + pid % blocks
        tl.store(partial, tl.sum(dhead_mask, axis=0))


@triton.jit(do_not_specialize=["stream", "keep_threshold"])
def _attention_backward_dkv(
    dout_ptr,  # (tokens, heads, HEAD_DIM), dtype of qkv
    dprobs_ptr,  # (batch, heads, probs_seq, probs_seq), dtype of qkv; unused without HAS_DPROBS
    qkv_ptr,  # (tokens, 3, heads, HEAD_DIM)
    lse_ptr,  # (heads, tokens) float32
    delta_ptr,  # (heads, tokens) float32, from _attention_backward_dq
    dqkv_ptr,  # (tokens, 3, heads, HEAD_DIM), the key and value thirds are written
    cu_seqlens_ptr,  # as in _attention_forward, and so on
    columns_ptr,
    bias_ptr,
    head_mask_ptr,
    seed_ptr,
    tokens,
    heads,
    max_seqlen,
    probs_seq,
    bias_batch_stride,
    bias_head_stride,
    bias_row_stride,
    masked_below,
    scale,
    stream,
    keep_threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_CU_SEQLENS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_HEAD_MASK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_DPROBS: tl.constexpr,
):
    """One program: dK and dV of BLOCK_N keys of one head of one sequence, over tiles of BLOCK_M query rows.

    Scores are computed transposed, [BLOCK_N, BLOCK_M], so that P^T and dS^T feed the next product from registers.
    """
    blocks = tl.cdiv(max_seqlen, BLOCK_N)
    pid = tl.program_id(0)
    plane = pid // blocks
    b = plane // heads
    h = plane % heads
    col_start = (pid % blocks) * BLOCK_N
    start, length = _sequence(cu_seqlens_ptr, b, max_seqlen, HAS_CU_SEQLENS)
    if col_start >= length:
        return

    cols = col_start + tl.arange(0, BLOCK_N)
    row_stride = 3 * heads * HEAD_DIM
    third = heads * HEAD_DIM
    qkv_ptr += start * row_stride + h * HEAD_DIM
    dout_ptr += start * third + h * HEAD_DIM
    if HAS_BIAS:
        bias_ptr += b.to(tl.int64) * bias_batch_stride + h.to(tl.int64) * bias_head_stride
    if HAS_DPROBS:
        dprobs_ptr += plane.to(tl.int64) * probs_seq * probs_seq
        if HAS_COLUMNS:
            columns_ptr += start
    lse_ptr += h.to(tl.int64) * tokens + start
    delta_ptr += h.to(tl.int64) * tokens + start
    scale_log2 = scale * LOG2E
    factor = 1.0
    if HAS_DROPOUT:
        factor = keep_scale
    if HAS_HEAD_MASK:
        factor *= tl.load(head_mask_ptr + h).to(tl.float32)

    k = _load_heads(qkv_ptr + third, cols, row_stride, length, HEAD_DIM, BLOCK_D)
    v = _load_heads(qkv_ptr + 2 * third, cols, row_stride, length, HEAD_DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for row_start in range(0, length, BLOCK_M):
        rows = row_start + tl.arange(0, BLOCK_M)
        q = _load_heads(qkv_ptr, rows, row_stride, length, HEAD_DIM, BLOCK_D)
        dout = _load_heads(dout_ptr, rows, third, length, HEAD_DIM, BLOCK_D)
        lse = tl.load(lse_ptr + rows, mask=rows < length, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + rows, mask=rows < length, other=0.0)
        s = dot(k, tl.trans(q), tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)) * scale_log2
        if HAS_BIAS:
            s += tl.trans(_bias_tile(bias_ptr, rows, cols, bias_row_stride, length, masked_below))
        valid = (cols[:, None] < length) & (rows[None, :] < length)
        p = _softmax_tile(s, lse[None, :], valid, length, HAS_BIAS)
        dp = dot(v, tl.trans(dout), tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32))
        if HAS_DPROBS:
            offsets = _probs_offsets(columns_ptr, rows, cols, probs_seq, length, HAS_COLUMNS)
            dprobs = tl.load(dprobs_ptr + offsets, mask=tl.trans(valid), other=0.0)
            dp += tl.trans(dprobs).to(tl.float32)
        p_out = p * factor
        dp *= factor
        if HAS_DROPOUT:
            keep = tl.trans(dropout_keep(seed_ptr, stream, plane, rows, col_start, keep_threshold, BLOCK_N))
            p_out = tl.where(keep, p_out, 0.0)
            dp = tl.where(keep, dp, 0.0)
        dv = dot(cast(p_out, dout.dtype), dout, dv)
        ds = p * (dp - delta[None, :])
        dk = dot(cast(ds, q.dtype), q, dk)
    dqkv_ptr += start * row_stride + h * HEAD_DIM
    _store_heads(dqkv_ptr + third, dk * scale, cols, row_stride, length, HEAD_DIM, BLOCK_D)
    _store_heads(dqkv_ptr + 2 * third, dv, cols, row_stride, length, HEAD_DIM, BLOCK_D)


def _common_arguments(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    columns: torch.Tensor | None,
    bias: torch.Tensor | None,
    head_mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    stream: int,
    max_seqlen: int,
    probs_seq: int,
    scale: float,
) -> dict[str, Any]:
    """The kernel arguments that all three kernels share. An absent tensor is stood in for by qkv, never read."""
    strides = (0, 0, 0) if bias is None else bias.stride()[:3]
    return {
        "cu_seqlens_ptr": qkv if cu_seqlens is None else cu_seqlens,
        "columns_ptr": qkv if columns is None else columns,
        "bias_ptr": qkv if bias is None else bias,
        "head_mask_ptr": qkv if head_mask is None else head_mask,
        "seed_ptr": qkv if seed is None else seed,
        "tokens": qkv.shape[0],
        "heads": qkv.shape[2],
        "max_seqlen": max_seqlen,
        "probs_seq": probs_seq,
        "bias_batch_stride": strides[0],
        "bias_head_stride": strides[1],
        "bias_row_stride": strides[2],
        "masked_below": 0.0 if bias is None else torch.finfo(bias.dtype).min / 2,
        "scale": scale,
        "stream": stream,
        "keep_threshold": reference.dropout_threshold(dropout_p),
        "keep_scale": 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0,
        "HEAD_DIM": qkv.shape[3],
        "BLOCK_D": max(16, triton.next_power_of_2(qkv.shape[3])),
        "HAS_CU_SEQLENS": cu_seqlens is not None,
        "HAS_COLUMNS": columns is not None,
        "HAS_BIAS": bias is not None,
        "HAS_HEAD_MASK": head_mask is not None,
        "HAS_DROPOUT": dropout_p > 0.0,
    }


def _batch(qkv: torch.Tensor, cu_seqlens: torch.Tensor | None, max_seqlen: int) -> int:
    return qkv.shape[0] // max_seqlen if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _forward_fake(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    bias: torch.Tensor | None,
    head_mask: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    stream: int,
    probs_seq: int,
    columns: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(tokens, heads, head_dim)
    lse = qkv.new_empty(heads, tokens, dtype=torch.float32)
    shape = (_batch(qkv, cu_seqlens, max_seqlen), heads, probs_seq, probs_seq) if probs_seq > 0 else (0,)
    return out, lse, qkv.new_empty(shape)


@register_op("attention", _forward_fake)
def _forward(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    bias: torch.Tensor | None,
    head_mask: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    stream: int,
    probs_seq: int,
    columns: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, _, heads, head_dim = qkv.shape
    batch = _batch(qkv, cu_seqlens, max_seqlen)
    out = qkv.new_empty(tokens, heads, head_dim)
    lse = qkv.new_empty(heads, tokens, dtype=torch.float32)
    if probs_seq == 0:
        probs = qkv.new_empty(0)
    elif columns is None:
        probs = qkv.new_empty(batch, heads, probs_seq, probs_seq)  # the kernel writes the padding's zeros too
    else:
        probs = qkv.new_zeros(batch, heads, probs_seq, probs_seq)
    arguments = _common_arguments(
        qkv, cu_seqlens, columns, bias, head_mask, seed, dropout_p, stream, max_seqlen, probs_seq, scale
    )
    tiles = attention_tiles("forward", qkv)
    grid = (triton.cdiv(max(max_seqlen, probs_seq), tiles["BLOCK_M"]) * heads * batch,)
    if grid[0] > 0:
        wrap_triton(_attention_forward)[grid](
            qkv_ptr=qkv, out_ptr=out, lse_ptr=lse, probs_ptr=probs, HAS_PROBS=probs_seq > 0, **arguments, **tiles
        )
    return out, lse, probs


def _backward_fake(
    dout: torch.Tensor,
    dprobs: torch.Tensor | None,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    bias: torch.Tensor | None,
    head_mask: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    stream: int,
    columns: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    dhead_mask = qkv.new_empty(0) if head_mask is None else torch.empty_like(head_mask)
    return torch.empty_like(qkv), dhead_mask


@register_op("attention_backward", _backward_fake)
def _backward(
    dout: torch.Tensor,
    dprobs: torch.Tensor | None,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    bias: torch.Tensor | None,
    head_mask: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    stream: int,
    columns: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of qkv and of the head mask.

    With dP~ = dO V^T + dP_ext, the gradient that reaches the map from the context and from whoever used the map:

        dP    = g * D * dP~
        delta = rowsum(P * dP) = rowsum(dO * O) + rowsum(P~ * dP_ext)
        dS    = P * (dP - delta)
        dQ = scale * dS K,  dK = scale * dS^T Q,  dV = P~^T dO,  dg = sum(D * P * dP~)

    P is recomputed from the log-sum-exp. Two launches, no atomics: the result is the same every time.
    """
    heads = qkv.shape[2]
    batch = _batch(qkv, cu_seqlens, max_seqlen)
    dout = dout.contiguous()
    dprobs = None if dprobs is None else dprobs.contiguous()
    probs_seq = 0 if dprobs is None else dprobs.shape[-1]
    arguments = _common_arguments(
        qkv, cu_seqlens, columns, bias, head_mask, seed, dropout_p, stream, max_seqlen, probs_seq, scale
    )
    arguments |= {
        "dout_ptr": dout,
        "dprobs_ptr": qkv if dprobs is None else dprobs,
        "qkv_ptr": qkv,
        "lse_ptr": lse,
        "HAS_DPROBS": dprobs is not None,
    }
    tiles = attention_tiles("backward_dq", qkv)
    blocks = triton.cdiv(max_seqlen, tiles["BLOCK_M"])
    delta = torch.empty_like(lse)
    dqkv = torch.empty_like(qkv)
    if head_mask is None:
        dhead_mask = partials = qkv.new_empty(0)
    else:
        partials = qkv.new_empty(heads, batch * blocks, dtype=torch.float32)
    if blocks * heads * batch > 0:
        wrap_triton(_attention_backward_dq)[(blocks * heads * batch,)](
            out_ptr=out,
            delta_ptr=delta,
            dqkv_ptr=dqkv,
            dhead_mask_ptr=partials,
            batch=batch,
            **arguments,
            **tiles,
        )
        tiles = attention_tiles("backward_dkv", qkv)
        blocks = triton.cdiv(max_seqlen, tiles["BLOCK_N"])
        wrap_triton(_attention_backward_dkv)[(blocks * heads * batch,)](
            delta_ptr=delta, dqkv_ptr=dqkv, **arguments, **tiles
        )
    if head_mask is not None:
        dhead_mask = partials.sum(1).to(head_mask.dtype)
    return dqkv, dhead_mask


forbid_double_backward(_backward, "attention")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    qkv, cu_seqlens, max_seqlen, bias, head_mask, scale, dropout_p, seed, stream, _, columns = inputs
    out, lse, _ = output
    ctx.save_for_backward(qkv, out, lse, cu_seqlens, bias, head_mask, seed, columns)
    ctx.scalars = (max_seqlen, scale, dropout_p, stream)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)


def _autograd(
    ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None, dprobs: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    qkv, out, lse, cu_seqlens, bias, head_mask, seed, columns = ctx.saved_tensors
    max_seqlen, scale, dropout_p, stream = ctx.scalars
    dqkv = dhead_mask = None
    if dout is not None or dprobs is not None:
        dout = torch.zeros_like(out) if dout is None else dout
        dprobs = None if dprobs is None or dprobs.numel() == 0 else dprobs
        dqkv, dhead_mask = _backward(
            dout,
            dprobs,
            qkv,
            out,
            lse,
            cu_seqlens,
            max_seqlen,
            bias,
            head_mask,
            scale,
            dropout_p,
            seed,
            stream,
            columns,
        )
    return dqkv, None, None, None, None if head_mask is None else dhead_mask, *[None] * 6


_forward.register_autograd(_autograd, setup_context=_setup_context)


def attention(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    *,
    bias: torch.Tensor | None = None,
    head_mask: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    stream: int = 0,
    probs_seq: int | None = None,
    columns: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Multi-head attention of each packed sequence with itself.

    Args:
        qkv: (tokens, 3, heads, head_dim) queries, keys and values; head_dim up to 128.
        cu_seqlens: int32 (batch + 1,), first token of each sequence and, last, the number of tokens; sequences may be
            empty. None: every sequence has `max_seqlen` tokens.
        max_seqlen: tokens in the longest sequence.
        bias: additive scores (batch | 1, heads | 1, seq | 1, seq), float, or bool with True where a key is visible;
            seq at least `max_seqlen`. Entries at or under half the dtype's lowest finite value are masked keys; a row
            with no visible key attends uniformly. It gets no gradient.
        head_mask: (heads,) factors on each head's probabilities.
        scale: factor on the scores; default 1 / sqrt(head_dim).
        dropout_p: probability that an attention probability is dropped.
        seed: int64 scalar tensor, what the kernels' dropout is drawn from; needed on a GPU when dropout_p > 0.
        stream: which of the draws of `seed` this call uses.
        probs_seq: return the probabilities in maps of this side; at least `max_seqlen`. None: do not.
        columns: int32 (tokens,), each token's row and column in its map. None: its position in its sequence.

    Returns:
        The context (tokens, heads, head_dim), and, if asked, the probabilities (batch, heads, probs_seq, probs_seq)
        after dropout and head mask, zero outside the tokens; both in qkv's dtype, both differentiable.

    Raises:
        ValueError: for shapes that do not fit each other, a head_dim over 128, a missing seed, mixed devices.
        TypeError: for a dtype that no kernel has.
    """
    _check(qkv, cu_seqlens, max_seqlen, bias, head_mask, dropout_p, seed, probs_seq, columns)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    if not uses_triton(qkv):
        batch = _batch(qkv, cu_seqlens, max_seqlen)
        lengths = [max_seqlen] * batch if cu_seqlens is None else cu_seqlens.diff().tolist()
        return reference.attention(
            qkv,
            lengths,
            bias=bias,
            head_mask=head_mask,
            scale=scale,
            dropout_p=dropout_p,
            probs_shape=None if probs_seq is None else (batch, probs_seq),
            columns=columns,
        )
    if dropout_p > 0.0 and seed is None:
        raise ValueError(f"attention with dropout_p={dropout_p} needs a seed: an int64 scalar tensor on {qkv.device}")
    if bias is not None:
        bias = reference.additive(bias) if bias.dtype == torch.bool else bias
        bias = bias if bias.stride(-1) == 1 else bias.contiguous()
        bias = bias.expand(_batch(qkv, cu_seqlens, max_seqlen), qkv.shape[2], max(max_seqlen, bias.shape[2]), -1)
    out, _, probs = _forward(
        qkv.contiguous(),
        cu_seqlens,
        max_seqlen,
        bias,
        head_mask,
        scale,
        dropout_p,
        seed,
        stream,
        probs_seq or 0,
        columns,
    )
    return out, probs if probs_seq is not None else None


def _check(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    bias: torch.Tensor | None,
    head_mask: torch.Tensor | None,
    dropout_p: float,
    seed: torch.Tensor | None,
    probs_seq: int | None,
    columns: torch.Tensor | None,
) -> None:
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"attention needs qkv of shape (tokens, 3, heads, head_dim), got {tuple(qkv.shape)}")
    heads, head_dim = qkv.shape[2:]
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"attention has kernels for head_dim up to {MAX_HEAD_DIM}, got {head_dim}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1], got {dropout_p}")
    if max_seqlen < 1:
        raise ValueError(f"max_seqlen must be at least 1, got {max_seqlen}")
    if cu_seqlens is None and qkv.shape[0] % max_seqlen != 0:
        raise ValueError(
            f"without cu_seqlens every sequence has max_seqlen={max_seqlen} tokens, but qkv has {qkv.shape[0]} tokens, "
            "not a multiple: pass cu_seqlens"
        )
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32):
        raise ValueError(
            f"cu_seqlens must be int32 of shape (batch + 1,), got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens is not None and (not cu_seqlens.is_cuda or check_mode()) and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        steps = [after - before for before, after in itertools.pairwise(bounds)]
        if not steps or bounds[0] != 0 or bounds[-1] != qkv.shape[0] or min(steps) < 0 or max(steps) > max_seqlen:
            raise ValueError(
                f"cu_seqlens must rise from 0 to the {qkv.shape[0]} tokens of qkv in steps of at most "
                f"max_seqlen={max_seqlen}, got {bounds}"
            )
    if bias is not None:
        if bias.requires_grad:
            raise ValueError("attention has no gradient for bias: pass bias.detach()")
        wanted = (_batch(qkv, cu_seqlens, max_seqlen), heads, max_seqlen, max_seqlen)
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
    check_same_device(
        "attention", qkv=qkv, cu_seqlens=cu_seqlens, bias=bias, head_mask=head_mask, seed=seed, columns=columns
    )

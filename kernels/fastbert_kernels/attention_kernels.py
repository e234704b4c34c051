"""Device code of the attention op: the forward kernel, and dQ and dK/dV of the backward pass.

The derivation stands in `attention.py`. Scores are in base 2 throughout, statistics and sums in float32.

What is read to find a place is read in the kernels themselves. torch.compile (2.13) looks for the tensors that a kernel
writes by walking back from each store: a load ends the walk, a call of a device function does not, and every pointer
that was given to it would be taken for written and cloned.
"""

from .language import tl, triton
from .numerics import LOG2E, MASKED, cast, dot, dropout_keep_map
from .score_tiles import (
    bias_tile,
    load_heads,
    partial_row,
    probs_offsets,
    row_lanes,
    seen_keys,
    softmax_tile,
    spare_row,
    store_heads,
    sum_of_rows,
    sum_ptrs,
)
from .tiles import LOAD_STAGES


@triton.jit(do_not_specialize=["tokens", "site", "keep_threshold"])
def attention_forward(
    qkv_ptr,  # (tokens, 3, heads, HEAD_DIM)
    out_ptr,  # (tokens, heads, HEAD_DIM), dtype of qkv
    stats_ptr,  # (2, heads, tokens) float32: of base-2 scores, each row's maximum and log2 of its sum
    probs_ptr,  # (batch, heads, probs_seq, probs_seq), dtype of qkv; unused without HAS_PROBS
    cu_seqlens_ptr,  # (batch + 1,) int32; unused without HAS_CU_SEQLENS
    columns_ptr,  # (tokens,) int32; unused without HAS_COLUMNS
    order_ptr,  # (batch,) int32, the sequences from first to last; unused without HAS_ORDER
    bias_ptr,  # (batch, heads, max_seqlen, max_seqlen) by strides, last one 1; unused without HAS_BIAS
    key_spans_ptr,  # (batch, 2) int32, see attention.py; unused without HAS_KEY_SPANS
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
    scale,  # above zero
    site,  # int32, which dropout of the model this is: the ops' `stream`, whose name Triton keeps for itself
    keep_threshold,  # int32, see dropout_keep_map
    keep_scale,  # 1 / (1 - dropout_p)
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products, see `numerics.dot`
    HAS_CU_SEQLENS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_KEY_SPANS: tl.constexpr,
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
    b, h = plane // heads, plane % heads
    if HAS_ORDER:
        b = tl.load(order_ptr + b)
        plane = b * heads + h
    start, length = b * max_seqlen, max_seqlen
    if HAS_CU_SEQLENS:
        start = tl.load(cu_seqlens_ptr + b)
        length = tl.load(cu_seqlens_ptr + b + 1) - start
    start = tl.cast(start, tl.int64)
    row_start = (pid % blocks) * BLOCK_M
    scale_log2 = scale * LOG2E
    query_end, bias_end, key_end = length, 0, length
    if HAS_KEY_SPANS:
        bias_end = tl.load(key_spans_ptr + 2 * b)
        key_end = tl.load(key_spans_ptr + 2 * b + 1)
        # Where no key is visible, all are, with scores of 0.
        query_end = tl.where(key_end == 0, 0, length)
        key_end = tl.where(key_end == 0, length, key_end)
    if HAS_PROBS and not HAS_COLUMNS:
        # Blocks of padding rows only have zeros of the map to write.
        keys_read = tl.where(row_start < length, key_end, 0)
    else:
        if row_start >= length:
            return
        keys_read = key_end

    rows = row_start + tl.arange(0, BLOCK_M)
    row_stride = 3 * heads * HEAD_DIM
    qkv_ptr += start * row_stride + h * HEAD_DIM
    k_ptr = qkv_ptr + heads * HEAD_DIM
    v_ptr = k_ptr + heads * HEAD_DIM
    if HAS_BIAS or HAS_KEY_SPANS:
        bias_ptr += b.to(tl.int64) * bias_batch_stride + h.to(tl.int64) * bias_head_stride
    # Without a bias, the instruction that takes the maximum off a score scales it too.
    late_scale = scale_log2
    if HAS_BIAS:
        late_scale = 1.0

    q = load_heads(qkv_ptr, rows, row_stride, query_end, HEAD_DIM, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # Finite where a whole tile may be masked.
    row_max = tl.full([BLOCK_M], MASKED if HAS_KEY_SPANS else float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    # Of itself the compiler copies asynchronously only what a product takes: no bias, where the scores feed none.
    stages: tl.constexpr = LOAD_STAGES if HAS_BIAS and HAS_PROBS else None
    for col_start in tl.range(0, keys_read, BLOCK_N, num_stages=stages):
        cols = col_start + tl.arange(0, BLOCK_N)
        k = load_heads(k_ptr, cols, row_stride, key_end, HEAD_DIM, BLOCK_D)
        s = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), PRECISION)
        if HAS_BIAS:
            s = s * scale_log2 + bias_tile(bias_ptr, rows, cols, bias_row_stride, length, masked_below)
        seen = seen_keys(bias_ptr, col_start, cols, bias_end, key_end, masked_below, HAS_KEY_SPANS)
        s = tl.where(seen[None, :], s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, axis=1) * late_scale)
        rescale = tl.exp2(row_max - new_max)
        p = tl.exp2(s * late_scale - new_max[:, None])
        row_sum = row_sum * rescale + tl.sum(p, axis=1)
        if not HAS_PROBS:
            if HAS_DROPOUT:
                keep = dropout_keep_map(seed_ptr, site, plane, row_start, col_start, keep_threshold, BLOCK_M, BLOCK_N)
                p = tl.where(keep, p, 0.0)
            v = load_heads(v_ptr, cols, row_stride, key_end, HEAD_DIM, BLOCK_D)
            acc = dot(cast(p, v.dtype), v, acc * rescale[:, None], PRECISION)
        row_max = new_max

    factor = 1.0
    if HAS_DROPOUT:
        factor = keep_scale
    if HAS_HEAD_MASK:
        factor *= tl.load(head_mask_ptr + h).to(tl.float32)
    row_scale = factor / row_sum

    if HAS_PROBS:
        # With the statistics known, the map and the context are made of the same tiles.
        row_scale = tl.where(rows < length, row_scale, 0.0)
        if HAS_COLUMNS:
            cols_end = length  # the rest of the map was zeroed by the host
            columns_ptr += start
        else:
            cols_end = probs_seq
        probs_ptr += plane.to(tl.int64) * probs_seq * probs_seq
        for col_start in tl.range(0, cols_end, BLOCK_N, num_stages=LOAD_STAGES):
            cols = col_start + tl.arange(0, BLOCK_N)
            k = load_heads(k_ptr, cols, row_stride, key_end, HEAD_DIM, BLOCK_D)
            s = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), PRECISION) * scale_log2
            if HAS_BIAS:
                s += bias_tile(bias_ptr, rows, cols, bias_row_stride, length, masked_below)
            seen = seen_keys(bias_ptr, col_start, cols, bias_end, key_end, masked_below, HAS_KEY_SPANS)
            valid = (rows[:, None] < length) & seen[None, :]
            p = tl.where(valid, tl.exp2(s - row_max[:, None]), 0.0)
            if HAS_DROPOUT:
                keep = dropout_keep_map(seed_ptr, site, plane, row_start, col_start, keep_threshold, BLOCK_M, BLOCK_N)
                p = tl.where(keep, p, 0.0)
            map_rows, map_cols = rows, cols
            if HAS_COLUMNS:
                map_rows = tl.load(columns_ptr + rows, mask=rows < length, other=0)
                map_cols = tl.load(columns_ptr + cols, mask=cols < length, other=0)
            offsets = probs_offsets(map_rows, map_cols, probs_seq)
            if HAS_COLUMNS:
                written = valid
            else:
                written = (rows[:, None] < probs_seq) & (cols[None, :] < probs_seq)
            tl.store(probs_ptr + offsets, cast(p * row_scale[:, None], probs_ptr.dtype.element_ty), mask=written)
            v = load_heads(v_ptr, cols, row_stride, key_end, HEAD_DIM, BLOCK_D)
            acc = dot(cast(p, v.dtype), v, acc, PRECISION)
    out_ptr += start * heads * HEAD_DIM + h * HEAD_DIM
    store_heads(out_ptr, acc * row_scale[:, None], rows, heads * HEAD_DIM, length, HEAD_DIM, BLOCK_D)
    stats_ptr += h.to(tl.int64) * tokens + start
    tl.store(stats_ptr + rows, row_max, mask=rows < length)
    tl.store(stats_ptr + tl.cast(heads, tl.int64) * tokens + rows, tl.log2(row_sum), mask=rows < length)


@triton.jit(do_not_specialize=["tokens", "site", "keep_threshold"])
def attention_backward_dq(
    dout_ptr,  # (tokens, heads, HEAD_DIM), dtype of qkv
    dprobs_ptr,  # (batch, heads, probs_seq, probs_seq), dtype of qkv; unused without HAS_DPROBS
    qkv_ptr,  # (tokens, 3, heads, HEAD_DIM)
    out_ptr,  # (tokens, heads, HEAD_DIM)
    stats_ptr,  # (2, heads, tokens) float32, from the forward pass
    delta_ptr,  # (2, heads, tokens) float32, and without HAS_BIAS the log-sum-exps: for attention_backward_dkv
    dqkv_ptr,  # (tokens, 3, heads, HEAD_DIM), the query third is written
    partials_ptr,  # (rows, heads, HEAD_DIM) float32: sums of dQ, rows as in `partial_row`; unused without HAS_SUMS
    dhead_mask_ptr,  # (heads, batch, blocks) float32 partial sums; unused without HAS_HEAD_MASK
    cu_seqlens_ptr,  # as in attention_forward, and so on
    columns_ptr,
    order_ptr,
    bias_ptr,
    key_spans_ptr,
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
    site,
    keep_threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products, see `numerics.dot`
    HAS_CU_SEQLENS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_KEY_SPANS: tl.constexpr,
    HAS_HEAD_MASK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_DPROBS: tl.constexpr,
    HAS_WHOLE_DPROBS: tl.constexpr,  # dprobs has dO V^T in it already
    HAS_SUMS: tl.constexpr,
):
    """One program: dQ of BLOCK_M rows of one head of one sequence, and the rows' delta."""
    blocks = tl.cdiv(max_seqlen, BLOCK_M)
    pid = tl.program_id(0)
    plane = pid // blocks
    b, h = plane // heads, plane % heads
    if HAS_ORDER:
        b = tl.load(order_ptr + b)
        plane = b * heads + h
    start, length = b * max_seqlen, max_seqlen
    if HAS_CU_SEQLENS:
        start = tl.load(cu_seqlens_ptr + b)
        length = tl.load(cu_seqlens_ptr + b + 1) - start
    start = tl.cast(start, tl.int64)
    row_start = (pid % blocks) * BLOCK_M
    if HAS_SUMS and HAS_CU_SEQLENS:
        spare = spare_row(start, length, b, BLOCK_M)
        if (row_start == 0) & (spare >= 0):
            dims = tl.arange(0, BLOCK_D)
            zeros = tl.zeros([BLOCK_D], dtype=tl.float32)
            tl.store(partials_ptr + (spare * heads + h) * HEAD_DIM + dims, zeros, mask=dims < HEAD_DIM)
    if row_start >= length:
        if HAS_HEAD_MASK:
            tl.store(dhead_mask_ptr + (h.to(tl.int64) * batch + b) * blocks + pid % blocks, 0.0)
        return
    scale_log2 = scale * LOG2E
    bias_end, key_end = 0, length
    if HAS_KEY_SPANS:
        bias_end = tl.load(key_spans_ptr + 2 * b)
        key_end = tl.load(key_spans_ptr + 2 * b + 1)
        # Where no key is visible, all are, with scores of 0.
        scale_log2 = tl.where(key_end == 0, 0.0, scale_log2)
        key_end = tl.where(key_end == 0, length, key_end)

    rows = row_start + tl.arange(0, BLOCK_M)
    row_stride = 3 * heads * HEAD_DIM
    qkv_ptr += start * row_stride + h * HEAD_DIM
    k_ptr = qkv_ptr + heads * HEAD_DIM
    v_ptr = k_ptr + heads * HEAD_DIM
    head_offset = start * heads * HEAD_DIM + h * HEAD_DIM
    if HAS_BIAS or HAS_KEY_SPANS:
        bias_ptr += b.to(tl.int64) * bias_batch_stride + h.to(tl.int64) * bias_head_stride
    if HAS_DPROBS:
        dprobs_ptr += plane.to(tl.int64) * probs_seq * probs_seq
        if HAS_COLUMNS:
            columns_ptr += start
    factor = 1.0
    if HAS_DROPOUT:
        factor = keep_scale
    g = 1.0
    if HAS_HEAD_MASK:
        g = tl.load(head_mask_ptr + h).to(tl.float32)

    q = load_heads(qkv_ptr, rows, row_stride, length, HEAD_DIM, BLOCK_D)
    dout = load_heads(dout_ptr + head_offset, rows, heads * HEAD_DIM, length, HEAD_DIM, BLOCK_D)
    out = load_heads(out_ptr + head_offset, rows, heads * HEAD_DIM, length, HEAD_DIM, BLOCK_D)
    row_offset = h.to(tl.int64) * tokens + start + rows
    row_max = tl.load(stats_ptr + row_offset, mask=rows < length, other=0.0)
    log_sum = tl.load(stats_ptr + tl.cast(heads, tl.int64) * tokens + row_offset, mask=rows < length, other=0.0)
    if HAS_WHOLE_DPROBS:
        delta = tl.zeros([BLOCK_M], dtype=tl.float32)
    else:
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)

    if HAS_DPROBS:
        for col_start in range(0, key_end, BLOCK_N):
            cols = col_start + tl.arange(0, BLOCK_N)
            k = load_heads(k_ptr, cols, row_stride, key_end, HEAD_DIM, BLOCK_D)
            s = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), PRECISION) * scale_log2
            if HAS_BIAS:
                s += bias_tile(bias_ptr, rows, cols, bias_row_stride, length, masked_below)
            seen = seen_keys(bias_ptr, col_start, cols, bias_end, key_end, masked_below, HAS_KEY_SPANS)
            valid = (rows[:, None] < length) & seen[None, :]
            p = softmax_tile(s, row_max[:, None], log_sum[:, None], valid) * (factor * g)
            if HAS_DROPOUT:
                keep = dropout_keep_map(seed_ptr, site, plane, row_start, col_start, keep_threshold, BLOCK_M, BLOCK_N)
                p = tl.where(keep, p, 0.0)
            map_rows, map_cols = rows, cols
            if HAS_COLUMNS:
                map_rows = tl.load(columns_ptr + rows, mask=rows < length, other=0)
                map_cols = tl.load(columns_ptr + cols, mask=cols < length, other=0)
            offsets = probs_offsets(map_rows, map_cols, probs_seq)
            dprobs = tl.load(dprobs_ptr + offsets, mask=valid, other=0.0)
            delta += tl.sum(p * dprobs.to(tl.float32), axis=1)
    tl.store(delta_ptr + row_offset, delta, mask=rows < length)
    if not HAS_BIAS:
        lse_offset = tl.cast(heads, tl.int64) * tokens + row_offset
        tl.store(delta_ptr + lse_offset, row_max + log_sum, mask=rows < length)

    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    dhead_mask = tl.zeros([BLOCK_M], dtype=tl.float32)
    for col_start in range(0, key_end, BLOCK_N):
        cols = col_start + tl.arange(0, BLOCK_N)
        k = load_heads(k_ptr, cols, row_stride, key_end, HEAD_DIM, BLOCK_D)
        s = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), PRECISION) * scale_log2
        if HAS_BIAS:
            s += bias_tile(bias_ptr, rows, cols, bias_row_stride, length, masked_below)
        seen = seen_keys(bias_ptr, col_start, cols, bias_end, key_end, masked_below, HAS_KEY_SPANS)
        valid = (rows[:, None] < length) & seen[None, :]
        p = softmax_tile(s, row_max[:, None], log_sum[:, None], valid)
        dp = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        if not HAS_WHOLE_DPROBS:
            v = load_heads(v_ptr, cols, row_stride, key_end, HEAD_DIM, BLOCK_D)
            dp = dot(dout, tl.trans(v), dp, PRECISION)
        if HAS_DPROBS:
            map_rows, map_cols = rows, cols
            if HAS_COLUMNS:
                map_rows = tl.load(columns_ptr + rows, mask=rows < length, other=0)
                map_cols = tl.load(columns_ptr + cols, mask=cols < length, other=0)
            offsets = probs_offsets(map_rows, map_cols, probs_seq)
            dp += tl.load(dprobs_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        dp *= factor
        if HAS_DROPOUT:
            keep = dropout_keep_map(seed_ptr, site, plane, row_start, col_start, keep_threshold, BLOCK_M, BLOCK_N)
            dp = tl.where(keep, dp, 0.0)
        if HAS_HEAD_MASK:
            dhead_mask += tl.sum(p * dp, axis=1)
            dp *= g
        ds = p * (dp - delta[:, None])
        dq = dot(cast(ds, k.dtype), k, dq, PRECISION)
    dqkv_ptr += start * row_stride + h * HEAD_DIM
    dq *= scale
    store_heads(dqkv_ptr, dq, rows, row_stride, length, HEAD_DIM, BLOCK_D)
    if HAS_SUMS:  # rows past the end are zeros
        row = partial_row(start, b, pid % blocks, blocks, BLOCK_M, HAS_CU_SEQLENS)
        sums = sum_of_rows(dq, dqkv_ptr.dtype.element_ty)
        ptrs, mask = sum_ptrs(partials_ptr + (row * heads + h) * HEAD_DIM, sums, HEAD_DIM)
        tl.store(ptrs, sums, mask=mask)
    if HAS_HEAD_MASK:
        partial = dhead_mask_ptr + (h.to(tl.int64) * batch + b) * blocks + pid % blocks
        tl.store(partial, tl.sum(dhead_mask, axis=0))


@triton.jit(do_not_specialize=["tokens", "site", "keep_threshold"])
def attention_backward_dkv(
    dout_ptr,  # (tokens, heads, HEAD_DIM), dtype of qkv
    dprobs_ptr,  # (batch, heads, probs_seq, probs_seq), dtype of qkv; unused without HAS_DPROBS
    qkv_ptr,  # (tokens, 3, heads, HEAD_DIM)
    stats_ptr,  # (2, heads, tokens) float32, from the forward pass
    delta_ptr,  # (heads, tokens) float32, from attention_backward_dq
    dqkv_ptr,  # (tokens, 3, heads, HEAD_DIM), the key and value thirds are written
    partials_ptr,  # (rows, 2, heads, HEAD_DIM) float32: sums of dK and dV; unused without HAS_SUMS
    cu_seqlens_ptr,  # as in attention_forward, and so on
    columns_ptr,
    order_ptr,
    bias_ptr,
    key_spans_ptr,
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
    site,
    keep_threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products, see `numerics.dot`
    HAS_CU_SEQLENS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_KEY_SPANS: tl.constexpr,
    HAS_HEAD_MASK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_DPROBS: tl.constexpr,
    HAS_WHOLE_DPROBS: tl.constexpr,
    HAS_SUMS: tl.constexpr,
):
    """One program: dK and dV of BLOCK_N keys of one head of one sequence, over tiles of BLOCK_M query rows.

    Scores are computed transposed, [BLOCK_N, BLOCK_M], so that P^T and dS^T feed the next product from registers. Their
    edges need no mask: rows past the end are zeros in q and dO, keys past it are not stored.
    """
    blocks = tl.cdiv(max_seqlen, BLOCK_N)
    pid = tl.program_id(0)
    plane = pid // blocks
    b, h = plane // heads, plane % heads
    if HAS_ORDER:
        b = tl.load(order_ptr + b)
        plane = b * heads + h
    start, length = b * max_seqlen, max_seqlen
    if HAS_CU_SEQLENS:
        start = tl.load(cu_seqlens_ptr + b)
        length = tl.load(cu_seqlens_ptr + b + 1) - start
    start = tl.cast(start, tl.int64)
    col_start = (pid % blocks) * BLOCK_N
    third = heads * HEAD_DIM
    if HAS_SUMS and HAS_CU_SEQLENS:
        spare = spare_row(start, length, b, BLOCK_N)
        if (col_start == 0) & (spare >= 0):
            dims = tl.arange(0, BLOCK_D)
            zeros = tl.zeros([BLOCK_D], dtype=tl.float32)
            ptrs = partials_ptr + spare * 2 * third + h * HEAD_DIM + dims
            tl.store(ptrs, zeros, mask=dims < HEAD_DIM)
            tl.store(ptrs + third, zeros, mask=dims < HEAD_DIM)
    if col_start >= length:
        return
    scale_log2 = scale * LOG2E
    bias_end, key_end = 0, length
    if HAS_KEY_SPANS:
        bias_end = tl.load(key_spans_ptr + 2 * b)
        key_end = tl.load(key_spans_ptr + 2 * b + 1)
        # Where no key is visible, all are, with scores of 0.
        scale_log2 = tl.where(key_end == 0, 0.0, scale_log2)
        key_end = tl.where(key_end == 0, length, key_end)
    rows_read = length
    if HAS_KEY_SPANS:
        # Keys that no row sees have gradients of 0.
        rows_read = tl.where(col_start < key_end, length, 0)

    cols = col_start + tl.arange(0, BLOCK_N)
    row_stride = 3 * third
    qkv_ptr += start * row_stride + h * HEAD_DIM
    dout_ptr += start * third + h * HEAD_DIM
    if HAS_BIAS or HAS_KEY_SPANS:
        bias_ptr += b.to(tl.int64) * bias_batch_stride + h.to(tl.int64) * bias_head_stride
    if HAS_DPROBS:
        dprobs_ptr += plane.to(tl.int64) * probs_seq * probs_seq
        if HAS_COLUMNS:
            columns_ptr += start
    max_ptr = stats_ptr + h.to(tl.int64) * tokens + start
    sum_ptr = max_ptr + tl.cast(heads, tl.int64) * tokens
    delta_ptr += h.to(tl.int64) * tokens + start
    lse_ptr = delta_ptr + tl.cast(heads, tl.int64) * tokens
    factor = 1.0
    if HAS_DROPOUT:
        factor = keep_scale
    if HAS_HEAD_MASK:
        factor *= tl.load(head_mask_ptr + h).to(tl.float32)

    k = load_heads(qkv_ptr + third, cols, row_stride, key_end, HEAD_DIM, BLOCK_D)
    v = load_heads(qkv_ptr + 2 * third, cols, row_stride, key_end, HEAD_DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    lanes = row_lanes(BLOCK_M)
    for row_start in range(0, rows_read, BLOCK_M):
        rows = row_start + tl.arange(0, BLOCK_M)
        vector_rows = row_start + lanes
        inside = vector_rows < length
        q = load_heads(qkv_ptr, rows, row_stride, length, HEAD_DIM, BLOCK_D)
        dout = load_heads(dout_ptr, rows, third, length, HEAD_DIM, BLOCK_D)
        delta = tl.load(delta_ptr + vector_rows, mask=inside, other=0.0)
        s = dot(k, tl.trans(q), tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32), PRECISION) * scale_log2
        if HAS_BIAS:
            s += tl.trans(bias_tile(bias_ptr, rows, cols, bias_row_stride, length, masked_below))
            # The maximum of a row with no visible key would swallow the logarithm.
            row_max = tl.load(max_ptr + vector_rows, mask=inside, other=0.0)
            log_sum = tl.load(sum_ptr + vector_rows, mask=inside, other=0.0)
            p = tl.exp2(s - row_max[None, :] - log_sum[None, :])
        else:
            lse = tl.load(lse_ptr + vector_rows, mask=inside, other=0.0)
            p = tl.exp2(s - lse[None, :])
        dp = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        if not HAS_WHOLE_DPROBS:
            dp = dot(v, tl.trans(dout), dp, PRECISION)
        if HAS_DPROBS:
            map_rows, map_cols = rows, cols
            if HAS_COLUMNS:
                map_rows = tl.load(columns_ptr + rows, mask=rows < length, other=0)
                map_cols = tl.load(columns_ptr + cols, mask=cols < length, other=0)
            offsets = probs_offsets(map_rows, map_cols, probs_seq)
            valid = (rows[:, None] < length) & (cols[None, :] < key_end)
            dprobs = tl.load(dprobs_ptr + offsets, mask=valid, other=0.0)
            dp += tl.trans(dprobs).to(tl.float32)
        p_out = p
        if HAS_DROPOUT:
            keep = tl.trans(
                dropout_keep_map(seed_ptr, site, plane, row_start, col_start, keep_threshold, BLOCK_M, BLOCK_N)
            )
            p_out = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp, 0.0)
        dv = dot(cast(p_out, dout.dtype), dout, dv, PRECISION)
        ds = p * (dp * factor - delta[None, :])
        dk = dot(cast(ds, q.dtype), q, dk, PRECISION)
    if HAS_KEY_SPANS:
        seen = seen_keys(bias_ptr, col_start, cols, bias_end, key_end, masked_below, HAS_KEY_SPANS)
        dk = tl.where(seen[:, None], dk, 0.0)
        dv = tl.where(seen[:, None], dv, 0.0)
    dk *= scale
    dv *= factor
    dqkv_ptr += start * row_stride + h * HEAD_DIM
    store_heads(dqkv_ptr + third, dk, cols, row_stride, length, HEAD_DIM, BLOCK_D)
    store_heads(dqkv_ptr + 2 * third, dv, cols, row_stride, length, HEAD_DIM, BLOCK_D)
    if HAS_SUMS:
        stored = cols[:, None] < length
        row = partial_row(start, b, pid % blocks, blocks, BLOCK_N, HAS_CU_SEQLENS)
        sums = sum_of_rows(tl.where(stored, dk, 0.0), dqkv_ptr.dtype.element_ty)
        ptrs, mask = sum_ptrs(partials_ptr + row * 2 * third + h * HEAD_DIM, sums, HEAD_DIM)
        tl.store(ptrs, sums, mask=mask)
        tl.store(ptrs + third, sum_of_rows(tl.where(stored, dv, 0.0), dqkv_ptr.dtype.element_ty), mask=mask)

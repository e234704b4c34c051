"""Device code of the relation loss: the forward kernel, and dA and dB of the backward pass.

The derivation stands in `relation.py`. Softmax scores are in base 2, statistics and sums in float32.
"""

from .language import tl, triton
from .numerics import LOG2E, cast, dot
from .score_tiles import load_heads, row_lanes, store_heads


@triton.jit(do_not_specialize=["tokens"])
def relation_forward(
    student_a_ptr,  # (tokens, heads, STUDENT_DIM) by its row stride
    student_b_ptr,  # (tokens, heads, STUDENT_DIM) by its row stride
    teacher_a_ptr,  # (tokens, heads, TEACHER_DIM) by its row stride
    teacher_b_ptr,  # (tokens, heads, TEACHER_DIM) by its row stride
    loss_ptr,  # (heads, tokens) float32
    lse_ptr,  # (2, heads, tokens) float32: of base-2 scores, student's and teacher's; unused by "mse"
    cu_seqlens_ptr,  # (batch + 1,) int32; unused without HAS_CU_SEQLENS
    tokens,
    heads,
    max_seqlen,
    student_a_row_stride,
    student_b_row_stride,
    teacher_a_row_stride,
    teacher_b_row_stride,
    student_scale,
    teacher_scale,
    STUDENT_DIM: tl.constexpr,
    TEACHER_DIM: tl.constexpr,
    BLOCK_STUDENT: tl.constexpr,
    BLOCK_TEACHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products, see `numerics.dot`
    HAS_CU_SEQLENS: tl.constexpr,
    HAS_SOFTMAX: tl.constexpr,  # "kl", else "mse"
):
    """One program: BLOCK_M rows of one head of one sequence."""
    blocks = tl.cdiv(max_seqlen, BLOCK_M)
    pid = tl.program_id(0)
    plane = pid // blocks
    b, h = plane // heads, plane % heads
    start, length = b * max_seqlen, max_seqlen
    if HAS_CU_SEQLENS:
        start = tl.load(cu_seqlens_ptr + b)
        length = tl.load(cu_seqlens_ptr + b + 1) - start
    start = tl.cast(start, tl.int64)
    row_start = (pid % blocks) * BLOCK_M
    if row_start >= length:
        return

    rows = row_start + tl.arange(0, BLOCK_M)
    student_a_ptr += start * student_a_row_stride + h * STUDENT_DIM
    student_b_ptr += start * student_b_row_stride + h * STUDENT_DIM
    teacher_a_ptr += start * teacher_a_row_stride + h * TEACHER_DIM
    teacher_b_ptr += start * teacher_b_row_stride + h * TEACHER_DIM
    student_a = load_heads(student_a_ptr, rows, student_a_row_stride, length, STUDENT_DIM, BLOCK_STUDENT)
    teacher_a = load_heads(teacher_a_ptr, rows, teacher_a_row_stride, length, TEACHER_DIM, BLOCK_TEACHER)
    # "mse": the running sum of squares. "kl": the running sum of p_t * (S_t - S_s), to be divided by teacher_sum.
    gap = tl.zeros([BLOCK_M], dtype=tl.float32)
    student_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    teacher_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    student_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    teacher_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    zeros = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for col_start in range(0, length, BLOCK_N):
        cols = col_start + tl.arange(0, BLOCK_N)
        student_b = load_heads(student_b_ptr, cols, student_b_row_stride, length, STUDENT_DIM, BLOCK_STUDENT)
        teacher_b = load_heads(teacher_b_ptr, cols, teacher_b_row_stride, length, TEACHER_DIM, BLOCK_TEACHER)
        s = dot(student_a, tl.trans(student_b), zeros, PRECISION)
        t = dot(teacher_a, tl.trans(teacher_b), zeros, PRECISION)
        # Past the sequence both are 0, and so is their difference.
        if not HAS_SOFTMAX:
            difference = s * student_scale - t * teacher_scale
            gap += tl.sum(difference * difference, axis=1)
        else:
            s *= student_scale * LOG2E
            t *= teacher_scale * LOG2E
            difference = t - s
            s = tl.where(cols[None, :] < length, s, float("-inf"))
            t = tl.where(cols[None, :] < length, t, float("-inf"))
            new_max = tl.maximum(student_max, tl.max(s, axis=1))
            student_sum = student_sum * tl.exp2(student_max - new_max) + tl.sum(tl.exp2(s - new_max[:, None]), axis=1)
            student_max = new_max
            new_max = tl.maximum(teacher_max, tl.max(t, axis=1))
            p = tl.exp2(t - new_max[:, None])
            rescale = tl.exp2(teacher_max - new_max)
            teacher_sum = teacher_sum * rescale + tl.sum(p, axis=1)
            gap = gap * rescale + tl.sum(p * difference, axis=1)
            teacher_max = new_max

    row_offset = h.to(tl.int64) * tokens + start + rows
    if HAS_SOFTMAX:
        student_lse = student_max + tl.log2(student_sum)
        teacher_lse = teacher_max + tl.log2(teacher_sum)
        gap = (gap / teacher_sum - teacher_lse + student_lse) / LOG2E
        tl.store(lse_ptr + row_offset, student_lse, mask=rows < length)
        tl.store(lse_ptr + tl.cast(heads, tl.int64) * tokens + row_offset, teacher_lse, mask=rows < length)
    tl.store(loss_ptr + row_offset, gap, mask=rows < length)


@triton.jit
def _score_gradient(s, t, student_lse, teacher_lse, student_scale, teacher_scale, HAS_SOFTMAX: tl.constexpr):
    """The gradient of the row's loss by its scores S_s, of one tile of the two products A B^T.

    The log-sum-exps come shaped to broadcast over the tile.
    """
    if not HAS_SOFTMAX:
        gradient = 2.0 * (s * student_scale - t * teacher_scale)
    else:
        p_student = tl.exp2(s * (student_scale * LOG2E) - student_lse)
        p_teacher = tl.exp2(t * (teacher_scale * LOG2E) - teacher_lse)
        gradient = p_student - p_teacher
    return gradient


@triton.jit(do_not_specialize=["tokens"])
def relation_backward_a(
    student_a_ptr,  # as in relation_forward, and so on
    student_b_ptr,
    teacher_a_ptr,
    teacher_b_ptr,
    lse_ptr,
    dloss_ptr,  # (heads, tokens) float32, gradient of each row's loss
    da_ptr,  # (tokens, heads, STUDENT_DIM), dtype of student_a
    cu_seqlens_ptr,
    tokens,
    heads,
    max_seqlen,
    student_a_row_stride,
    student_b_row_stride,
    teacher_a_row_stride,
    teacher_b_row_stride,
    student_scale,
    teacher_scale,
    STUDENT_DIM: tl.constexpr,
    TEACHER_DIM: tl.constexpr,
    BLOCK_STUDENT: tl.constexpr,
    BLOCK_TEACHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_CU_SEQLENS: tl.constexpr,
    HAS_SOFTMAX: tl.constexpr,
):
    """One program: dA of BLOCK_M rows of one head of one sequence."""
    blocks = tl.cdiv(max_seqlen, BLOCK_M)
    pid = tl.program_id(0)
    plane = pid // blocks
    b, h = plane // heads, plane % heads
    start, length = b * max_seqlen, max_seqlen
    if HAS_CU_SEQLENS:
        start = tl.load(cu_seqlens_ptr + b)
        length = tl.load(cu_seqlens_ptr + b + 1) - start
    start = tl.cast(start, tl.int64)
    row_start = (pid % blocks) * BLOCK_M
    if row_start >= length:
        return

    rows = row_start + tl.arange(0, BLOCK_M)
    student_a_ptr += start * student_a_row_stride + h * STUDENT_DIM
    student_b_ptr += start * student_b_row_stride + h * STUDENT_DIM
    teacher_a_ptr += start * teacher_a_row_stride + h * TEACHER_DIM
    teacher_b_ptr += start * teacher_b_row_stride + h * TEACHER_DIM
    student_a = load_heads(student_a_ptr, rows, student_a_row_stride, length, STUDENT_DIM, BLOCK_STUDENT)
    teacher_a = load_heads(teacher_a_ptr, rows, teacher_a_row_stride, length, TEACHER_DIM, BLOCK_TEACHER)
    row_offset = h.to(tl.int64) * tokens + start + rows
    dloss = tl.load(dloss_ptr + row_offset, mask=rows < length, other=0.0)
    student_lse = tl.zeros([BLOCK_M], dtype=tl.float32)
    teacher_lse = tl.zeros([BLOCK_M], dtype=tl.float32)
    if HAS_SOFTMAX:
        student_lse = tl.load(lse_ptr + row_offset, mask=rows < length, other=0.0)
        teacher_lse = tl.load(lse_ptr + tl.cast(heads, tl.int64) * tokens + row_offset, mask=rows < length, other=0.0)
    zeros = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    da = tl.zeros([BLOCK_M, BLOCK_STUDENT], dtype=tl.float32)
    for col_start in range(0, length, BLOCK_N):
        cols = col_start + tl.arange(0, BLOCK_N)
        student_b = load_heads(student_b_ptr, cols, student_b_row_stride, length, STUDENT_DIM, BLOCK_STUDENT)
        teacher_b = load_heads(teacher_b_ptr, cols, teacher_b_row_stride, length, TEACHER_DIM, BLOCK_TEACHER)
        s = dot(student_a, tl.trans(student_b), zeros, PRECISION)
        t = dot(teacher_a, tl.trans(teacher_b), zeros, PRECISION)
        ds = _score_gradient(
            s, t, student_lse[:, None], teacher_lse[:, None], student_scale, teacher_scale, HAS_SOFTMAX
        )
        # Past the sequence exp2(-lse) may be infinite, and infinity times the zeros of student_b is not zero.
        ds = tl.where(cols[None, :] < length, ds, 0.0)
        da = dot(cast(ds, student_b.dtype), student_b, da, PRECISION)
    da *= (dloss * student_scale)[:, None]
    da_ptr += start * heads * STUDENT_DIM + h * STUDENT_DIM
    store_heads(da_ptr, da, rows, heads * STUDENT_DIM, length, STUDENT_DIM, BLOCK_STUDENT)


@triton.jit(do_not_specialize=["tokens"])
def relation_backward_b(
    student_a_ptr,  # as in relation_forward, and so on
    student_b_ptr,
    teacher_a_ptr,
    teacher_b_ptr,
    lse_ptr,
    dloss_ptr,  # (heads, tokens) float32, gradient of each row's loss over `dloss_max`
    dloss_max_ptr,  # () float32
    db_ptr,  # (tokens, heads, STUDENT_DIM), dtype of student_b
    cu_seqlens_ptr,
    tokens,
    heads,
    max_seqlen,
    student_a_row_stride,
    student_b_row_stride,
    teacher_a_row_stride,
    teacher_b_row_stride,
    student_scale,
    teacher_scale,
    STUDENT_DIM: tl.constexpr,
    TEACHER_DIM: tl.constexpr,
    BLOCK_STUDENT: tl.constexpr,
    BLOCK_TEACHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_CU_SEQLENS: tl.constexpr,
    HAS_SOFTMAX: tl.constexpr,
):
    """One program: dB of BLOCK_N columns of one head of one sequence, over tiles of BLOCK_M rows.

    Scores are computed transposed, [BLOCK_N, BLOCK_M], so that dS^T feeds the next product from registers.
    """
    blocks = tl.cdiv(max_seqlen, BLOCK_N)
    pid = tl.program_id(0)
    plane = pid // blocks
    b, h = plane // heads, plane % heads
    start, length = b * max_seqlen, max_seqlen
    if HAS_CU_SEQLENS:
        start = tl.load(cu_seqlens_ptr + b)
        length = tl.load(cu_seqlens_ptr + b + 1) - start
    start = tl.cast(start, tl.int64)
    col_start = (pid % blocks) * BLOCK_N
    if col_start >= length:
        return

    cols = col_start + tl.arange(0, BLOCK_N)
    student_a_ptr += start * student_a_row_stride + h * STUDENT_DIM
    student_b_ptr += start * student_b_row_stride + h * STUDENT_DIM
    teacher_a_ptr += start * teacher_a_row_stride + h * TEACHER_DIM
    teacher_b_ptr += start * teacher_b_row_stride + h * TEACHER_DIM
    row_offset = h.to(tl.int64) * tokens + start
    dloss_ptr += row_offset
    student_lse_ptr = lse_ptr + row_offset
    teacher_lse_ptr = student_lse_ptr + tl.cast(heads, tl.int64) * tokens
    student_b = load_heads(student_b_ptr, cols, student_b_row_stride, length, STUDENT_DIM, BLOCK_STUDENT)
    teacher_b = load_heads(teacher_b_ptr, cols, teacher_b_row_stride, length, TEACHER_DIM, BLOCK_TEACHER)
    student_lse = tl.zeros([BLOCK_M], dtype=tl.float32)
    teacher_lse = tl.zeros([BLOCK_M], dtype=tl.float32)
    zeros = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    db = tl.zeros([BLOCK_N, BLOCK_STUDENT], dtype=tl.float32)
    lanes = row_lanes(BLOCK_M)
    for row_start in range(0, length, BLOCK_M):
        rows = row_start + tl.arange(0, BLOCK_M)
        vector_rows = row_start + lanes
        inside = vector_rows < length
        student_a = load_heads(student_a_ptr, rows, student_a_row_stride, length, STUDENT_DIM, BLOCK_STUDENT)
        teacher_a = load_heads(teacher_a_ptr, rows, teacher_a_row_stride, length, TEACHER_DIM, BLOCK_TEACHER)
        dloss = tl.load(dloss_ptr + vector_rows, mask=inside, other=0.0)
        if HAS_SOFTMAX:
            student_lse = tl.load(student_lse_ptr + vector_rows, mask=inside, other=0.0)
            teacher_lse = tl.load(teacher_lse_ptr + vector_rows, mask=inside, other=0.0)
        s = dot(student_b, tl.trans(student_a), zeros, PRECISION)
        t = dot(teacher_b, tl.trans(teacher_a), zeros, PRECISION)
        # Rows past the sequence have dloss = 0; columns past it are not stored.
        ds = dloss[None, :] * _score_gradient(
            s, t, student_lse[None, :], teacher_lse[None, :], student_scale, teacher_scale, HAS_SOFTMAX
        )
        db = dot(cast(ds, student_a.dtype), student_a, db, PRECISION)
    db *= tl.load(dloss_max_ptr) * student_scale
    db_ptr += start * heads * STUDENT_DIM + h * STUDENT_DIM
    store_heads(db_ptr, db, cols, heads * STUDENT_DIM, length, STUDENT_DIM, BLOCK_STUDENT)

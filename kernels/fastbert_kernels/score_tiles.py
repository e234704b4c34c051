"""Device functions on tiles of heads and of scores, which the attention and the relation kernels share."""

from packaging.version import Version

from .backend import INTERPRETED
from .language import MISSING, tl, triton
from .numerics import LOG2E, MASKED, cast, dot

#: Whether a short vector is loaded by every thread that uses a part of it, as compilers before Triton 3.7 have it.
_LOADED_BY_EVERY_USER: tl.constexpr = tl.constexpr(
    MISSING is None and not INTERPRETED and Version(triton.__version__) < Version("3.7")
)


@triton.jit
def row_lanes(BLOCK_M: tl.constexpr):
    """`tl.arange(0, BLOCK_M)`, for the addresses of vectors along the columns of a tile.

    Where each thread would copy every element that it uses, 16 and not one, the addresses come from a scan: that the
    compiler does not compute again in the layout of the tile, and so does not load in it.
    """
    if _LOADED_BY_EVERY_USER:
        lanes = tl.cumsum(tl.full([BLOCK_M], 1, dtype=tl.int32), 0) - 1
    else:
        lanes = tl.arange(0, BLOCK_M)
    return lanes


@triton.jit
def load_heads(ptr, rows, row_stride, length, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head, zeros past `length` and past HEAD_DIM: [rows, BLOCK_D]."""
    dims = tl.arange(0, BLOCK_D)
    mask = rows[:, None] < length
    if HEAD_DIM != BLOCK_D:
        mask = mask & (dims[None, :] < HEAD_DIM)
    return tl.load(ptr + rows[:, None].to(tl.int64) * row_stride + dims[None, :], mask=mask, other=0.0)


@triton.jit
def store_heads(ptr, x, rows, row_stride, length, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    mask = rows[:, None] < length
    if HEAD_DIM != BLOCK_D:
        mask = mask & (dims[None, :] < HEAD_DIM)
    ptrs = ptr + rows[:, None].to(tl.int64) * row_stride + dims[None, :]
    tl.store(ptrs, cast(x, ptr.dtype.element_ty), mask=mask)


@triton.jit
def bias_tile(bias_ptr, rows, cols, row_stride, length, masked_below):
    """The additive mask of one tile, in base 2, masked entries at MASKED: [BLOCK_M, BLOCK_N]."""
    mask = (rows[:, None] < length) & (cols[None, :] < length)
    ptrs = bias_ptr + rows[:, None].to(tl.int64) * row_stride + cols[None, :]
    bias = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    return tl.where(bias <= masked_below, MASKED, bias * LOG2E)


@triton.jit
def seen_keys(bias_ptr, col_start, cols, bias_end, key_end, masked_below, HAS_KEY_SPANS: tl.constexpr):
    """Which keys of a tile are before `key_end` and, by a mask of one row, not masked before `bias_end`: [BLOCK_N]."""
    seen = cols < key_end
    if HAS_KEY_SPANS:
        if col_start < bias_end:  # a branch, which costs fewer registers than a load whose mask is empty
            bias = tl.load(bias_ptr + cols, mask=cols < bias_end, other=0.0)
            seen = seen & (bias.to(tl.float32) > masked_below)
    return seen


@triton.jit
def probs_offsets(rows, cols, probs_seq):
    """Offsets of a tile inside one (probs_seq, probs_seq) map: int64 [BLOCK_M, BLOCK_N]."""
    return rows[:, None].to(tl.int64) * probs_seq + cols[None, :]


@triton.jit
def softmax_tile(s, row_max, log_sum, valid):
    """P of one tile from base-2 scores and the two parts of the log-sum-exp, zero where not valid.

    The parts stay apart because the maximum of a row with no visible key would swallow the logarithm.
    """
    return tl.where(valid, tl.exp2(s - row_max - log_sum), 0.0)


@triton.jit
def partial_row(start, b, block, blocks, BLOCK_ROWS: tl.constexpr, HAS_CU_SEQLENS: tl.constexpr):
    """Where the program of a sequence's `block` leaves its partial sums: int64, a row of its own.

    The rows of ragged sequences are numbered by their tokens, so that short ones do not have as many as the longest:
    in front of a sequence that begins at `start` lie start / BLOCK_ROWS + b at most.
    """
    row = tl.cast(b, tl.int64) * blocks + block
    if HAS_CU_SEQLENS:
        row = start // BLOCK_ROWS + b + block
    return row


@triton.jit
def spare_row(start, length, b, BLOCK_ROWS: tl.constexpr):
    """Of ragged sequences, the row of `partial_row` that this one has and none of its programs writes, -1 for none."""
    last = (start + length) // BLOCK_ROWS + b
    return tl.where(start // BLOCK_ROWS + b + tl.cdiv(length, BLOCK_ROWS) == last, last, -1)


@triton.jit
def sum_of_rows(x, dtype: tl.constexpr):
    """Sums over the rows of x, rounded to `dtype`: float32 [columns, n], n copies.

    In half precision by a product with ones: threads hold a tile of 128 by 64 so that adding its rows takes them 100
    shuffles, as long as 800 other instructions.
    """
    if dtype == tl.float32:
        sums = tl.sum(x, axis=0)[:, None]
    else:
        ones = tl.full([x.shape[0], 16], 1.0, dtype=tl.float32)
        sums = dot(tl.trans(cast(x, dtype)), cast(ones, dtype), tl.zeros([x.shape[1], 16], dtype=tl.float32))
    return sums


@triton.jit
def sum_ptrs(ptr, sums, HEAD_DIM: tl.constexpr):
    """Where `sum_of_rows` is stored, and the mask that takes one of its copies."""
    dims, copies = tl.arange(0, sums.shape[0])[:, None], tl.arange(0, sums.shape[1])[None, :]
    return ptr + dims + copies * 0, (dims < HEAD_DIM) & (copies == 0)

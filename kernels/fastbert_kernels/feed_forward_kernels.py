"""The feed-forward block's products with the activation inside, forward and backward.

Both are persistent: a program goes through tiles of the output, a tile by a sum over BLOCK_K columns at a time. Two
programs share a multiprocessor, so that one multiplies while the other is at its activation.
"""

from .language import tl, triton
from .numerics import activation, activation_grad, dot, known_multiple, load_rows, load_vector, store_rows


@triton.jit
def _tile(number, row_blocks, col_blocks, BLOCK_GROUP: tl.constexpr):
    """Block row and block column of a tile, BLOCK_GROUP rows at a time: what runs at once shares operands in L2."""
    group = number // (BLOCK_GROUP * col_blocks)
    height = min(row_blocks - group * BLOCK_GROUP, BLOCK_GROUP)
    within = number % (BLOCK_GROUP * col_blocks)
    return group * BLOCK_GROUP + within % height, within // height


@triton.jit
def _operand(ptr, rows, features, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_DESCRIPTORS: tl.constexpr):
    """What `_load` takes of a row-major matrix (rows, features): a descriptor of its tiles, or the pointer."""
    if HAS_DESCRIPTORS:
        operand = tl.make_tensor_descriptor(ptr, [rows, features], [features, 1], [BLOCK_M, BLOCK_N])
    else:
        operand = ptr
    return operand


@triton.jit
def _load(
    operand, row_start, col_start, rows, features,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """A tile of an operand in its own dtype, zero outside the matrix: [BLOCK_M, BLOCK_N]."""
    if HAS_DESCRIPTORS:
        tile = operand.load([row_start, col_start])
    else:
        row = row_start + tl.arange(0, BLOCK_M)
        col = col_start + tl.arange(0, BLOCK_N)
        mask = (row[:, None] < rows) & (col[None, :] < features)
        tile = tl.load(operand + row[:, None].to(tl.int64) * features + col[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def _halves(x):
    """The left and the right half of [BLOCK_M, BLOCK_N]."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def _quarters(x):
    """[BLOCK_M, BLOCK_N] by four parts of its columns: what is done to one at a time takes fewer registers."""
    left, right = _halves(x)
    first, second = _halves(left)
    third, fourth = _halves(right)
    return first, second, third, fourth


@triton.jit(do_not_specialize=["count"])
def feed_forward_forward(
    x_ptr,  # (count, inner)
    weight_ptr,  # (features, inner), dtype of x
    bias_ptr,  # (features,)
    y_ptr,  # (count, features), dtype of x
    pre_ptr,  # (count, features), dtype of x; unused without HAS_PRE
    count,
    inner,
    features,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_MULTIPLE: tl.constexpr,  # see launch.row_multiple
    BLOCK_K: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr,
    HAS_PRE: tl.constexpr,
):
    """y = f(pre), pre = x @ weight^T + bias. One program: every num_programs(0)-th tile of y."""
    inner, features = known_multiple(inner, ROW_MULTIPLE), known_multiple(features, ROW_MULTIPLE)
    x = _operand(x_ptr, count, inner, BLOCK_M, BLOCK_K, HAS_DESCRIPTORS)
    weight = _operand(weight_ptr, features, inner, BLOCK_N, BLOCK_K, HAS_DESCRIPTORS)
    row_blocks, col_blocks = tl.cdiv(count, BLOCK_M), tl.cdiv(features, BLOCK_N)
    for number in tl.range(tl.program_id(0), row_blocks * col_blocks, tl.num_programs(0)):
        row_block, col_block = _tile(number, row_blocks, col_blocks, BLOCK_GROUP)
        row_start, col_start = row_block * BLOCK_M, col_block * BLOCK_N
        pre = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k in tl.range(0, inner, BLOCK_K):
            a = _load(x, row_start, k, count, inner, BLOCK_M, BLOCK_K, HAS_DESCRIPTORS)
            b = _load(weight, col_start, k, features, inner, BLOCK_N, BLOCK_K, HAS_DESCRIPTORS)
            pre = dot(a, tl.trans(b), pre)
        rows = row_start + tl.arange(0, BLOCK_M)
        quarters = _quarters(pre)
        for i in tl.static_range(4):
            cols = col_start + i * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            z = quarters[i] + load_vector(bias_ptr, cols, features)
            if HAS_PRE:
                store_rows(pre_ptr, z, rows, cols, count, features)
            store_rows(y_ptr, activation(z, ACTIVATION), rows, cols, count, features)


@triton.jit(do_not_specialize=["count"])
def feed_forward_backward(
    dout_ptr,  # (count, inner)
    weight_ptr,  # (inner, features), dtype of dout
    pre_ptr,  # (count, features), dtype of dout
    dpre_ptr,  # (count, features), dtype of dout
    y_ptr,  # (count, features), dtype of dout
    partials_ptr,  # (cdiv(count, BLOCK_M), features) float32
    count,
    inner,
    features,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_MULTIPLE: tl.constexpr,  # see launch.row_multiple
    BLOCK_K: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr,
):
    """dpre = (dout @ weight) * f'(pre), its sums over BLOCK_M rows, and y = f(pre) once more.

    One program: every num_programs(0)-th tile of dpre.
    """
    inner, features = known_multiple(inner, ROW_MULTIPLE), known_multiple(features, ROW_MULTIPLE)
    dout = _operand(dout_ptr, count, inner, BLOCK_M, BLOCK_K, HAS_DESCRIPTORS)
    weight = _operand(weight_ptr, inner, features, BLOCK_K, BLOCK_N, HAS_DESCRIPTORS)
    row_blocks, col_blocks = tl.cdiv(count, BLOCK_M), tl.cdiv(features, BLOCK_N)
    for number in tl.range(tl.program_id(0), row_blocks * col_blocks, tl.num_programs(0)):
        row_block, col_block = _tile(number, row_blocks, col_blocks, BLOCK_GROUP)
        row_start, col_start = row_block * BLOCK_M, col_block * BLOCK_N
        dy = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k in tl.range(0, inner, BLOCK_K):
            a = _load(dout, row_start, k, count, inner, BLOCK_M, BLOCK_K, HAS_DESCRIPTORS)
            b = _load(weight, k, col_start, inner, features, BLOCK_K, BLOCK_N, HAS_DESCRIPTORS)
            dy = dot(a, b, dy)
        rows = row_start + tl.arange(0, BLOCK_M)
        quarters = _quarters(dy)
        for i in tl.static_range(4):
            cols = col_start + i * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            pre = load_rows(pre_ptr, rows, cols, count, features)
            store_rows(y_ptr, activation(pre, ACTIVATION), rows, cols, count, features)
            dpre = quarters[i] * activation_grad(pre, ACTIVATION)
            store_rows(dpre_ptr, dpre, rows, cols, count, features)
            # Rows past the end have dout = 0 and so contribute nothing.
            sums = tl.sum(dpre, axis=0)
            tl.store(partials_ptr + row_block.to(tl.int64) * features + cols, sums, mask=cols < features)

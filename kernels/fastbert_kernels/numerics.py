"""Device functions the kernels share: dot products, casts, dropout, activations.

`dot` and `cast` are where two faults of Triton's interpreter (3.6 to 3.9) are put right: it multiplies bfloat16
operands as raw bit patterns, and truncates float32 to bfloat16 where the hardware rounds to nearest even. Compiled
kernels take the other branch.
"""

from .backend import INTERPRETED as _INTERPRETED
from .language import tl, triton

INTERPRETED: tl.constexpr = tl.constexpr(_INTERPRETED)

#: Additive scores of masked keys. Finite, so that a row with no visible key is a uniform row and not a NaN; so far
#: down that float32 absorbs any real score added to it.
MASKED: tl.constexpr = tl.constexpr(-1.0e30)

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)

#: Philox rounds per draw: seven is the fewest that passes BigCrush (Salmon et al., "Parallel random numbers: as easy
#: as 1, 2, 3", SC 2011, table 2).
PHILOX_ROUNDS: tl.constexpr = tl.constexpr(7)


#: Of a product that nobody asks anything of; as a default, a bare string fails in Triton 3.6.
_EXACT: tl.constexpr = tl.constexpr("ieee")


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr = _EXACT):
    """acc + a @ b, accumulated in float32.

    PRECISION is of float32 operands: "ieee" multiplies them as they are, "tf32" rounded to TF32, and "tf32x3" as sums
    of two TF32 parts, but for the product of both small parts: an error of 2**-21 or so of the factors' size. The
    interpreter multiplies them as they are.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in another floating-point type, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded.to(tl.uint32).to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def known_multiple(x, ROW_MULTIPLE: tl.constexpr):
    """The integer x, which ROW_MULTIPLE divides, so that the compiler knows it.

    A launch tells it of multiples of 16 alone, but rows of 312 half-precision elements start at multiples of 16 bytes
    too. Said of an argument, `tl.multiple_of` is lost.
    """
    if ROW_MULTIPLE < 16:
        x = x // ROW_MULTIPLE * ROW_MULTIPLE
    return x


@triton.jit
def load_rows(ptr, rows, cols, count, features):
    """A tile of a row-major matrix as float32, zero outside it: [BLOCK_M, BLOCK_N]."""
    mask = (rows[:, None] < count) & (cols[None, :] < features)
    offsets = rows[:, None].to(tl.int64) * features + cols[None, :]
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(ptr, x, rows, cols, count, features):
    mask = (rows[:, None] < count) & (cols[None, :] < features)
    offsets = rows[:, None].to(tl.int64) * features + cols[None, :]
    tl.store(ptr + offsets, cast(x, ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(ptr, cols, features):
    """A vector as float32, zero past its end: [1, BLOCK_N]."""
    return tl.load(ptr + cols, mask=cols < features, other=0.0).to(tl.float32)[None, :]


@triton.jit
def store_vector(ptr, x, cols, features):
    """A vector [1, BLOCK_N], without what is past its end."""
    tl.store(ptr + cols[None, :], x, mask=cols[None, :] < features)


@triton.jit
def _kept_halves(seed_ptr, stream, plane, rows, groups, threshold):
    """What dropout keeps by the eight 16-bit halves of the four words of a Philox-4x32 call, bool [..., 2, 2, 2].

    The last three dimensions are the words' number, its high bit first, and the half, the low one first. One 64-bit
    product a word and round, and comparisons of words as they are: this is most of what dropout costs.

    Args:
        seed_ptr: int64 scalar on the device: the key.
        stream, plane, rows, groups: the counter, int32; the last two broadcast against each other.
        threshold: int32, p * 2**16: a half is kept when it is at least this.
    """
    seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    zeros = rows.to(tl.uint32) * 0 + groups.to(tl.uint32) * 0
    c0, c1 = groups.to(tl.uint32) + zeros, rows.to(tl.uint32) + zeros
    c2, c3 = tl.cast(plane, tl.uint32) + zeros, tl.cast(stream, tl.uint32) + zeros
    for _ in tl.static_range(PHILOX_ROUNDS):
        first, second = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (second >> 32).to(tl.uint32) ^ c1 ^ key0, second.to(tl.uint32)
        c2, c3 = (first >> 32).to(tl.uint32) ^ c3 ^ key1, first.to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    least = tl.cast(threshold, tl.uint32) << 16
    kept0 = tl.join((c0 << 16) >= least, c0 >= least)
    kept1 = tl.join((c1 << 16) >= least, c1 >= least)
    kept2 = tl.join((c2 << 16) >= least, c2 >= least)
    kept3 = tl.join((c3 << 16) >= least, c3 >= least)
    kept = tl.join(tl.join(kept0, kept2), tl.join(kept1, kept3))  # [..., half, high bit, low bit]
    return tl.permute(kept, [0, 1, 3, 4, 2])


@triton.jit
def dropout_keep(seed_ptr, stream, rows, threshold, BLOCK_N: tl.constexpr):
    """Which elements of rows dropout keeps, [BLOCK_M, BLOCK_N], as a pure function of (seed, stream, row, column).

    One Philox call serves eight neighbouring columns, which the threads of a row kernel have at once.
    `reference.dropout_keep` computes the same bits in PyTorch.

    Args:
        seed_ptr: int64 scalar on the device.
        stream: int32, which dropout of the model this is.
        rows: int32 [BLOCK_M].
        threshold: `reference.dropout_threshold`.
    """
    groups = tl.arange(0, BLOCK_N // 8)
    kept = _kept_halves(seed_ptr, stream, 0, rows[:, None], groups[None, :], threshold)
    return tl.reshape(kept, [rows.shape[0], BLOCK_N])


@triton.jit
def dropout_keep_map(
    seed_ptr, stream, plane, row_start, col_start, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Which elements of a tile of a map dropout keeps, [BLOCK_M, BLOCK_N], as a pure function of what draws it.

    One Philox call serves rows 8 apart, columns 8 apart and their right neighbours: the eight elements of 16 by 16 that
    one thread holds of a tensor-core product, so that no draw goes from one thread to another.
    `reference.dropout_keep_map` computes the same bits in PyTorch.

    Args:
        seed_ptr, stream, threshold: as in `dropout_keep`.
        plane: int32, which map of the tensor: batch * heads + head.
        row_start, col_start: int32, the first row and column, multiples of 16.
    """
    rows = row_start // 2 + tl.arange(0, BLOCK_M // 2)
    groups = col_start // 4 + tl.arange(0, BLOCK_N // 4)
    kept = _kept_halves(seed_ptr, stream, plane, rows[:, None], groups[None, :], threshold)
    kept = tl.reshape(kept, [BLOCK_M // 16, 8, BLOCK_N // 16, 4, 2, 2, 2])  # [..., column's 8, row's 8, column's 1]
    kept = tl.permute(kept, [0, 5, 1, 2, 4, 3, 6])
    return tl.reshape(kept, [BLOCK_M, BLOCK_N])


@triton.jit
def tanh(x):
    # 1 - 2 / (exp(2x) + 1) saturates to +-1 and never overflows to NaN.
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def normal_cdf(x):
    """Phi(x) = (1 + erf(x / sqrt(2))) / 2 in float32, to 1e-7.

    Phi(-|x|) is 2**p(|x|), p a polynomial fitted to log2(Phi(-x)) by the least maximum of |x| times the error of Phi.
    Half the instructions of erf, which takes two polynomials, and no less exact: x * Phi(x) is 4e-7 off, 5e-7 with erf.
    p falls for ever: far from zero the tail is zero.
    """
    a = tl.abs(x)
    p = -2.1560313e-06 * a + 3.1458227e-05
    p = p * a - 1.4977884e-04
    p = p * a - 2.2117315e-04
    p = p * a + 7.1672785e-03
    p = p * a - 5.2562345e-02
    p = p * a - 4.5918902e-01
    p = p * a - 1.1511070
    tail = tl.exp2(p * a - 1.0)
    return tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def activation(x, ACTIVATION: tl.constexpr):
    """y = f(x) in float32, for f one of gelu (erf), gelu_tanh, relu, silu."""
    if ACTIVATION == "gelu":
        y = x * normal_cdf(x)
    elif ACTIVATION == "gelu_tanh":
        y = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.where(x != x, x, tl.maximum(x, 0.0))
    return y


@triton.jit
def activation_grad(x, ACTIVATION: tl.constexpr):
    """f'(x) in float32, for the activations of `activation`; relu'(0) = 0 as in PyTorch."""
    if ACTIVATION == "gelu":
        # d/dx [x Phi(x)] = Phi(x) + x phi(x)
        g = normal_cdf(x) + x * 0.3989422804014327 * tl.exp2(-0.7213475204444817 * x * x)
    elif ACTIVATION == "gelu_tanh":
        t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        inner = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
        g = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
    elif ACTIVATION == "silu":
        s = tl.sigmoid(x)
        g = s * (1.0 + x * (1.0 - s))
    else:
        tl.static_assert(ACTIVATION == "relu")
        g = tl.where(x > 0.0, 1.0, 0.0)
    return g

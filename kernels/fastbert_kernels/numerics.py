"""Device functions the kernels share: dot products, casts, dropout, activations.

`dot` and `cast` are where two faults of Triton's interpreter (3.6 to 3.9) are put right: it multiplies bfloat16
operands as raw bit patterns, and truncates float32 to bfloat16 where the hardware rounds to nearest even. Compiled
kernels take the plain branch.
"""

import triton
import triton.language as tl

from .backend import INTERPRETED as _INTERPRETED

INTERPRETED: tl.constexpr = tl.constexpr(_INTERPRETED)

#: Additive scores of masked keys. Finite, so that a row with no visible key is a uniform row and not a NaN; so far
#: down that float32 absorbs any real score added to it.
MASKED: tl.constexpr = tl.constexpr(-1.0e30)

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)

#: Philox rounds per draw: seven is the fewest that passes BigCrush (Salmon et al., "Parallel random numbers: as easy
#: as 1, 2, 3", SC 2011, table 2).
PHILOX_ROUNDS: tl.constexpr = tl.constexpr(7)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, accumulated in float32; float32 operands are multiplied in full precision, not TF32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in another floating-point type, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded.to(tl.uint32).to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def dropout_keep(seed_ptr, stream, plane, rows, col_start, threshold, BLOCK_N: tl.constexpr):
    """Which elements dropout keeps, [BLOCK_M, BLOCK_N], as a pure function of (seed, stream, plane, row, column).

    One Philox call serves four neighbouring columns. `reference.dropout_keep` computes the same bits in PyTorch.

    Args:
        seed_ptr: int64 scalar on the device.
        stream: int32, which dropout of the model this is.
        plane: int32, which matrix of the tensor (batch * heads + head; 0 for token matrices).
        rows: int32 [BLOCK_M].
        col_start: int32, first column, a multiple of 4.
        threshold: int32, p * 2**31: an element is kept when the top 31 bits of its draw are at least this.
    """
    seed = tl.load(seed_ptr)
    groups = col_start // 4 + tl.arange(0, BLOCK_N // 4)
    zeros = rows[:, None] * 0 + groups[None, :] * 0  # [BLOCK_M, BLOCK_N // 4]
    r0, r1, r2, r3 = tl.philox(
        seed, groups[None, :] + zeros, rows[:, None] + zeros, plane + zeros, stream + zeros, PHILOX_ROUNDS
    )
    draws = tl.join(tl.join(r0, r2), tl.join(r1, r3))  # [BLOCK_M, BLOCK_N // 4, 2, 2]
    return (tl.reshape(draws, [rows.shape[0], BLOCK_N]) >> 1).to(tl.int32) >= threshold


@triton.jit
def tanh(x):
    # 1 - 2 / (exp(2x) + 1) saturates to +-1 and never overflows to NaN.
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def activation(x, ACTIVATION: tl.constexpr):
    """y = f(x) in float32, for f one of gelu (erf), gelu_tanh, relu, silu."""
    if ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
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
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        g = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
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

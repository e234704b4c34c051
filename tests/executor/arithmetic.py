"""What the arithmetic instructions compute, on NumPy arrays of one element a thread, as the PTX manual defines them."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

U16, U32, U64, I32, I64 = np.uint16, np.uint32, np.uint64, np.int32, np.int64
F16, F32, F64 = np.float16, np.float32, np.float64

_SIGN, _NAN = U32(0x80000000), U32(0x7FFFFFFF)


def flush(x: Array) -> Array:
    """`.ftz`: a subnormal float32 becomes a zero of its sign."""
    bits = x.view(U32)
    subnormal = (bits & U32(0x7F800000)) == 0
    return np.where(subnormal, bits & _SIGN, bits).view(F32)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in float32, rounded once.

    The product is exact in float64. The sum is rounded to odd there, so that rounding it again to float32 is the same
    as rounding once (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    product, c = a.astype(F64) * b.astype(F64), c.astype(F64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = np.asarray(total).view(I64)
    inexact = ((error > 0) | (error < 0)) & ((bits & 1) == 0)
    step = np.where((error > 0) == (total > 0), I64(1), I64(-1))
    return np.where(inexact, bits + step, bits).view(F64).astype(F32)


def _extreme(a: Array, b: Array, chosen: Array, zero: Array) -> Array:
    """min or max of which the one that is a number wins, and zeros are ordered by their sign."""
    bits = np.where(a == b, zero, chosen.view(U32))
    return np.where(np.isnan(a) & np.isnan(b), _NAN, bits).view(F32)


def maximum(a: Array, b: Array) -> Array:
    return _extreme(a, b, np.fmax(a, b), a.view(U32) & b.view(U32))


def minimum(a: Array, b: Array) -> Array:
    return _extreme(a, b, np.fmin(a, b), a.view(U32) | b.view(U32))


def from_bf16(bits: Array) -> Array:
    """uint16 bits to float32."""
    return (bits.astype(U32) << U32(16)).view(F32)


def to_bf16(x: Array) -> Array:
    """float32 to uint16 bits, to nearest even; every NaN is 0x7FFF."""
    bits = x.view(U32)
    rounded = (bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)
    return np.where(np.isnan(x), U32(0x7FFF), rounded).astype(U16)


def to_tf32(x: Array) -> Array:
    """float32 to uint32 bits of a TF32 number, to nearest, ties away from zero; every NaN is 0x7FFFFFFF."""
    rounded = (x.view(U32) + U32(0x1000)) & U32(0xFFFFE000)
    return np.where(np.isnan(x), _NAN, np.where(np.isinf(x), x.view(U32), rounded))


def from_f16(bits: Array) -> Array:
    return bits.view(F16).astype(F32)


def to_f16(x: Array) -> Array:
    """float32 to uint16 bits, to nearest even; every NaN is 0x7FFF."""
    return np.where(np.isnan(x), U16(0x7FFF), x.astype(F16).view(U16))


def pack(high: Array, low: Array) -> Array:
    """Two uint16 in one uint32."""
    return (high.astype(U32) << U32(16)) | low.astype(U32)


def divide_approximately(a: Array, b: Array) -> Array:
    """`div.approx.f32`: a / b by way of 1 / b, which is 0 for |b| from 2^126 on."""
    large = (np.abs(b) >= F32(2.0**126)) & np.isfinite(b)
    return np.where(large, a * np.copysign(F32(0), b), a / b)


def quotient(a: Array, b: Array) -> Array:
    """int32 a / b towards zero. Division by zero, whose result the manual leaves open, gives -1."""
    safe = np.where(b == 0, I32(1), b)
    return np.where(b == 0, -1, np.trunc(a.astype(F64) / safe)).astype(I64).astype(I32)


def remainder(a: Array, b: Array) -> Array:
    return a - quotient(a, b) * b


def shift_left(x: Array, count: Array) -> Array:
    """Counts past the width give 0."""
    bits = 8 * x.dtype.itemsize
    return np.where(count >= bits, x.dtype.type(0), x << np.minimum(count, bits - 1).astype(x.dtype))


def shift_right(x: Array, count: Array) -> Array:
    """Counts past the width give 0, or the sign of a signed number."""
    bits = 8 * x.dtype.itemsize
    shifted = x >> np.minimum(count, bits - 1).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(count >= bits, x.dtype.type(0), shifted)


def extract(x: Array, position: Array, length: Array) -> Array:
    """`bfe`: `length` bits of a 32-bit number from `position` on; a signed one's are extended by the last of them."""
    position, length = (np.asarray(n).astype(I64) & 255 for n in (position, length))
    wide = x.astype(I64)  # bits past the last are copies of the sign, or 0
    field = (wide >> np.minimum(position, 63)) & ((I64(1) << np.minimum(length, 32)) - 1)
    if x.dtype.kind == "i":
        top = np.minimum(position + length - 1, 31)
        sign = np.where(length == 0, 0, (wide >> np.maximum(top, 0)) & 1)
        field = np.where((sign == 1) & (length < 32), field | -(I64(1) << np.minimum(length, 32)), field)
    return field.astype(x.dtype)


def permute(a: Array, b: Array, selector: Array) -> Array:
    """`prmt.b32`: four of the eight bytes of b:a, each chosen by four bits; the highest asks for the byte's sign."""
    both = a.astype(U64) | b.astype(U64) << U64(32)
    result = np.zeros(np.broadcast(a, b, selector).shape, U32)
    for i in range(4):
        choice = (selector >> U32(4 * i)) & U32(15)
        byte = (both >> ((choice & U32(7)).astype(U64) * U64(8))).astype(U32) & U32(255)
        sign = np.where(byte & U32(128), U32(255), U32(0))
        result |= np.where(choice & U32(8), sign, byte) << U32(8 * i)
    return result


def multiply_high(a: Array, b: Array) -> Array:
    """The upper half of the product of 32-bit numbers."""
    wide = I64 if a.dtype.kind == "i" else U64
    return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)

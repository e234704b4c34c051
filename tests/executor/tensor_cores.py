"""The tensor-core instructions: how the elements of a matrix lie in the registers of a warp.

Layouts are those of the PTX manual, "Matrix Fragments for mma.m16n8k16", those for m16n8k8, and "ldmatrix". A register
of 32 bits holds two halves, the one with the lower column (of A and the result) or row (of B) in its lower bits; or one
TF32 number, a float32 of whose mantissa the last 13 bits are ignored.
"""

from typing import Any

import numpy as np

from .arithmetic import F32, from_bf16, from_f16

Array = np.ndarray[Any, Any]

WARP = 32

_TF32_BITS = np.uint32(0xFFFFE000)

_GROUP, _IN_GROUP = np.arange(WARP) // 4, np.arange(WARP) % 4

#: Row and first column of each register's elements.
_A = [(_GROUP + 8 * (i % 2), 2 * _IN_GROUP + 8 * (i // 2)) for i in range(4)]
_B = [(2 * _IN_GROUP + 8 * i, _GROUP) for i in range(2)]
_C = [(_GROUP + 8 * (i // 2), 2 * _IN_GROUP + i % 2) for i in range(4)]

#: The same of TF32, one element a register.
_TF32_A = [(_GROUP + 8 * (i % 2), _IN_GROUP + 4 * (i // 2)) for i in range(4)]
_TF32_B = [(_IN_GROUP + 4 * i, _GROUP) for i in range(2)]

#: Columns of A and rows of B, by what they hold.
INNER = {"bf16": 16, "f16": 16, "tf32": 8}


def _halves(register: Array, kind: str) -> tuple[Array, Array]:
    """The lower and the upper half of a register, as float32 (warps, 32)."""
    convert = from_bf16 if kind == "bf16" else from_f16
    both = convert(np.ascontiguousarray(register).view(np.uint16)).reshape(-1, WARP, 2)
    return both[:, :, 0], both[:, :, 1]


def _lay(
    kind: str, registers: list[Array], places: list[tuple[Array, Array]], out: Array, step: tuple[int, int]
) -> None:
    """Lay the elements of registers into a matrix (warps, rows, columns), the second of two halves a `step` further."""
    for register, (row, column) in zip(registers, places, strict=True):
        if kind == "tf32":
            out[:, row, column] = (register & _TF32_BITS).view(F32).reshape(-1, WARP)
        else:
            first, second = _halves(register, kind)
            out[:, row, column], out[:, row + step[0], column + step[1]] = first, second


def multiply(kind: str, a: list[Array], b: list[Array], c: list[Array]) -> list[Array]:
    """`mma.m16n8k16`, of TF32 `mma.m16n8k8`: A times B plus C in every warp.

    Products are exact and sums in float32. The manual leaves their order open.

    Args:
        kind: `"bf16"`, `"f16"` or `"tf32"`.
        a, b: four and two registers of uint32 (lanes,).
        c: four registers of float32 (lanes,).

    Returns:
        Four registers of float32 (lanes,).
    """
    warps, inner = len(c[0]) // WARP, INNER[kind]
    left, right, out = (np.empty((warps, m, n), F32) for m, n in ((16, inner), (inner, 8), (16, 8)))
    _lay(kind, a, _TF32_A if kind == "tf32" else _A, left, (0, 1))
    _lay(kind, b, _TF32_B if kind == "tf32" else _B, right, (1, 0))
    for register, (row, column) in zip(c, _C, strict=True):
        out[:, row, column] = register.reshape(warps, WARP)
    out += left @ right
    return [out[:, row, column].reshape(-1) for row, column in _C]


def fragments(rows: Array, transposed: bool) -> Array:
    """`ldmatrix`: what each thread gets of 8x8 matrices of halves.

    Args:
        rows: uint16 (warps, matrices, 8, 8).

    Returns:
        uint32 (matrices, warps, 32).
    """
    if transposed:
        rows = rows.swapaxes(2, 3)
    low, high = rows[:, :, _GROUP, 2 * _IN_GROUP], rows[:, :, _GROUP, 2 * _IN_GROUP + 1]
    return (low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)).swapaxes(0, 1)


def source_lanes(mode: str, lane: Array, operand: Array, clamp: Array) -> Array:
    """`shfl`: the lane that each lane reads, its own where that one is out of its segment. All int64, (..., 32)."""
    operand, segment, limit = operand & 31, clamp >> 8 & 31, clamp & 31
    last = (lane & segment) | (limit & ~segment)
    first = lane & segment
    if mode == "up":
        source, inside = lane - operand, lane - operand >= last
    else:
        moved = {"bfly": lane ^ operand, "down": lane + operand, "idx": first | (operand & ~segment)}
        source, inside = moved[mode], moved[mode] <= last
    return np.where(inside, source, lane)

"""Second stage of the weight gradients: float32 partial rows summed in one launch, always in the same order."""

import torch
import triton
import triton.language as tl

from .backend import cdiv, wrap_triton
from .numerics import cast
from .tiles import LOAD_STAGES, PARTIAL_SUMS


def partial_rows(blocks: int) -> int:
    """How many programs, each with a row of partial sums, share a backward pass over `blocks` blocks of rows.

    Said so that a graph, where `blocks` may be a symbol, holds for few blocks and for many.
    """
    if type(blocks) is int and not torch.compiler.is_compiling():
        return max(1, min(blocks, PARTIAL_SUMS))
    return torch.sym_max(1, torch.sym_min(blocks, PARTIAL_SUMS))


@triton.jit
def _column_sums(
    partials_ptr,  # (sums, rows, features) float32
    out_ptr,  # (sums, features)
    rows,
    features,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_N columns of one sum."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    which = tl.program_id(1).to(tl.int64)
    partials_ptr += which * rows * features
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for row_start in tl.range(0, rows, BLOCK_M, num_stages=LOAD_STAGES):
        block = row_start + tl.arange(0, BLOCK_M)
        mask = (block[:, None] < rows) & (cols[None, :] < features)
        total += tl.load(partials_ptr + block[:, None].to(tl.int64) * features + cols[None, :], mask=mask, other=0.0)
    out = tl.sum(total, axis=0)
    tl.store(out_ptr + which * features + cols, cast(out, out_ptr.dtype.element_ty), mask=cols < features)


#: One warp reads 128 bytes of each of 32 rows at a time.
TILES = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}


def column_sums(partials: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum float32 (sums, rows, features) over the rows: (sums, features) in `dtype`."""
    sums, rows, features = partials.shape
    out = partials.new_empty(sums, features, dtype=dtype)
    wrap_triton(_column_sums)[(cdiv(features, TILES["BLOCK_N"]), sums)](
        partials_ptr=partials, out_ptr=out, rows=rows, features=features, **TILES
    )
    return out

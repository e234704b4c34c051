"""Second stage of the weight gradients: float32 partial sums of up to five kernels, each a row of every program,
summed in one launch, always in the same order."""

from typing import Any, TypeAlias

import torch

from .language import tl, triton
from .launch import cdiv, register_op, row_multiple, wrap_triton
from .numerics import cast, known_multiple
from .tiles import LOAD_STAGES, PARTIAL_SUMS

#: Of one kernel: its partial sums (rows, columns), float32, and the dtypes of the vectors that lie beside each other in
#: a row, all equally wide. None is a vector that is not there, and has no columns.
PartialSums: TypeAlias = tuple[torch.Tensor, tuple[torch.dtype | None, ...]]


def partial_rows(blocks: int) -> int:
    """How many programs, each with a row of partial sums, share a backward pass over `blocks` blocks of rows.

    Said so that a graph, where `blocks` may be a symbol, holds for few blocks and for many.
    """
    if type(blocks) is int and not torch.compiler.is_compiling():
        return max(1, min(blocks, PARTIAL_SUMS))
    return torch.sym_max(1, torch.sym_min(blocks, PARTIAL_SUMS))


def empty_partials(like: torch.Tensor, count: int, block_m: int, columns: int) -> torch.Tensor:
    """Memory of the partial sums of a backward pass over `count` rows, block_m at a time: a row for each program."""
    return like.new_empty(partial_rows(cdiv(count, block_m)), columns, dtype=torch.float32)


#: Numbers of rows differ with the batch, and tell the compiler nothing.
_ROW_COUNTS = ["first_rows", "second_rows", "third_rows", "fourth_rows", "fifth_rows"]


@triton.jit(do_not_specialize=_ROW_COUNTS)
def _column_sums(
    first_ptr,  # (first_rows, first_columns) float32
    second_ptr,  # (second_rows, second_columns) float32, and so on
    third_ptr,
    fourth_ptr,
    fifth_ptr,
    out_ptr,  # (first_columns + ... + fifth_columns,)
    first_rows,
    second_rows,
    third_rows,
    fourth_rows,
    fifth_rows,
    first_columns,
    second_columns,
    third_columns,
    fourth_columns,
    fifth_columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_MULTIPLE: tl.constexpr,  # see launch.row_multiple
):
    """One program: BLOCK_N columns of one of the five."""
    block = tl.program_id(0)
    partials_ptr, rows, columns = first_ptr, first_rows, first_columns
    blocks1 = tl.cdiv(first_columns, BLOCK_N)
    blocks2 = blocks1 + tl.cdiv(second_columns, BLOCK_N)
    blocks3 = blocks2 + tl.cdiv(third_columns, BLOCK_N)
    blocks4 = blocks3 + tl.cdiv(fourth_columns, BLOCK_N)
    if block >= blocks4:
        block -= blocks4
        partials_ptr, rows, columns = fifth_ptr, fifth_rows, fifth_columns
        out_ptr += first_columns + second_columns + third_columns + fourth_columns
    elif block >= blocks3:
        block -= blocks3
        partials_ptr, rows, columns = fourth_ptr, fourth_rows, fourth_columns
        out_ptr += first_columns + second_columns + third_columns
    elif block >= blocks2:
        block -= blocks2
        partials_ptr, rows, columns = third_ptr, third_rows, third_columns
        out_ptr += first_columns + second_columns
    elif block >= blocks1:
        block -= blocks1
        partials_ptr, rows, columns = second_ptr, second_rows, second_columns
        out_ptr += first_columns
    columns = known_multiple(columns, ROW_MULTIPLE)
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for row_start in tl.range(0, rows, BLOCK_M, num_stages=LOAD_STAGES):
        row = row_start + tl.arange(0, BLOCK_M)
        mask = (row[:, None] < rows) & (cols[None, :] < columns)
        total += tl.load(partials_ptr + row[:, None].to(tl.int64) * columns + cols[None, :], mask=mask, other=0.0)
    out = tl.sum(total, axis=0)
    tl.store(out_ptr + cols, cast(out, out_ptr.dtype.element_ty), mask=cols < columns)


#: One warp reads 128 bytes of each of 32 rows at a time. A layer's few hundred programs are less than a GPU holds: what
#: each waits for are the trips of its loop, so that 128 rows a trip, two trips for most sums, are better than 32.
TILES = {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}


def _sums_fake(
    first: torch.Tensor,
    second: torch.Tensor | None,
    third: torch.Tensor | None,
    fourth: torch.Tensor | None,
    fifth: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    matrices = first, second, third, fourth, fifth
    return first.new_empty(sum(partials.shape[1] for partials in matrices if partials is not None), dtype=dtype)


@register_op("column_sums", _sums_fake)
def _sums(
    first: torch.Tensor,
    second: torch.Tensor | None,
    third: torch.Tensor | None,
    fourth: torch.Tensor | None,
    fifth: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Sums over the rows of float32 matrices (rows, columns), one after the other: (columns of all,)."""
    shapes = [(0, 0) if it is None else it.shape for it in (first, second, third, fourth, fifth)]
    (rows1, columns1), (rows2, columns2), (rows3, columns3), (rows4, columns4), (rows5, columns5) = shapes
    out = first.new_empty(columns1 + columns2 + columns3 + columns4 + columns5, dtype=dtype)
    blocks = sum([cdiv(columns, TILES["BLOCK_N"]) for _, columns in shapes])
    wrap_triton(_column_sums)[(blocks,)](
        first_ptr=first,
        second_ptr=first if second is None else second,
        third_ptr=first if third is None else third,
        fourth_ptr=first if fourth is None else fourth,
        fifth_ptr=first if fifth is None else fifth,
        out_ptr=out,
        first_rows=rows1,
        second_rows=rows2,
        third_rows=rows3,
        fourth_rows=rows4,
        fifth_rows=rows5,
        first_columns=columns1,
        second_columns=columns2,
        third_columns=columns3,
        fourth_columns=columns4,
        fifth_columns=columns5,
        ROW_MULTIPLE=row_multiple(columns1, columns2, columns3, columns4, columns5),
        **TILES,
    )
    return out


_sums.forbid_double_backward("weight gradient")


def column_sums(*partial_sums: PartialSums) -> list[torch.Tensor | None]:
    """Gradients of parameter vectors, from the partial sums of up to five kernels; None for None."""
    matrices: list[torch.Tensor | None] = []
    dtypes: list[torch.dtype | None] = []
    widths: list[int] = []
    for matrix, kinds in partial_sums:
        dtypes += kinds
        if count := len(kinds) - kinds.count(None):
            matrices.append(matrix)
            widths += [matrix.shape[1] // count] * count
    if not matrices:
        return [None] * len(dtypes)
    first, second, third, fourth, fifth = (*matrices, *[None] * 4)[:5]
    assert first is not None
    wanted = {*dtypes} - {None}
    dtype = wanted.pop() if len(wanted) == 1 else torch.float32
    vectors: Any = _sums(first, second, third, fourth, fifth, dtype).split_with_sizes(widths)
    if None in dtypes:
        present = iter(vectors)
        vectors = [None if dtype is None else next(present) for dtype in dtypes]
    if wanted:  # more than one
        vectors = [None if x is None else x.to(dtype) for x, dtype in zip(vectors, dtypes, strict=True)]
    return [*vectors]

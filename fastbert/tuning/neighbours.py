"""The tiles of a launch as shipped, and others worth a try."""

import itertools
from collections.abc import Iterator

from fastbert_kernels.catalogue import Launch, Tiles
from fastbert_kernels.tiles import (
    attention_table,
    column_tiles,
    feed_forward_table,
    relation_table,
    row_tiles,
)


def shipped_tiles(launch: Launch, target: str) -> Tiles:
    """What the package's own tables say for a launch on a target that `backend.arch` names."""
    kernel, itemsize = launch.traits, launch.dtype.itemsize
    if kernel.op == "attention":
        return attention_table(target, kernel.step, itemsize, launch.width, launch.maps, launch.up_to, launch.tf32)
    if kernel.op == "relation":
        return relation_table(target, kernel.step, itemsize, launch.width, tf32=launch.tf32)
    if kernel.op == "feed_forward":
        return feed_forward_table(target, itemsize, descriptors=True)
    if kernel.op == "bias_activation":
        return column_tiles(launch.width)
    return row_tiles(launch.kernel, launch.width, itemsize)


def neighbours(launch: Launch, target: str, shipped: Tiles) -> list[Tiles]:
    """Tiles beside the shipped ones: sides and warps halved and doubled, a stage less or more.

    Tiles that a target's own tensor cores cannot work on, and sides of rows that must be held whole, are left out.
    """
    return [tiles for tiles in _all(launch, target, shipped) if tiles != shipped]


def _all(launch: Launch, target: str, shipped: Tiles) -> Iterator[Tiles]:
    kernel = launch.traits
    sides = [_around(shipped[side], 1 if kernel.whole_rows else 16, 128) for side in ("BLOCK_M", "BLOCK_N")]
    if kernel.whole_rows:
        sides[1] = [shipped["BLOCK_N"]]
    shapes = itertools.product(*sides, _around(shipped["num_warps"], 1, 16), [shipped["num_stages"]])
    stages = [shipped["num_stages"] - 1, shipped["num_stages"] + 1] if kernel.multiplies else []
    by_groups = kernel.multiplies and launch.dtype.itemsize == 2 and target in ("sm_90", "sm_100")
    by_groups = by_groups and launch.up_to is None  # short sequences do not fill the rows of such a product
    kept = [shipped["BLOCK_M"], shipped["BLOCK_N"], shipped["num_warps"]]
    for block_m, block_n, num_warps, num_stages in [*shapes, *((*kept, stage) for stage in stages if stage > 0)]:
        rows = block_n if kernel.by_columns else block_m  # scores are transposed where a program keeps columns
        if by_groups and (rows < 64 or num_warps < 4):  # tensor cores there work for four warps at a time
            continue
        sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}
        yield shipped | sizes


def _around(value: int, least: int, most: int) -> list[int]:
    return [x for x in (value // 2, value, value * 2) if least <= x <= most or x == value]

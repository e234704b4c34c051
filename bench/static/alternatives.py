"""Other tiles for a case, compiled beside the shipped ones: how the tables in `fastbert_kernels.tiles` are chosen."""

import itertools
from collections.abc import Iterator

from fastbert_kernels.tiles import Tiles

from .cases import Case, launch_tiles


def alternatives(case: Case, target: str) -> list[Tiles]:
    """The shipped tiles of a case, and their neighbours: sides and warps halved and doubled, a stage less or more.

    Tiles that a target's own tensor cores cannot work on, and sides of rows that must be held whole, are left out.
    """
    shipped = launch_tiles(case, target)
    return [shipped] + [tiles for tiles in _neighbours(case, target, shipped) if tiles != shipped]


def _neighbours(case: Case, target: str, shipped: Tiles) -> Iterator[Tiles]:
    whole_rows = case.kernel.startswith(("add_layer_norm", "embed"))
    sides = [_around(shipped[side], 1 if whole_rows else 16, 128) for side in ("BLOCK_M", "BLOCK_N")]
    if whole_rows:
        sides[1] = [shipped["BLOCK_N"]]
    shapes = itertools.product(*sides, _around(shipped["num_warps"], 1, 16), [shipped["num_stages"]])
    multiplies = case.attends or case.feeds_forward
    stages = [shipped["num_stages"] - 1, shipped["num_stages"] + 1] if multiplies else []
    kept = [shipped["BLOCK_M"], shipped["BLOCK_N"], shipped["num_warps"]]
    for block_m, block_n, num_warps, num_stages in [*shapes, *((*kept, stage) for stage in stages if stage > 0)]:
        rows = block_n if case.kernel.endswith("dkv") else block_m
        if multiplies and case.dtype != "float32" and target in ("sm_90", "sm_100") and rows < 64:
            continue
        sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}
        yield shipped | sizes


def _around(value: int, least: int, most: int) -> list[int]:
    return [x for x in (value // 2, value, value * 2) if least <= x <= most or x == value]

"""Tile shapes by kernel, architecture, dtype and width: data, not timing at the first call.

The same call gets the same kernel in every process and on every rank. Chosen so that no kernel spills on any NVIDIA
target (`python -m fastbert_kernels.static` shows registers, spills and shared memory of each).
"""

import functools
from typing import Any

import torch
import triton

from .backend import arch

#: Launch parameters: the tile sizes a kernel takes, and how it is compiled.
Tiles = dict[str, Any]


def _attention(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Tiles:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}


#: (architecture, kernel) -> head_dim up to which, and tiles, for two-byte dtypes.
_ATTENTION_HALF: dict[tuple[str, str], list[tuple[int, Tiles]]] = {
    ("sm_80", "forward"): [(64, _attention(64, 64, 4, 3)), (128, _attention(64, 32, 4, 2))],
    ("sm_80", "backward_dq"): [(64, _attention(64, 32, 4, 2)), (128, _attention(64, 32, 8, 2))],
    ("sm_80", "backward_dkv"): [(64, _attention(32, 64, 4, 2)), (128, _attention(32, 64, 8, 2))],
    ("sm_90", "forward"): [(64, _attention(64, 64, 4, 2)), (128, _attention(64, 64, 4, 2))],
    ("sm_90", "backward_dq"): [(64, _attention(64, 64, 4, 2)), (128, _attention(64, 32, 4, 2))],
    ("sm_90", "backward_dkv"): [(64, _attention(64, 64, 4, 2)), (128, _attention(32, 64, 4, 2))],
    ("sm_100", "forward"): [(64, _attention(64, 64, 4, 2)), (128, _attention(64, 64, 8, 2))],
    ("sm_100", "backward_dq"): [(64, _attention(64, 64, 8, 2)), (128, _attention(64, 32, 8, 2))],
    ("sm_100", "backward_dkv"): [(64, _attention(64, 64, 8, 2)), (128, _attention(32, 64, 8, 2))],
    ("gfx942", "forward"): [(64, _attention(64, 64, 4, 1)), (128, _attention(64, 32, 4, 1))],
    ("gfx942", "backward_dq"): [(64, _attention(64, 32, 4, 1)), (128, _attention(64, 32, 8, 1))],
    ("gfx942", "backward_dkv"): [(64, _attention(32, 64, 4, 1)), (128, _attention(32, 64, 8, 1))],
}

#: float32 has no tensor-core product of full precision, so its tiles are small: one row for every architecture.
_ATTENTION_FLOAT: dict[str, list[tuple[int, Tiles]]] = {
    "forward": [(64, _attention(32, 32, 4, 1)), (128, _attention(32, 16, 8, 1))],
    "backward_dq": [(64, _attention(32, 16, 8, 1)), (128, _attention(16, 16, 8, 1))],
    "backward_dkv": [(64, _attention(16, 32, 8, 1)), (128, _attention(16, 16, 8, 1))],
}

#: The interpreter pays by the program, not by the register.
_ATTENTION_INTERPRETED = _attention(64, 64, 4, 1)


@functools.cache
def attention_table(target: str, kernel: str, itemsize: int, head_dim: int) -> Tiles:
    """Tiles of an attention kernel: `kernel` is "forward", "backward_dq" or "backward_dkv"."""
    if target == "interpreter":
        return _ATTENTION_INTERPRETED
    rows = _ATTENTION_FLOAT[kernel] if itemsize == 4 else _ATTENTION_HALF[target, kernel]
    return next(tiles for widest, tiles in rows if head_dim <= widest)


def attention_tiles(kernel: str, qkv: torch.Tensor) -> Tiles:
    return attention_table(arch(qkv.device), kernel, qkv.element_size(), qkv.shape[3])


@functools.cache
def row_tiles(features: int, elements: int = 4096) -> Tiles:
    """Tiles of a kernel that holds whole rows: BLOCK_M rows of BLOCK_N >= features.

    About `elements` elements a program: several rows where rows are short, so that every thread has a few independent
    128-bit accesses in flight; the warps grow with the tile to keep it in registers.
    """
    block_n = max(16, triton.next_power_of_2(features))
    block_m = max(1, min(16, elements // block_n))
    num_warps = min(16, max(1, block_m * block_n // 512))
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": 1}


#: Element-wise kernels with a column reduction: rows and columns of a tile.
COLUMN_TILES: Tiles = {"BLOCK_M": 16, "BLOCK_N": 128, "num_warps": 4, "num_stages": 1}

#: Programs that share the rows of a backward pass, each leaving one row of partial sums: enough to fill a GPU, few
#: enough that reading the partials costs little.
PARTIAL_SUMS = 256

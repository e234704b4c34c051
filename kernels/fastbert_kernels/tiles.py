"""Tile shapes by kernel, architecture, dtype and width: data, not timing at the first call.

The same call gets the same kernel in every process and on every rank. Chosen for Triton 3.9, and looked at with 3.6,
the oldest that is allowed, so that no kernel spills on any NVIDIA target: `python -m bench.static` shows what each
compiles to, and with `--alternatives` what its neighbours would. Tiles that a user measured on a GPU of their own, see
`tuned.py`, go before these at a launch, and nowhere else; so does the number of tokens from which on the feed-forward
block's products are fused.
"""

import functools

import torch

from . import reference
from .attention_tables import (
    ATTENTION_FLOAT,
    ATTENTION_FLOAT_OWN,
    ATTENTION_HALF,
    ATTENTION_SHORT,
    ATTENTION_SHORT_OWN,
    ATTENTION_TF32,
    ATTENTION_TF32_LONG,
    ATTENTION_TF32_OWN,
    RELATION_FLOAT,
    RELATION_HALF,
    RELATION_TF32,
    ROWS_OF,
    TF32_HEAD_DIMS,
    TF32_TARGETS,
    attention_tile,
)
from .backend import allows_tf32, arch
from .catalogue import SHORT, Product, Tiles
from .language import tl, triton
from .launch import cdiv, multiprocessors
from .tuned import tuned_start, tuned_tiles


def _product(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int, descriptors: bool) -> Tiles:
    sides = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_GROUP": 8}
    return {**sides, "HAS_DESCRIPTORS": descriptors, "num_warps": num_warps, "num_stages": num_stages}


#: Programs of a persistent product on a multiprocessor: with two, one multiplies while the other is at its activation.
PRODUCT_PROGRAMS = 2

#: architecture -> tiles of the feed-forward kernels for two-byte dtypes, both directions. Two programs fit everywhere,
#: and nothing spills. Eight warps issue 40% more and 256 columns leave room for one program only. Warps specialised by
#: Triton 3.9: sm_90 compiles no backward pass, sm_100 spills in the forward pass or compiles none.
_FEED_FORWARD_HALF: dict[str, Tiles] = {
    "sm_80": _product(128, 128, 32, 4, 3, descriptors=False),
    "sm_90": _product(128, 128, 64, 4, 3, descriptors=True),
    "sm_100": _product(128, 128, 64, 4, 3, descriptors=True),
    "gfx942": _product(128, 128, 32, 4, 2, descriptors=False),
}

_FEED_FORWARD_HALF |= dict.fromkeys(ROWS_OF, _FEED_FORWARD_HALF["sm_80"])

#: float32 is right but never chosen: no tensor core has its full precision.
_FEED_FORWARD_FLOAT = _product(64, 64, 32, 8, 2, descriptors=False)

_FEED_FORWARD_INTERPRETED = _product(64, 64, 32, 4, 1, descriptors=True)

#: architecture -> hidden size up to which the feed-forward block's products have the activation inside; elsewhere
#: cuBLAS, and the activation in a kernel of its own. Not measured: fused where it is faster by 5% or more in an
#: estimate that takes two assumptions against it, a product at 80% of cuBLAS's speed (86% is what a Triton product had
#: on H100 before it was persistent) and nothing of what follows the product hidden by it. `bench.static.fused` computes
#: it, `python -m bench.static --kernel feed_forward_forward` prints it. 32,768 tokens forward, fused and apart: H200:
#: 384 take 90 and 96 us, 448 take 117 and 121, 768 take 303 and 289. A100: 384 take 203 and 223, 512 take 340 and 352.
#: B200: 384 take 50 and 42, for products are too fast. Of the smaller targets the GPU with the fewest FLOP/s for a
#: byte/s decides: about 70 on GeForce 30, 110 on 40, 86 on 50 (A10 has 208, L4 403). gfx942 has no estimate. Training
#: has the same limits; its backward pass, where cuBLAS's way moves four matrices (tokens, intermediate), would allow
#: larger ones.
_FEED_FORWARD_FUSED: dict[str, int] = {"sm_80": 384, "sm_86": 312, "sm_89": 512, "sm_90": 384, "sm_120": 384}

#: With these activations: gelu_tanh's derivative spills in the backward pass on sm_90.
FEED_FORWARD_ACTIVATIONS = tuple(name for name in reference.ACTIVATIONS if name != "gelu_tanh")

#: Tokens from which on. With fewer, tiles leave multiprocessors without work in the last round: at 8,192 tokens and
#: 1536 columns, 768 tiles are 2.9 rounds of an H200.
_FEED_FORWARD_TOKENS = 8192

#: The interpreter pays by the program, not by the register.
_ATTENTION_INTERPRETED = attention_tile(64, 64, 4, 1)


@functools.cache
def block_width(features: int) -> int:
    """The width of a block that holds `features`: a power of two, and what `tl.dot` takes."""
    return max(16, triton.next_power_of_2(features))


@functools.cache
def attention_table(
    target: str,
    kernel: str,
    itemsize: int,
    head_dim: int,
    maps: bool,
    up_to: int | None = None,
    tf32: bool = False,
) -> Tiles:
    """Tiles of an attention kernel, and the PRECISION of its products: see `numerics.dot`.

    Args:
        target: what `backend.arch` says.
        kernel: "forward", "backward_dq" or "backward_dkv".
        itemsize: bytes of an element of qkv.
        head_dim: up to 128.
        maps: whether the launch has a bias, or probabilities to write, or a gradient of them to read. Tiles for a
            launch that does are right, if slower, for one that does not.
        up_to: what `short_class` says.
        tf32: what `backend.allows_tf32` says.
    """
    if target == "interpreter":
        return _ATTENTION_INTERPRETED | {"PRECISION": "ieee"}
    if itemsize == 4 and target in TF32_TARGETS and head_dim in TF32_HEAD_DIMS and not maps:
        tiles = ATTENTION_TF32_OWN.get((target, kernel, head_dim), ATTENTION_TF32[kernel])
        if target == "sm_90" and up_to is None:
            tiles = ATTENTION_TF32_LONG[kernel, head_dim]
        return tiles | {"PRECISION": "tf32" if tf32 else "tf32x3"}
    if itemsize == 4:
        rows = ATTENTION_FLOAT_OWN.get((target, kernel), ATTENTION_FLOAT[kernel])
    elif up_to is not None and target.startswith("sm_"):
        # The products of sm_100 begin at 128 rows: of two halves of them, small ones issue a quarter less.
        up_to = 32 if target == "sm_100" else up_to
        rows = ATTENTION_SHORT_OWN.get((target, up_to, kernel), ATTENTION_SHORT[up_to, kernel])
    else:
        rows = ATTENTION_HALF[target, kernel]
    tiles = next(with_maps if maps else without for widest, without, with_maps in rows if head_dim <= widest)
    return tiles | {"PRECISION": "ieee"}


def short_class(max_seqlen: int, planes: int = 1, processors: int = 1) -> int | None:
    """Which of `SHORT` a launch of an attention kernel is up to, None for longer sequences: see `catalogue.Launch`.

    Where long sequences are fewer programs of 128 rows than there are multiprocessors, smaller tiles make more of them.

    Args:
        max_seqlen: tokens of the longest sequence.
        planes: heads of all sequences.
        processors: how many multiprocessors there are; default, never more than programs.
    """
    for up_to in SHORT:
        if max_seqlen <= up_to:
            return up_to
    return SHORT[-1] if planes * cdiv(max_seqlen, 128) < processors else None


def attention_tiles(qkv: torch.Tensor, maps: bool, max_seqlen: int, batch: int, *kernels: str) -> list[Tiles]:
    """`attention_table` of each of the kernels for qkv (tokens, 3, heads, head_dim), on the device it is on.

    Args:
        maps, kernels: as of `attention_table`.
        max_seqlen, batch: tokens of the longest sequence, and sequences.
    """
    device, itemsize = qkv.device, qkv.element_size()
    head_dim = int(qkv.shape[3])  # of a graph's symbol, the number
    up_to = short_class(max_seqlen, batch * qkv.shape[2], multiprocessors(device))
    tf32 = itemsize == 4 and allows_tf32()
    target, found = arch(device), []
    for kernel in kernels:
        shipped = attention_table(target, kernel, itemsize, head_dim, maps, up_to, tf32)
        own = tuned_tiles(f"attention_{kernel}", qkv, head_dim, {}, maps, up_to, tf32)
        found.append(shipped | own if own else shipped)
    return found


def relation_tiles(kernel: str, student: torch.Tensor, teacher: torch.Tensor) -> Tiles:
    """`relation_table` for operands (tokens, heads, dim) of both models, on the device they are on."""
    wider = student if student.element_size() >= teacher.element_size() else teacher
    itemsize = wider.element_size()
    narrow, dim = sorted((int(student.shape[2]), int(teacher.shape[2])))
    tf32 = itemsize == 4 and allows_tf32()
    shipped = relation_table(arch(student.device), kernel, itemsize, dim, narrow, tf32)
    return shipped | tuned_tiles(f"relation_{kernel}", wider, dim, {}, tf32=tf32)


@functools.cache
def relation_table(
    target: str, kernel: str, itemsize: int, dim: int, narrow: int | None = None, tf32: bool = False
) -> Tiles:
    """Tiles of a relation kernel, and the PRECISION of its products: see `numerics.dot`.

    Args:
        target: what `backend.arch` says.
        kernel: "forward", "backward_a" or "backward_b".
        itemsize: bytes of an element of the wider of both models' operands.
        dim: the larger of both models' dims, up to 128.
        narrow: the smaller of them; default the same.
        tf32: what `backend.allows_tf32` says.
    """
    if target == "interpreter":
        return _ATTENTION_INTERPRETED | {"PRECISION": "ieee"}
    if itemsize == 4 and target in TF32_TARGETS and {dim, narrow or dim} <= set(TF32_HEAD_DIMS):
        return RELATION_TF32[target, kernel][dim] | {"PRECISION": "tf32" if tf32 else "tf32x3"}
    if itemsize == 4:
        tiles = next(tiles for widest, tiles in RELATION_FLOAT[kernel] if dim <= widest)
    else:
        tiles = RELATION_HALF[target, kernel]
    return tiles | {"PRECISION": "ieee"}


@functools.cache
def feed_forward_table(target: str, itemsize: int, descriptors: bool) -> Tiles:
    """Tiles of the feed-forward kernels.

    Args:
        target: what `backend.arch` says.
        itemsize: bytes of an element.
        descriptors: whether every row starts at a multiple of 16 bytes, as tensor descriptors need.
    """
    if target == "interpreter":
        return _FEED_FORWARD_INTERPRETED | {"HAS_DESCRIPTORS": descriptors}
    if itemsize == 4:
        return _FEED_FORWARD_FLOAT
    tiles = _FEED_FORWARD_HALF[target]
    return tiles if descriptors or not tiles["HAS_DESCRIPTORS"] else _FEED_FORWARD_HALF["sm_80"]


def feed_forward_tiles(kernel: str, a: torch.Tensor, b: torch.Tensor) -> Tiles:
    """`feed_forward_table` for the two contiguous matrices of a product, on the device they are on.

    Args:
        kernel: "forward" or "backward".
        a: (count, inner).
        b: the weight.
    """
    itemsize = a.element_size()
    # A graph's tensors have no address. Torch's storages start at multiples of 16 bytes.
    aligned = all(x.shape[1] * itemsize % 16 == 0 and x.storage_offset() * itemsize % 16 == 0 for x in (a, b))
    shipped = feed_forward_table(arch(a.device), itemsize, aligned)
    # Measured where rows are aligned.
    inner = int(a.shape[1])  # of a graph's symbol, the number
    return shipped | tuned_tiles(f"feed_forward_{kernel}", a, inner, {}) if aligned else shipped


def feed_forward_fusible(dtype: torch.dtype, inner: int, features: int, activation: str | None) -> bool:
    """Whether the feed-forward block's products between inner and features can have the activation inside at all."""
    return dtype.itemsize == 2 and inner % 8 == features % 8 == 0 and activation in FEED_FORWARD_ACTIVATIONS


def feed_forward_start(target: str, inner: int) -> int | None:
    """Tokens from which on products that can be fused are, as shipped; None for never."""
    return _FEED_FORWARD_TOKENS if inner <= _FEED_FORWARD_FUSED.get(target, 0) else None


def feed_forward_fits(
    device: torch.device, dtype: torch.dtype, tokens: int, inner: int, features: int, activation: str
) -> bool:
    """Whether the feed-forward block's products of (tokens, inner) to (tokens, features) have the activation inside."""
    if not feed_forward_fusible(dtype, inner, features, activation):
        return False
    start = tuned_start(device, Product(dtype, inner, activation), feed_forward_start(arch(device), inner))
    return start is not None and tokens >= start


#: Bytes of one tensor that a program of a kernel of whole rows has as its tile, and that a warp has of it. A forward
#: program has one tile: small ones keep more of them resident. A backward program goes through many rows and adds them
#: up: larger tiles, fewer rounds. The embeddings' sums cost less where a thread holds more elements: a sixth less to
#: issue where 384 are wide than of half the tile on as many warps, which spills with Triton 3.6 on sm_100.
_ROW_BYTES = {
    "add_layer_norm_forward": (4096, 1024),
    "add_layer_norm_backward": (8192, 1024),
    "embed_forward": (4096, 1024),
    "embed_backward": (8192, 2048),
}


@functools.cache
def row_tiles(kernel: str, features: int, itemsize: int) -> Tiles:
    """Tiles of a kernel that holds whole rows: BLOCK_M rows of BLOCK_N >= features.

    A tile of about `_ROW_BYTES`: several rows where rows are short, so that every thread has two independent 128-bit
    accesses of each tensor in flight; the warps grow with the tile to keep it in registers. Where 128-bit accesses do
    not fit the rows, every element has an address of its own in registers, and a thread gets a quarter.
    """
    program_bytes, warp_bytes = _ROW_BYTES[kernel]
    wide = features * itemsize % 16 == 0
    block_n = block_width(features)
    # An odd number of 16 bytes in a row: at twice this tile ptxas spills on sm_100, to fit one more program.
    program_bytes //= 2 if wide and features * itemsize % 32 else 1
    block_m = max(1, min(16, (program_bytes if wide else program_bytes // 4) // (block_n * itemsize)))
    # Over 8 warps, ptxas spills in the widest rows, float32 of 4096, to fit two programs on a multiprocessor; and where
    # a thread holds more than 16 columns of such a row.
    num_warps = max(1, block_m * block_n * itemsize // (warp_bytes if wide else 256), block_n // 512)
    num_warps = min(8 if wide else 16, num_warps)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": 1}


@functools.cache
def column_tiles(features: int) -> Tiles:
    """Tiles of an element-wise kernel with a column reduction: 128-bit accesses, 16 rows to add up in a thread.

    Where 128-bit accesses do not fit the rows, a thread holds the addresses of a quarter as many elements.
    """
    wide = features % 8 == 0
    return {"BLOCK_M": 16 if wide else 8, "BLOCK_N": 128, "num_warps": 4 if wide else 8, "num_stages": 1}


#: Tiles under way in a loop whose loads feed no product: one is worked on while the next is copied to shared memory
#: asynchronously. The compiler does so of itself only for what a product takes.
LOAD_STAGES: tl.constexpr = tl.constexpr(2)

#: Programs that share the rows of a backward pass, each leaving one row of partial sums: enough to fill a GPU, few
#: enough that reading the partials costs little.
PARTIAL_SUMS = 256

"""Other ways to run the attention op's forward pass: candidates, which none of the package's own calls uses.

Two tiles in flight: the scores of the next tile of keys are multiplied before the softmax of the present one, so that
where products are asynchronous (sm_90) tensor cores work under the softmax. Triton 3.9 waits right behind that product,
but ptxas moves parts of the softmax in between: without dropout 16 of 34 exponentials of a thread, with it none. A loop
that begins with the context's product of the tile before needs no such wait; ptxas then runs all products one by one
(C7514), as carried scores are copied while they are written.

Persistent: as many programs as the multiprocessors hold, each with every so many-th block of rows, so that no last wave
is half empty.

Packed sequences alone, without bias, maps and head mask. What is computed is the shipped kernel's, in the same order,
with the same dropout mask: results differ by rounding at most.
"""

from typing import NamedTuple

import torch

from fastbert.tuning.neighbours import shipped_tiles
from fastbert.tuning.problems import DROPOUT_P, SEED, STREAM
from fastbert_kernels.attention import _forward
from fastbert_kernels.catalogue import Launch, Tiles
from fastbert_kernels.language import tl, triton
from fastbert_kernels.launch import cdiv, dropout_arguments, multiprocessors
from fastbert_kernels.numerics import LOG2E, cast, dot, dropout_keep_map
from fastbert_kernels.score_tiles import load_heads, store_heads
from fastbert_kernels.sequences import blocked_length
from fastbert_kernels.tiles import block_width

#: By name, switches of the kernel.
VARIANTS: dict[str, dict[str, bool]] = {
    "two tiles in flight": {"HAS_TWO_TILES": True, "HAS_MANY_BLOCKS": False},
    "persistent": {"HAS_TWO_TILES": False, "HAS_MANY_BLOCKS": True},
}
#: By target and warps, registers that a persistent kernel of long sequences is held to, so that as many programs fit as
#: of the shipped one: of itself ptxas takes up to a third more for the outer loop. On sm_100 it spills so.
_REGISTERS = {("sm_80", 4): 168, ("sm_90", 8): 128}
#: What they stand beside.
SHIPPED = "shipped"
CONTENDERS = (SHIPPED, *VARIANTS)


@triton.jit
def _scores(
    q, k_ptr, col_start, row_stride, length, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Scores of one tile before they are scaled, zeros past `length`: float32 [BLOCK_M, BLOCK_N]."""
    k = load_heads(k_ptr, col_start + tl.arange(0, BLOCK_N), row_stride, length, HEAD_DIM, BLOCK_D)
    return dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], dtype=tl.float32))


@triton.jit
def _rows(
    number,  # of the block, among those of all heads of all sequences, each of which has `blocks`
    blocks,
    qkv_ptr,
    out_ptr,
    stats_ptr,
    cu_seqlens_ptr,
    order_ptr,
    seed_ptr,
    tokens,
    heads,
    scale,
    site,
    keep_threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_TWO_TILES: tl.constexpr,
):
    """BLOCK_M rows of one head of one sequence, as `attention_forward` has them. Blocks past its end do nothing."""
    plane = number // blocks
    h = plane % heads
    b = tl.load(order_ptr + plane // heads)
    plane = b * heads + h
    start = tl.load(cu_seqlens_ptr + b)
    length = tl.load(cu_seqlens_ptr + b + 1) - start
    start = tl.cast(start, tl.int64)
    row_start = (number % blocks) * BLOCK_M
    if row_start < length:
        rows = row_start + tl.arange(0, BLOCK_M)
        row_stride = 3 * heads * HEAD_DIM
        q_ptr = qkv_ptr + start * row_stride + h * HEAD_DIM
        k_ptr = q_ptr + heads * HEAD_DIM
        v_ptr = k_ptr + heads * HEAD_DIM
        scale_log2 = scale * LOG2E
        q = load_heads(q_ptr, rows, row_stride, length, HEAD_DIM, BLOCK_D)
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        if HAS_TWO_TILES:
            after = _scores(q, k_ptr, 0, row_stride, length, HEAD_DIM, BLOCK_D, BLOCK_N)
        for col_start in tl.range(0, length, BLOCK_N):
            if HAS_TWO_TILES:
                s = after
                after = _scores(q, k_ptr, col_start + BLOCK_N, row_stride, length, HEAD_DIM, BLOCK_D, BLOCK_N)
            else:
                s = _scores(q, k_ptr, col_start, row_stride, length, HEAD_DIM, BLOCK_D, BLOCK_N)
            cols = col_start + tl.arange(0, BLOCK_N)
            s = tl.where((cols < length)[None, :], s, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(s, axis=1) * scale_log2)
            rescale = tl.exp2(row_max - new_max)
            p = tl.exp2(s * scale_log2 - new_max[:, None])
            row_sum = row_sum * rescale + tl.sum(p, axis=1)
            if HAS_DROPOUT:
                keep = dropout_keep_map(seed_ptr, site, plane, row_start, col_start, keep_threshold, BLOCK_M, BLOCK_N)
                p = tl.where(keep, p, 0.0)
            v = load_heads(v_ptr, cols, row_stride, length, HEAD_DIM, BLOCK_D)
            acc = dot(cast(p, v.dtype), v, acc * rescale[:, None])
            row_max = new_max
        factor = 1.0
        if HAS_DROPOUT:
            factor = keep_scale
        o_ptr = out_ptr + start * heads * HEAD_DIM + h * HEAD_DIM
        store_heads(o_ptr, acc * (factor / row_sum)[:, None], rows, heads * HEAD_DIM, length, HEAD_DIM, BLOCK_D)
        max_ptr = stats_ptr + h.to(tl.int64) * tokens + start
        tl.store(max_ptr + rows, row_max, mask=rows < length)
        tl.store(max_ptr + tl.cast(heads, tl.int64) * tokens + rows, tl.log2(row_sum), mask=rows < length)


@triton.jit(do_not_specialize=["tokens", "batch", "site", "keep_threshold"])
def attention_variant(
    qkv_ptr,  # (tokens, 3, heads, HEAD_DIM)
    out_ptr,  # (tokens, heads, HEAD_DIM), dtype of qkv
    stats_ptr,  # (2, heads, tokens) float32, as of attention_forward
    cu_seqlens_ptr,  # (batch + 1,) int32
    order_ptr,  # (batch,) int32, the sequences from first to last
    seed_ptr,  # int64 scalar; unused without HAS_DROPOUT
    tokens,
    heads,
    max_seqlen,
    batch,
    scale,  # above zero
    site,  # int32, which dropout of the model this is
    keep_threshold,  # int32, see dropout_keep_map
    keep_scale,  # 1 / (1 - dropout_p)
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_TWO_TILES: tl.constexpr,
    HAS_MANY_BLOCKS: tl.constexpr,
):
    """One program: a block of rows, or with HAS_MANY_BLOCKS as many as there are programs apart."""
    blocks = tl.cdiv(max_seqlen, BLOCK_M)
    if HAS_MANY_BLOCKS:
        for number in tl.range(tl.program_id(0), blocks * heads * batch, tl.num_programs(0)):
            _rows(
                number, blocks, qkv_ptr, out_ptr, stats_ptr, cu_seqlens_ptr, order_ptr, seed_ptr, tokens, heads, scale,
                site, keep_threshold, keep_scale, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_DROPOUT, HAS_TWO_TILES,
            )  # fmt: skip
    else:
        _rows(
            tl.program_id(0), blocks, qkv_ptr, out_ptr, stats_ptr, cu_seqlens_ptr, order_ptr, seed_ptr, tokens, heads,
            scale, site, keep_threshold, keep_scale, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_DROPOUT, HAS_TWO_TILES,
        )  # fmt: skip


def variant_tiles(variant: str, launch: Launch, target: str) -> Tiles:
    """The tiles of one of `CONTENDERS`: those of a launch of `attention_forward`, as shipped."""
    tiles = {name: value for name, value in shipped_tiles(launch, target).items() if name != "PRECISION"}
    registers = _REGISTERS.get((target, tiles["num_warps"]))
    if registers and variant != SHIPPED and VARIANTS[variant]["HAS_MANY_BLOCKS"]:
        tiles["maxnreg"] = registers
    return tiles


class Call(NamedTuple):
    """Arguments of attention, as `fastbert_kernels.attention` names them."""

    qkv: torch.Tensor
    cu_seqlens: torch.Tensor
    order: torch.Tensor
    max_seqlen: int
    dropout_p: float = 0.0
    seed: torch.Tensor | None = None
    stream: int = 0


def drawn_call(
    lengths: tuple[int, ...], heads: int, head_dim: int, dtype: torch.dtype, dropout: bool, device: torch.device
) -> Call:
    """A call of packed sequences, the same for the same arguments."""
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, device=device).to(dtype)
    ends = torch.tensor((0, *lengths)).cumsum(0).to(device, torch.int32)
    order = torch.tensor(lengths).argsort(descending=True, stable=True).to(device, torch.int32)
    drop = (DROPOUT_P, torch.tensor(SEED, device=device), STREAM) if dropout else ()
    return Call(qkv, ends, order, max(lengths), *drop)


@torch.no_grad()
def attend(variant: str, call: Call, tiles: Tiles, resident: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by one of `VARIANTS`, or as `SHIPPED`.

    Args:
        variant: its name.
        call: the arguments.
        tiles: of a variant, as `variant_tiles` has them.
        resident: programs of a persistent kernel on each multiprocessor.

    Returns:
        The context (tokens, heads, head_dim), and the statistics (2, heads, tokens).
    """
    qkv, cu_seqlens, order, max_seqlen, dropout_p, seed, stream = call
    tokens, _, heads, head_dim = qkv.shape
    scale = head_dim**-0.5
    if variant == SHIPPED:
        given = (qkv, cu_seqlens, max_seqlen, None, None, scale, dropout_p, seed, stream, 0, None, order, None)
        out, stats, _ = _forward(*given)
        return out, stats
    out = qkv.new_empty(tokens, heads, head_dim)
    stats = qkv.new_empty(2, heads, tokens, dtype=torch.float32)
    programs = cdiv(max_seqlen, tiles["BLOCK_M"]) * heads * order.shape[0]
    if VARIANTS[variant]["HAS_MANY_BLOCKS"]:
        programs = min(programs, resident * multiprocessors(qkv.device))
    attention_variant[(programs,)](
        qkv_ptr=qkv,
        out_ptr=out,
        stats_ptr=stats,
        cu_seqlens_ptr=cu_seqlens,
        order_ptr=order,
        tokens=tokens,
        heads=heads,
        max_seqlen=blocked_length(cu_seqlens, max_seqlen),
        batch=order.shape[0],
        scale=scale,
        HEAD_DIM=head_dim,
        BLOCK_D=block_width(head_dim),
        enable_fp_fusion=True,
        **dropout_arguments(qkv, dropout_p, seed, stream),
        **VARIANTS[variant],
        **tiles,
    )
    return out, stats

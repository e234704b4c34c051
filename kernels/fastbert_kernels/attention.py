"""Masked multi-head attention over packed sequences, forward and backward, with optional differentiable probabilities.

With S = scale * Q K^T + bias, P = softmax(S), D the inverted dropout mask and g the head's mask value:

    P~ = g * D * P            the probabilities that leave the op
    O  = P~ V                 the context

The softmax streams over key tiles with a running maximum (Milakov and Gimelshein, arXiv:1805.02867; Dao et al.,
arXiv:2205.14135), in base 2, in float32. Only the log-sum-exp of each row is kept
for the backward pass, as its maximum and the logarithm of its sum.
"""

from typing import Any

import torch

from . import reference
from .attention_arguments import check, op_arguments
from .attention_backward_kernels import attention_backward_dkv, attention_backward_dq
from .attention_kernels import attention_forward
from .attention_map import AttentionContext, HandOut, handed_out, in_graph, watch
from .backend import uses_triton
from .catalogue import Tiles
from .launch import cdiv, dropout_arguments, register_op, wrap_triton
from .sequences import batch_size, blocked_length
from .tiles import attention_tiles, block_width


def _common_arguments(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    columns: torch.Tensor | None,
    order: torch.Tensor | None,
    bias: torch.Tensor | None,
    key_spans: torch.Tensor | None,
    head_mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    stream: int,
    max_seqlen: int,
    probs_seq: int,
    scale: float,
) -> dict[str, Any]:
    """The kernel arguments that all three kernels share. An absent tensor is stood in for by qkv, never read."""
    strides = (0, 0, 0) if bias is None else bias.stride()[:3]
    return {
        "cu_seqlens_ptr": qkv if cu_seqlens is None else cu_seqlens,
        "columns_ptr": qkv if columns is None else columns,
        "order_ptr": qkv if order is None else order,
        "bias_ptr": qkv if bias is None else bias,
        "key_spans_ptr": qkv if key_spans is None else key_spans,
        "head_mask_ptr": qkv if head_mask is None else head_mask,
        "tokens": qkv.shape[0],
        "heads": qkv.shape[2],
        "max_seqlen": blocked_length(cu_seqlens, max_seqlen),
        "probs_seq": probs_seq,
        "bias_batch_stride": strides[0],
        "bias_head_stride": strides[1],
        "bias_row_stride": strides[2],
        "masked_below": 0.0 if bias is None else reference.masked_below(bias.dtype),
        "scale": scale,
        "HEAD_DIM": int(qkv.shape[3]),  # of a graph's symbol, the number
        "BLOCK_D": block_width(int(qkv.shape[3])),
        "HAS_CU_SEQLENS": cu_seqlens is not None,
        "HAS_COLUMNS": columns is not None,
        "HAS_ORDER": order is not None,
        "HAS_BIAS": bias is not None and key_spans is None,
        "HAS_KEY_SPANS": key_spans is not None,
        "HAS_HEAD_MASK": head_mask is not None,
        **dropout_arguments(qkv, dropout_p, seed, stream),
    }


def _moves_maps(bias: torch.Tensor | None, key_spans: torch.Tensor | None, probs_seq: int) -> bool:
    """Whether the kernels read or write (seq, seq) planes; of a bias with key spans they read one row."""
    return probs_seq > 0 or (bias is not None and key_spans is None)


def _forward_fake(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    bias: torch.Tensor | None,
    head_mask: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    stream: int,
    probs_seq: int,
    columns: torch.Tensor | None,
    order: torch.Tensor | None,
    key_spans: torch.Tensor | None,
    whole: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(tokens, heads, head_dim)
    stats = qkv.new_empty(2, heads, tokens, dtype=torch.float32)
    shape = (batch_size(qkv, cu_seqlens, max_seqlen), heads, probs_seq, probs_seq) if probs_seq > 0 else (0,)
    return out, stats, qkv.new_empty(shape)


@register_op("attention", _forward_fake)
def _forward(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    bias: torch.Tensor | None,
    head_mask: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    stream: int,
    probs_seq: int,
    columns: torch.Tensor | None,
    order: torch.Tensor | None,
    key_spans: torch.Tensor | None,
    whole: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The context, the softmax's statistics, and the probabilities. `whole`, of which only the backward pass takes
    notice, says that their gradient will have the context's part in it: see `attention_map`."""
    tokens, _, heads, head_dim = qkv.shape
    batch = batch_size(qkv, cu_seqlens, max_seqlen)
    out = qkv.new_empty(tokens, heads, head_dim)
    stats = qkv.new_empty(2, heads, tokens, dtype=torch.float32)
    if probs_seq == 0:
        probs = qkv.new_empty(0)
    elif columns is None:
        probs = qkv.new_empty(batch, heads, probs_seq, probs_seq)  # the kernel writes the padding's zeros too
    else:
        probs = qkv.new_zeros(batch, heads, probs_seq, probs_seq)
    arguments = _common_arguments(
        qkv, cu_seqlens, columns, order, bias, key_spans, head_mask, seed, dropout_p, stream, max_seqlen, probs_seq,
        scale,
    )  # fmt: skip
    longest = max(max_seqlen, probs_seq)
    (tiles,) = attention_tiles(qkv, _moves_maps(bias, key_spans, probs_seq), longest, batch, "forward")
    grid = (cdiv(longest, tiles["BLOCK_M"]) * heads * batch,)
    if grid[0] > 0:
        wrap_triton(attention_forward)[grid](
            qkv_ptr=qkv, out_ptr=out, stats_ptr=stats, probs_ptr=probs, HAS_PROBS=probs_seq > 0, **arguments, **tiles
        )
    return out, stats, probs


def _backward_fake(
    dout: torch.Tensor,
    dprobs: torch.Tensor | None,
    qkv: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    bias: torch.Tensor | None,
    head_mask: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    stream: int,
    columns: torch.Tensor | None,
    order: torch.Tensor | None,
    key_spans: torch.Tensor | None,
    whole: bool = False,
    sums: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dhead_mask = qkv.new_empty(0) if head_mask is None else torch.empty_like(head_mask)
    maps = _moves_maps(bias, key_spans, 0 if dprobs is None else dprobs.shape[-1])
    batch = batch_size(qkv, cu_seqlens, max_seqlen)
    *_, dq_sums, dkv_sums = _backward_plan(qkv, cu_seqlens, max_seqlen, batch, maps, sums)
    return torch.empty_like(qkv), dhead_mask, dq_sums, dkv_sums


def _backward_plan(
    qkv: torch.Tensor, cu_seqlens: torch.Tensor | None, max_seqlen: int, batch: int, maps: bool, sums: bool
) -> tuple[Tiles, Tiles, torch.Tensor, torch.Tensor]:
    """Of dQ, and of dK and dV: tiles, and the memory of partial sums, empty without `sums`."""
    dq_tiles, dkv_tiles = attention_tiles(qkv, maps, max_seqlen, batch, "backward_dq", "backward_dkv")
    dq_sums = _empty_sums(qkv, cu_seqlens, max_seqlen, batch, dq_tiles["BLOCK_M"], 1 if sums else 0)
    dkv_sums = _empty_sums(qkv, cu_seqlens, max_seqlen, batch, dkv_tiles["BLOCK_N"], 2 if sums else 0)
    return dq_tiles, dkv_tiles, dq_sums, dkv_sums


def _empty_sums(
    qkv: torch.Tensor, cu_seqlens: torch.Tensor | None, max_seqlen: int, batch: int, block: int, count: int
) -> torch.Tensor:
    """Memory of the partial sums of `count` gradients of programs of `block` tokens: rows as in
    `score_tiles.partial_row`."""
    if count == 0:
        return qkv.new_empty(0, dtype=torch.float32)
    tokens, _, heads, head_dim = qkv.shape
    rows = batch * cdiv(max_seqlen, block) if cu_seqlens is None else tokens // block + batch
    return qkv.new_empty(rows, count * heads * head_dim, dtype=torch.float32)


@register_op("attention_backward", _backward_fake)
def _backward(
    dout: torch.Tensor,
    dprobs: torch.Tensor | None,
    qkv: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    bias: torch.Tensor | None,
    head_mask: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    stream: int,
    columns: torch.Tensor | None,
    order: torch.Tensor | None,
    key_spans: torch.Tensor | None,
    whole: bool = False,
    sums: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of qkv and of the head mask; and with `sums`, for `column_sums`, that of a bias which was added to qkv:
    rows of partial sums of dQ, and of dK and dV.

    With dP~ = dO V^T + dP_ext, the gradient that reaches the map from the context and from whoever used the map:

        dP    = g * D * dP~
        delta = rowsum(P * dP) = rowsum(dO * O) + rowsum(P~ * dP_ext)
        dS    = P * (dP - delta)
        dQ = scale * dS K,  dK = scale * dS^T Q,  dV = P~^T dO,  dg = sum(D * P * dP~)

    `whole`: dprobs is all of dP~, with dO V^T in it already, so that delta = rowsum(P~ * dprobs). `out` is not read.

    P is recomputed from the log-sum-exp. Two launches, no atomics: the result is the same every time.
    """
    if whole and dprobs is None:
        raise ValueError("attention's backward pass was told that dprobs is whole, but there is none")
    heads = qkv.shape[2]
    batch = batch_size(qkv, cu_seqlens, max_seqlen)
    dout = dout.contiguous()
    dprobs = None if dprobs is None else dprobs.contiguous()
    probs_seq = 0 if dprobs is None else dprobs.shape[-1]
    arguments = _common_arguments(
        qkv, cu_seqlens, columns, order, bias, key_spans, head_mask, seed, dropout_p, stream, max_seqlen, probs_seq,
        scale,
    )  # fmt: skip
    arguments |= {
        "dout_ptr": dout,
        "dprobs_ptr": qkv if dprobs is None else dprobs,
        "qkv_ptr": qkv,
        "stats_ptr": stats,
        "HAS_DPROBS": dprobs is not None,
        "HAS_WHOLE_DPROBS": whole,
        "HAS_SUMS": sums,
    }
    maps = _moves_maps(bias, key_spans, probs_seq)
    dq_tiles, dkv_tiles, dq_sums, dkv_sums = _backward_plan(qkv, cu_seqlens, max_seqlen, batch, maps, sums)
    blocks = cdiv(max_seqlen, dq_tiles["BLOCK_M"])
    delta = torch.empty_like(stats)
    dqkv = torch.empty_like(qkv)
    if head_mask is None:
        dhead_mask = partials = qkv.new_empty(0)
    else:
        partials = qkv.new_empty(heads, batch * blocks, dtype=torch.float32)
    if blocks * heads * batch > 0:
        wrap_triton(attention_backward_dq)[(blocks * heads * batch,)](
            out_ptr=out,
            delta_ptr=delta,
            dqkv_ptr=dqkv,
            partials_ptr=dq_sums,
            dhead_mask_ptr=partials,
            batch=batch,
            **arguments,
            **dq_tiles,
        )
        blocks = cdiv(max_seqlen, dkv_tiles["BLOCK_N"])
        wrap_triton(attention_backward_dkv)[(blocks * heads * batch,)](
            delta_ptr=delta, dqkv_ptr=dqkv, partials_ptr=dkv_sums, **arguments, **dkv_tiles
        )
    if head_mask is not None:
        dhead_mask = partials.sum(1).to(head_mask.dtype)
    return dqkv, dhead_mask, dq_sums, dkv_sums


_backward.forbid_double_backward("attention")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    qkv, cu_seqlens, max_seqlen, bias, head_mask, scale, dropout_p, seed, stream, _, columns, order, *rest = inputs
    key_spans, *whole = rest
    out, stats, _ = output
    ctx.save_for_backward(qkv, out, stats, cu_seqlens, bias, head_mask, seed, columns, order, key_spans)
    ctx.scalars = (max_seqlen, scale, dropout_p, stream, any(whole))
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(stats)


def _autograd(
    ctx: Any, dout: torch.Tensor | None, dstats: torch.Tensor | None, dprobs: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    qkv, out, stats, cu_seqlens, bias, head_mask, seed, columns, order, key_spans = ctx.saved_tensors
    max_seqlen, scale, dropout_p, stream, whole = ctx.scalars
    dqkv = dhead_mask = None
    if dout is not None or dprobs is not None:
        dout = torch.zeros_like(out) if dout is None else dout
        dprobs = None if dprobs is None or dprobs.numel() == 0 else dprobs
        dqkv, dhead_mask, *_ = _backward(
            dout, dprobs, qkv, out, stats, cu_seqlens, max_seqlen, bias, head_mask, scale, dropout_p, seed, stream,
            columns, order, key_spans, whole and dprobs is not None,
        )  # fmt: skip
    return (dqkv, None, None, None, None if head_mask is None else dhead_mask, *[None] * 9)[: len(ctx.needs_input_grad)]


_forward.register_autograd(_autograd, setup_context=_setup_context)


def attention(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    *,
    bias: torch.Tensor | None = None,
    head_mask: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    stream: int = 0,
    probs_seq: int | None = None,
    columns: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    key_spans: torch.Tensor | None = None,
    hand_out: HandOut | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Multi-head attention of each packed sequence with itself.

    Args:
        qkv: (tokens, 3, heads, head_dim) queries, keys and values; head_dim up to 128.
        cu_seqlens: int32 (batch + 1,), first token of each sequence and, last, the number of tokens; sequences may be
            empty. None: every sequence has `max_seqlen` tokens.
        max_seqlen: tokens in the longest sequence.
        bias: additive scores (batch | 1, heads | 1, seq | 1, seq), float, or bool with True where a key is visible;
            seq at least `max_seqlen`. Entries at or under half the dtype's lowest finite value are masked keys; a row
            with no visible key attends uniformly. Where it is to get a gradient, plain PyTorch runs.
        head_mask: (heads,) factors on each head's probabilities.
        scale: factor on the scores; default 1 / sqrt(head_dim).
        dropout_p: probability that an attention probability is dropped.
        seed: int64 scalar tensor, what the kernels' dropout is drawn from; needed on a GPU when dropout_p > 0.
        stream: which of the draws of `seed` this call uses.
        probs_seq: return the probabilities in maps of this side; at least `max_seqlen`. None: do not.
        columns: int32 (tokens,), each token's row and column in its map. None: its position in its sequence.
        order: int32 (batch,), the sequences in the order in which their work starts; the longest first end together.
            Needs cu_seqlens; the result is the same in any order.
        key_spans: `sequences.key_spans` of a mask of keys, which then is all that `bias` (batch, 1, 1, max_seqlen)
            says: what is masked is skipped where it comes last, and of the bias only the keys before the first number
            are read. Without cu_seqlens. The result is the same without, but for its rounding.
        hand_out: of the probabilities, what is to be returned, and what the context is made of: something of their
            shape and values that is made of the former. Without, both are the probabilities.

    Returns:
        The context (tokens, heads, head_dim), and, if asked, the probabilities (batch, heads, probs_seq, probs_seq)
        after dropout and head mask, zero outside the tokens; both in qkv's dtype, both differentiable. The context is
        made of the probabilities, so that these have its gradient too, and hooks on them count.

    Raises:
        ValueError: for shapes that do not fit each other, a head_dim over 128, a missing seed, mixed devices.
        TypeError: for a dtype that no kernel has.
    """
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    trained = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    if trained or not uses_triton(qkv):
        check(qkv, cu_seqlens, max_seqlen, bias, head_mask, dropout_p, seed, probs_seq, columns, order, key_spans)
        return reference.attention(
            qkv,
            max_seqlen if cu_seqlens is None else cu_seqlens.diff().tolist(),
            bias=bias,
            head_mask=head_mask,
            scale=scale,
            dropout_p=dropout_p,
            probs_seq=probs_seq,
            columns=columns,
            hand_out=hand_out,
        )
    if scale <= 0.0:  # the kernels look for the largest score before they scale
        turned = qkv.new_tensor([-1.0 if scale < 0.0 else 0.0, 1.0, 1.0])
        qkv, scale = qkv * turned[:, None, None], abs(scale) or 1.0
    op = op_arguments(
        qkv, cu_seqlens, max_seqlen, bias, head_mask, scale, dropout_p, seed, stream, probs_seq, columns, order,
        key_spans,
    )  # fmt: skip
    split = probs_seq is not None and type(qkv) is torch.Tensor and in_graph(op.qkv, op.head_mask)
    out, _, probs = _forward(*op, split)
    if probs_seq is None:
        return out, None
    handed, inner = handed_out(probs, hand_out)
    if split:
        out = AttentionContext.apply(inner, out, op.qkv, op.cu_seqlens, max_seqlen, op.columns, watch(handed))
    return out, handed

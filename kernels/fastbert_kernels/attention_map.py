"""Attention's map as a node of the graph: it lies between the scores and the context, as in eager attention.

The kernel makes both in one launch. For autograd they are two steps: the first makes the map and the context, the
second takes the map that was handed out and gives the context on. So the map's gradient is dO V^T and whatever comes
from its other uses, hooks change it, and the first step is given the result, the whole gradient.
"""

import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from .backend import is_traced
from .launch import register_op
from .sequences import batch_size

#: Of the probabilities, what is handed out, and what the context is made of, which is made of the former.
HandOut: TypeAlias = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def in_graph(*makers: torch.Tensor | None) -> bool:
    """Whether what is made of these has a place in a graph whose user sees it."""
    return torch.is_grad_enabled() and not is_traced() and any(x is not None and x.requires_grad for x in makers)


def handed_out(probs: torch.Tensor, hand_out: HandOut | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`hand_out(probs)`; without, the probabilities as they are."""
    return (probs, probs) if hand_out is None else hand_out(probs)


def watch(x: torch.Tensor) -> Callable[[], None]:
    """A check that nobody has changed x in place, which raises RuntimeError. It does not keep x alive."""
    found, version = weakref.ref(x), x._version

    def check() -> None:
        now = found()
        if now is not None and now._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"attentions {tuple(now.shape)}, of which the context is made, are at version {now._version}; expected "
                f"version {version}: change a copy, attentions.clone()"
            )

    return check


def _map_gradient_fake(
    dout: torch.Tensor,
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    columns: torch.Tensor | None,
    side: int,
) -> torch.Tensor:
    return dout.new_empty(batch_size(qkv, cu_seqlens, max_seqlen), qkv.shape[2], side, side)


@register_op("attention_map_gradient", _map_gradient_fake)
def map_gradient(
    dout: torch.Tensor,
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    columns: torch.Tensor | None,
    side: int,
) -> torch.Tensor:
    """dO V^T, the gradient that reaches the map from the context: (batch, heads, side, side), zero outside the tokens.

    `dout` (tokens, heads, head_dim) is the context's gradient; the others are the op's arguments, `side` its
    `probs_seq`.
    """
    batch = batch_size(qkv, cu_seqlens, max_seqlen)
    dout, v = dout.to(qkv.dtype), qkv[:, 2]
    if cu_seqlens is None and columns is None and side == max_seqlen:
        dout, v = dout.unflatten(0, (batch, side)), v.unflatten(0, (batch, side))
    else:
        places = _map_rows(qkv.shape[0], cu_seqlens, max_seqlen, columns, side, qkv.device)
        dout, v = (
            x.new_zeros(batch * side, *x.shape[1:]).index_copy(0, places, x).unflatten(0, (batch, side))
            for x in (dout, v)
        )
    with torch.autocast(qkv.device.type, enabled=False):
        return dout.transpose(1, 2) @ v.permute(0, 2, 3, 1)


map_gradient.forbid_double_backward("attention")


def _map_rows(
    tokens: int,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    columns: torch.Tensor | None,
    side: int,
    device: torch.device,
) -> torch.Tensor:
    """Each token's row among those of all maps: int64 (tokens,)."""
    token = torch.arange(tokens, device=device)
    if cu_seqlens is None:
        sequence = token // max_seqlen
        first = sequence * max_seqlen
    else:
        sequence = torch.arange(cu_seqlens.shape[0] - 1, device=device)
        sequence = sequence.repeat_interleave(cu_seqlens.diff(), output_size=tokens)
        first = cu_seqlens[sequence]
    return sequence * side + (token - first if columns is None else columns)


class AttentionContext(torch.autograd.Function):
    """The context (tokens, heads, head_dim), in the graph behind the map that was handed out."""

    @staticmethod
    def forward(
        ctx: Any,
        inner: torch.Tensor,
        context: torch.Tensor,
        qkv: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        max_seqlen: int,
        columns: torch.Tensor | None,
        check: Callable[[], None],
    ) -> torch.Tensor:
        """`inner` is what `HandOut` gives back; `qkv` has its gradient from elsewhere; `check` is the map's `watch`."""
        ctx.save_for_backward(qkv, cu_seqlens, columns)
        ctx.check, ctx.max_seqlen, ctx.side = check, max_seqlen, inner.shape[-1]
        return context.view_as(context)

    @staticmethod
    def backward(ctx: Any, dcontext: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.check()
        qkv, cu_seqlens, columns = ctx.saved_tensors
        dinner = map_gradient(dcontext, qkv, cu_seqlens, ctx.max_seqlen, columns, ctx.side)
        return dinner, dcontext, None, None, None, None, None

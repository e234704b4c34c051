"""torch's own fused attention, with what it has not: second derivatives, tangents and functorch's transforms."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils import flop_counter
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .backend import has_values, is_transformed, is_watched, takes_tangents
from .gradients import needed_gradients


def fused_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float, dropout_p: float = 0.0
) -> torch.Tensor:
    """softmax(scale * q k^T + bias) v, all (batch, heads, length, head_dim); bias broadcasts to (batch, heads, length,
    length) and has no gradient."""
    if dropout_p == 0.0 and _takes_products(q):
        return _by_products(q, k, v, bias, scale)
    if not has_values(q):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)
    if dropout_p == 0.0 and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return FusedAttention.apply(q, k, v, bias, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)


def _takes_products(q: torch.Tensor) -> bool:
    """Whether products are taken one by one, without dropout: for what torch's fused attention has not, and where its
    FlopCounterMode counts, which does not know the fused one of a CPU."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if is_transformed() or takes_tangents():
        return True
    return q.is_cpu and is_watched() and has_values(q) and any(map(_counts, _get_current_dispatch_mode_stack()))


def _counts(mode: Any) -> bool:
    return type(mode).__module__ == flop_counter.__name__


def _by_products(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    scores = q @ k.transpose(-2, -1) * scale
    return torch.softmax(scores if bias is None else scores + bias, dim=-1) @ v


class FusedAttention(torch.autograd.Function):
    """torch's fused attention, whose backward pass is that of its formula where it is to be differentiated again."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        inner = [x.detach().requires_grad_(needs) for x, needs in zip((q, k, v), ctx.needs_input_grad, strict=False)]
        inner_q, inner_k, inner_v = inner
        with torch.enable_grad():
            context = F.scaled_dot_product_attention(inner_q, inner_k, inner_v, attn_mask=bias, scale=scale)
        ctx.save_for_backward(q, k, v, bias)
        ctx.inner, ctx.scale = (inner, context), scale
        return context.detach()

    @staticmethod
    def backward(ctx: Any, dcontext: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # with create_graph=True
            inputs, context = [q, k, v], _by_products(q, k, v, bias, ctx.scale)
        else:
            inputs, context = ctx.inner
        needed = needed_gradients(ctx)
        asked = [x for x, needs in zip(inputs, needed, strict=False) if needs]
        found = iter(torch.autograd.grad(context, asked, dcontext, True, torch.is_grad_enabled()))
        return *[next(found) if needs else None for needs in needed[:3]], None, None

"""The two blocks of an encoder layer, each one step of autograd: products, and the ops around them.

What a block saves against its ops called one by one lies between them: most of autograd's Python; the launch that adds
the gradient of the block's input to that of its residual; and the activation, which the backward pass makes again.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .attention import _backward as attend_backward
from .attention import _forward as attend_forward
from .attention import op_arguments as attend_arguments
from .backend import is_traced, second_derivative_error, uses_triton
from .feed_forward import in_product_dtype, products, products_backward
from .layer_norm import _forward as norm_forward
from .layer_norm import gradients as norm_gradients
from .layer_norm import op_arguments as norm_arguments


def runs_as_block(x: torch.Tensor) -> bool:
    """Whether a block may run on x: where kernels run, and no compiler or functorch transform is to see the ops."""
    return type(x) is torch.Tensor and not is_traced() and uses_triton(x)


def as_one(neighbours: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Tensors (rows, ...) that lie one after the other in one storage, seen as one (sum of rows, ...), detached."""
    first = neighbours[0].detach()
    return first.as_strided((sum([part.shape[0] for part in neighbours]), *first.shape[1:]), first.stride())


def _run(block: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Run a block as a step of autograd if gradients are on, else its forward alone."""
    if torch.is_grad_enabled():
        # Its own `apply` first looks whether functorch, which `is_traced` rules out, has wrapped an argument.
        return super(torch.autograd.Function, block).apply(*arguments)  # type: ignore[misc]
    return block.forward(None, *arguments)


class _Refused(torch.autograd.Function):
    """Gradients that cannot be differentiated again, whatever it is that required one."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """`anchor` requires a gradient, so that the results do."""
        return tuple([None if grad is None else grad.view_as(grad) for grad in grads])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        raise second_derivative_error("layer")


def _backward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's backward pass: outside of autocast, which is the forward pass's affair, and of autograd."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled():  # with create_graph=True
            with torch.no_grad():
                found = wrapped(ctx, *grads)
            return _Refused.apply(torch.ones((), requires_grad=True), *found)
        if not torch.is_autocast_enabled(ctx.device_type):
            return backward(ctx, *grads)
        with torch.autocast(ctx.device_type, enabled=False):
            return backward(ctx, *grads)

    return wrapped


def _add_product(dz: torch.Tensor, dx: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dz (..., out) + dx (rows, in) @ weight (in, out), in the memory of dz, which must be nobody else's."""
    rows = dz.view(-1, dz.shape[-1])
    if dx.dtype == dz.dtype:
        rows.addmm_(dx, weight)
    else:
        rows.add_(dx @ weight)
    return dz


class _AttentionBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # None: nothing is kept
        hidden: torch.Tensor,
        head_mask: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        heads: int,
        attend: tuple[Any, ...],
        norm: tuple[Any, ...],
        *qkv: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cu_seqlens, max_seqlen, mask, scale, dropout_p, seed, stream, probs_seq, columns, order = attend
        hidden = hidden.contiguous()
        qkv_bias = as_one(qkv[3:]) if len(qkv) > 3 else None
        x, qkv_weight, weight, qkv_bias = in_product_dtype(hidden, as_one(qkv[:3]), weight, qkv_bias)
        head_dim = qkv_weight.shape[0] // (3 * heads)
        projected = F.linear(x, qkv_weight, qkv_bias).view(-1, 3, heads, head_dim)
        arguments = attend_arguments(
            *(projected, cu_seqlens, max_seqlen, mask, head_mask),
            *(scale, dropout_p, seed, stream, probs_seq, columns, order),
        )
        context, stats, probs = attend_forward(*arguments)
        if ctx is None:
            del projected, arguments
        out = F.linear(context.view(*hidden.shape[:-1], heads * head_dim), weight)
        of_norm = norm_arguments(out, bias, hidden, norm_weight, norm_bias, *norm)
        y, mean, rstd = norm_forward(*of_norm)
        if ctx is not None:
            _, bias, _, norm_weight, _, _, hidden_dropout_p, _, hidden_stream = of_norm
            projected, cu_seqlens, _, mask, head_mask, *_, columns, order = arguments
            ctx.save_for_backward(
                hidden,
                None if x.dtype == hidden.dtype else x,
                *(qkv_weight, weight, bias, norm_weight),
                *(projected, context, stats, out, mean, rstd),
                *(cu_seqlens, mask, head_mask, seed, columns, order),
                # That they do not change meanwhile: qkv_weight tells of the first one only.
                *(qkv[1:3] if x.dtype == qkv[0].dtype else ()),
            )
            ctx.attend, ctx.norm = (max_seqlen, scale, dropout_p, stream), (hidden_dropout_p, hidden_stream)
            ctx.device_type = x.device.type
            ctx.qkv_dtype = qkv[0].dtype
            ctx.set_materialize_grads(False)
        return y, probs if probs_seq is not None else None

    @staticmethod
    @_backward
    def backward(ctx: Any, dy: torch.Tensor | None, dprobs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        needs_hidden, _, needs_weight, *_ = needs = ctx.needs_input_grad
        if dy is None and dprobs is None:
            return (None,) * len(needs)
        residual, x, qkv_weight, weight, bias, norm_weight, qkv, context, stats, out, mean, rstd, *rest = (
            ctx.saved_tensors
        )
        cu_seqlens, mask, head_mask, seed, columns, order, *_ = rest
        max_seqlen, scale, dropout_p, stream = ctx.attend
        hidden_dropout_p, norm_stream = ctx.norm
        rows = (residual if x is None else x).view(-1, residual.shape[-1])
        dparameters: list[torch.Tensor | None] = [None] * 4
        if dy is None:  # the probabilities alone were used
            dz, dcontext = None, torch.zeros_like(context)
        else:
            dout, dbias, dz, *dnorm = norm_gradients(
                dy, out, bias, residual, norm_weight, mean, rstd, hidden_dropout_p, seed, norm_stream
            )
            dout = dout.view(rows.shape)  # the memory of dz where nothing was dropped: dz may change last
            dparameters = [dout.t() @ context.flatten(1) if needs_weight else None, dbias, *dnorm]
            dcontext = (dout @ weight).view(context.shape)
        dqkv, dhead_mask = attend_backward(
            dcontext,
            dprobs,
            *(qkv, context, stats, cu_seqlens, max_seqlen, mask, head_mask),
            *(scale, dropout_p, seed, stream, columns, order),
        )
        dqkv = dqkv.flatten(1)
        dparts: list[torch.Tensor | None] = [None] * 3
        if any(needs[9:12]):
            dparts = [*(dqkv.t() @ rows).to(ctx.qkv_dtype).chunk(3)]
        if len(needs) > 12:
            dparts += dqkv.sum(0, dtype=ctx.qkv_dtype).chunk(3)
        if dy is None:
            dparts[2::3] = [None] * (len(dparts) // 3)  # no map depends on a value
        dhidden = None
        if needs_hidden:
            dhidden = (dqkv @ qkv_weight).view(residual.shape) if dz is None else _add_product(dz, dqkv, qkv_weight)
        return dhidden, None if head_mask is None else dhead_mask, *dparameters, *[None] * 3, *dparts


class _FeedForwardBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # None: nothing is kept
        hidden: torch.Tensor,
        weight1: torch.Tensor,
        bias1: torch.Tensor | None,
        weight2: torch.Tensor,
        bias2: torch.Tensor | None,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        activation: str,
        fused: bool,
        norm: tuple[Any, ...],
    ) -> torch.Tensor:
        hidden = hidden.contiguous()
        x, weight1, weight2 = in_product_dtype(
            hidden.view(-1, hidden.shape[-1]), weight1.contiguous(), weight2.contiguous()
        )
        bias1 = None if bias1 is None else bias1.contiguous()
        out, pre = products(x, weight1, bias1, weight2, activation, fused, keep=ctx is not None)
        out = out.view(hidden.shape)
        of_norm = norm_arguments(out, bias2, hidden, norm_weight, norm_bias, *norm)
        y, mean, rstd = norm_forward(*of_norm)
        if ctx is not None:
            _, bias2, _, norm_weight, _, _, dropout_p, seed, stream = of_norm
            cast = None if x.dtype == hidden.dtype else x
            ctx.save_for_backward(
                *(hidden, cast, weight1, bias1, weight2, bias2, norm_weight, pre, out, mean, rstd, seed)
            )
            ctx.activation, ctx.fused, ctx.norm = activation, fused, (dropout_p, stream)
            ctx.device_type = x.device.type
        return y

    @staticmethod
    @_backward
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs_hidden, needs_weight1, _, needs_weight2, *_ = ctx.needs_input_grad
        residual, x, weight1, bias1, weight2, bias2, norm_weight, pre, out, mean, rstd, seed = ctx.saved_tensors
        dropout_p, stream = ctx.norm
        rows = (residual if x is None else x).view(-1, residual.shape[-1])
        dout, dbias2, dz, dnorm_weight, dnorm_bias = norm_gradients(
            dy, out, bias2, residual, norm_weight, mean, rstd, dropout_p, seed, stream
        )
        dpre, dweight1, dbias1, dweight2 = products_backward(
            *(dout.view(rows.shape), rows, weight1, bias1, weight2, pre),
            *(ctx.activation, ctx.fused, needs_weight1, needs_weight2),
        )
        dhidden = _add_product(dz, dpre, weight1) if needs_hidden else None
        return dhidden, dweight1, dbias1, dweight2, dbias2, dnorm_weight, dnorm_bias, None, None, None


def attention_block(
    hidden: torch.Tensor,
    qkv_weights: tuple[torch.Tensor, ...],
    qkv_biases: tuple[torch.Tensor, ...],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    *,
    eps: float,
    heads: int,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    mask: torch.Tensor | None,
    head_mask: torch.Tensor | None,
    scale: float,
    probs_seq: int | None,
    columns: torch.Tensor | None,
    order: torch.Tensor | None,
    dropout_p: float,
    hidden_dropout_p: float,
    seed: torch.Tensor | None,
    stream: int,
    hidden_stream: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """LayerNorm(dropout(attention(hidden) @ weight^T + bias) + hidden), where `runs_as_block`.

    Args:
        hidden: (batch, seq, hidden), or packed (1, tokens, hidden).
        qkv_weights: three (hidden, hidden), neighbours as `as_one` needs them.
        qkv_biases: three (hidden,), neighbours, or none.
        weight, bias: (hidden, hidden) and (hidden,).
        norm_weight, norm_bias, eps: as in `layer_norm.add_layer_norm`.
        mask: the `bias` of `attention.attention`, which says what the others of these names are.
        hidden_dropout_p, hidden_stream: of the dropout before the norm; the others are the attention's.

    Returns:
        Like hidden, and the probabilities if asked for.

    Raises:
        ValueError, TypeError: as the ops do.
        RuntimeError: for products of different dtypes.
    """
    attend = cu_seqlens, max_seqlen, mask, scale, dropout_p, seed, stream, probs_seq, columns, order
    norm = eps, hidden_dropout_p, seed, hidden_stream
    return _run(
        _AttentionBlock,
        *(hidden, head_mask, weight, bias, norm_weight, norm_bias, heads, attend, norm, *qkv_weights, *qkv_biases),
    )


def feed_forward_block(
    hidden: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    *,
    eps: float,
    activation: str,
    fused: bool,
    hidden_dropout_p: float,
    seed: torch.Tensor | None,
    hidden_stream: int,
) -> torch.Tensor:
    """LayerNorm(dropout(f(hidden @ up_weight^T + up_bias) @ weight^T + bias) + hidden), where `runs_as_block`.

    Args:
        hidden: (..., hidden).
        up_weight, up_bias: (intermediate, hidden) and (intermediate,).
        weight, bias: (hidden, intermediate) and (hidden,).
        norm_weight, norm_bias, eps: as in `layer_norm.add_layer_norm`.
        hidden_dropout_p, seed, hidden_stream: of the dropout before the norm.
        activation: as in `bias_gelu.bias_activation`.
        fused: as in `feed_forward.feed_forward`; needs up_bias.

    Returns:
        Like hidden.

    Raises:
        ValueError, TypeError: as the ops do.
        RuntimeError: for products of different dtypes.
    """
    norm = eps, hidden_dropout_p, seed, hidden_stream
    return _run(
        _FeedForwardBlock,
        *(hidden, up_weight, up_bias, weight, bias, norm_weight, norm_bias, activation, fused, norm),
    )

"""An encoder layer, or one of its two blocks, as one step of autograd: products, and the ops around them.

What a step saves against its ops called one by one lies between them: most of autograd's Python; the launches that add
the gradient of a block's input to that of its residual; and what the backward pass makes again, which is the activation
and, in a whole layer, what the attention block hands to the feed-forward block.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F

from .attention import _backward as attend_backward
from .attention import _forward as attend_forward
from .attention import op_arguments as attend_arguments
from .backend import uses_triton
from .block_records import (
    AttentionArguments,
    AttentionParameters,
    AttentionSaved,
    FeedForwardArguments,
    FeedForwardParameters,
    FeedForwardSaved,
    NormSaved,
    read,
)
from .column_sums import PartialSums, column_sums
from .feed_forward import in_product_dtype, products, products_backward
from .launch import is_traced, second_derivative_error
from .layer_norm import _forward as norm_forward
from .layer_norm import forward_in_place as norm_forward_in_place
from .layer_norm import gradients as norm_gradients
from .layer_norm import op_arguments as norm_arguments

#: Of a block that keeps nothing, in place of what it saves.
_Nothing: TypeAlias = tuple[()]


def runs_as_block(x: torch.Tensor) -> bool:
    """Whether a block may run on x: where kernels run, and no compiler or functorch transform is to see the ops."""
    return type(x) is torch.Tensor and not is_traced() and uses_triton(x)


def _run(block: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Run a block as a step of autograd if gradients are on, else its forward alone."""
    if torch.is_grad_enabled():
        # Its own `apply` first looks whether functorch, which `is_traced` rules out, has wrapped an argument.
        return super(torch.autograd.Function, block).apply(*arguments)  # type: ignore[misc]
    return block.forward(None, *arguments)


class SecondDerivative(torch.autograd.Function):
    """Gradients that cannot be differentiated again, whatever it is that required one."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """`anchor` requires a gradient, so that the results do."""
        return tuple([None if grad is None else grad.view_as(grad) for grad in grads])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        raise second_derivative_error("layer")


def _backward_pass(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's backward pass: outside of autocast, which is the forward pass's affair, and of autograd."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled():  # with create_graph=True
            with torch.no_grad():
                found = wrapped(ctx, *grads)
            return SecondDerivative.apply(torch.ones((), requires_grad=True), *found)
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


def _norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    arguments: AttentionArguments | FeedForwardArguments,
    keep: bool,
    again: bool,
) -> tuple[torch.Tensor, NormSaved | _Nothing]:
    """A block's norm, of the result of its last product; and what it is to keep, with which its backward pass makes the
    result `again`, if asked."""
    norm = norm_arguments(
        x, arguments.bias, residual, arguments.norm_weight, arguments.norm_bias, arguments.eps,
        arguments.hidden_dropout_p, arguments.seed, arguments.hidden_stream,
    )  # fmt: skip
    if not keep:
        return norm_forward(*norm, False)[0], ()
    y, normed, rstd = norm_forward_in_place(*norm)
    return y, NormSaved(normed, rstd, norm.weight, norm.norm_bias if again else None)


def _norm_backward(
    dy: torch.Tensor,
    arguments: AttentionArguments | FeedForwardArguments,
    saved: NormSaved,
    seed: torch.Tensor | None,
    again: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PartialSums]:
    """What `layer_norm.gradients` returns, of a block's norm; `again`: its result too."""
    return norm_gradients(
        dy, saved.normed, saved.weight, saved.bias if again else None, saved.rstd,
        None if arguments.bias is None else arguments.bias.dtype, arguments.hidden_dropout_p, seed,
        arguments.hidden_stream,
    )  # fmt: skip


def _attend(
    hidden: torch.Tensor, arguments: AttentionArguments, keep: bool
) -> tuple[torch.Tensor, torch.Tensor | None, AttentionSaved | _Nothing, NormSaved | _Nothing]:
    """The attention block's result and maps, and what it is to keep."""
    hidden = hidden.contiguous()
    x, qkv_weight, weight, qkv_bias = in_product_dtype(
        hidden, arguments.qkv_weight, arguments.weight, arguments.qkv_bias
    )
    heads = arguments.heads
    head_dim = qkv_weight.shape[0] // (3 * heads)
    qkv = F.linear(x, qkv_weight, qkv_bias).view(-1, 3, heads, head_dim)
    op = attend_arguments(
        qkv, arguments.cu_seqlens, arguments.max_seqlen, arguments.mask, arguments.head_mask, arguments.scale,
        arguments.dropout_p, arguments.seed, arguments.stream, arguments.probs_seq, arguments.columns, arguments.order,
    )  # fmt: skip
    context, stats, probs = attend_forward(*op)
    saved: AttentionSaved | _Nothing = ()
    if keep:
        _, key_weight, value_weight, *_ = arguments.qkv_parameters
        copied = x.dtype != arguments.qkv_weight.dtype
        saved = AttentionSaved(
            x=x, qkv_weight=qkv_weight, weight=weight, qkv=op.qkv, context=context, stats=stats,
            cu_seqlens=op.cu_seqlens, mask=op.bias, head_mask=op.head_mask, columns=op.columns, order=op.order,
            seed=op.seed, key_weight=None if copied else key_weight,
            value_weight=None if copied else value_weight,
        )  # fmt: skip
    del qkv, op  # where nothing is kept, their memory is free before the next product's is taken
    out = F.linear(context.view(*hidden.shape[:-1], heads * head_dim), weight)
    y, norm_saved = _norm(out, hidden, arguments, keep, again=True)
    return y, None if arguments.probs_seq is None else probs, saved, norm_saved


class _VectorGradients(NamedTuple):
    """Gradients of the norm's parameters and of the bias before it, in the order in which `column_sums` tells them."""

    norm_weight: torch.Tensor | None = None
    norm_bias: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def _attend_backward(
    dout: torch.Tensor | None,
    dz: torch.Tensor | None,
    dprobs: torch.Tensor | None,
    vectors: _VectorGradients,
    arguments: AttentionArguments,
    saved: AttentionSaved,
    needs_hidden: bool,
    needs: AttentionParameters[bool],
) -> tuple[torch.Tensor | None, AttentionParameters[torch.Tensor | None]]:
    """Gradients of the hidden states and the parameters: from those of the output product, of the residual and of the
    maps, each None where nobody used it; those of the `vectors` are there already."""
    dweight = None
    if dout is None:  # the probabilities alone were used
        dcontext = torch.zeros_like(saved.context)
    else:
        dout = dout.view(-1, dout.shape[-1])  # the memory of dz where nothing was dropped: dz may change last
        dweight = dout.t() @ saved.context.flatten(1) if needs.weight else None
        dcontext = (dout @ saved.weight).view(saved.context.shape)
    dqkv, dhead_mask = attend_backward(
        dcontext, dprobs, saved.qkv, saved.context, saved.stats, saved.cu_seqlens, arguments.max_seqlen, saved.mask,
        saved.head_mask, arguments.scale, arguments.dropout_p, saved.seed, arguments.stream, saved.columns, saved.order,
    )  # fmt: skip
    dqkv, dtype = dqkv.flatten(1), arguments.qkv_weight.dtype
    dquery = dkey = dvalue = dquery_bias = dkey_bias = dvalue_bias = None
    if needs.query_weight or needs.key_weight or needs.value_weight:
        dquery, dkey, dvalue = (dqkv.t() @ saved.x.view(-1, saved.x.shape[-1])).to(dtype).chunk(3)
    if arguments.qkv_bias is not None:
        dquery_bias, dkey_bias, dvalue_bias = dqkv.sum(0, dtype=dtype).chunk(3)
    if dout is None:
        dvalue = dvalue_bias = None  # no map depends on a value
    dhidden = None
    if needs_hidden:
        qkv_weight = saved.qkv_weight
        dhidden = (dqkv @ qkv_weight).view(saved.x.shape) if dz is None else _add_product(dz, dqkv, qkv_weight)
    return dhidden, AttentionParameters(
        head_mask=None if saved.head_mask is None else dhead_mask,
        weight=dweight,
        bias=vectors.bias,
        norm_weight=vectors.norm_weight,
        norm_bias=vectors.norm_bias,
        query_weight=dquery,
        key_weight=dkey,
        value_weight=dvalue,
        query_bias=dquery_bias,
        key_bias=dkey_bias,
        value_bias=dvalue_bias,
    )


def _mark_maps(ctx: Any, probs: torch.Tensor, needs_hidden: bool, needs: AttentionParameters[bool]) -> None:
    """Say that maps have no gradient where none of what they are made of has."""
    weights = needs.query_weight, needs.key_weight, needs.value_weight
    biases = needs.query_bias, needs.key_bias, needs.value_bias
    if not any((needs_hidden, needs.head_mask, *weights, *biases)):
        ctx.mark_non_differentiable(probs)


def _feed_forward(
    hidden: torch.Tensor, arguments: FeedForwardArguments, keep: bool, again: bool
) -> tuple[torch.Tensor, FeedForwardSaved | _Nothing, NormSaved | _Nothing]:
    """The feed-forward block's result, and what it is to keep: not the hidden states if they are made `again`."""
    hidden = hidden.contiguous()
    x, up_weight, weight = in_product_dtype(
        hidden.view(-1, hidden.shape[-1]), arguments.up_weight.contiguous(), arguments.weight.contiguous()
    )
    up_bias = None if arguments.up_bias is None else arguments.up_bias.contiguous()
    out, pre = products(x, up_weight, up_bias, weight, arguments.activation, arguments.fused, keep)
    y, norm_saved = _norm(out.view(hidden.shape), hidden, arguments, keep, again=False)
    if pre is None:
        return y, (), ()
    return y, FeedForwardSaved(None if again else x, up_weight, up_bias, weight, pre, arguments.seed), norm_saved


def _feed_forward_backward(
    dy: torch.Tensor,
    arguments: FeedForwardArguments,
    saved: FeedForwardSaved,
    norm_saved: NormSaved,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, tuple[PartialSums, PartialSums]]:
    """Gradients of the hidden states, of the first product, of the second's weight, and for `column_sums` those of the
    first product's bias, and of the norm and the second product's bias."""
    dout, dz, _, norm_sums = _norm_backward(dy, arguments, norm_saved, saved.seed, again=False)
    dpre, dweight, bias_sums = products_backward(
        dout.view(-1, dout.shape[-1]), saved.weight, saved.up_bias, saved.pre, arguments.activation, arguments.fused,
        needs_weight,
    )  # fmt: skip
    dhidden = _add_product(dz, dpre, saved.up_weight) if needs_hidden else None
    return dhidden, dpre, dweight, (bias_sums, norm_sums)


class AttentionBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # None: nothing is kept
        arguments: AttentionArguments,
        hidden: torch.Tensor,
        *parameters: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        y, probs, saved, norm_saved = _attend(hidden, arguments, keep=ctx is not None)
        if ctx is not None:
            ctx.save_for_backward(*saved, *norm_saved)
            ctx.arguments, ctx.device_type = arguments, hidden.device.type
            ctx.set_materialize_grads(False)
            if probs is not None:
                _, needs_hidden, *flags = ctx.needs_input_grad
                (needs,) = read(flags, AttentionParameters)
                _mark_maps(ctx, probs, needs_hidden, needs)
        return y, probs

    @staticmethod
    @_backward_pass
    def backward(ctx: Any, dy: torch.Tensor | None, dprobs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if dy is None and dprobs is None:
            return (None,) * len(ctx.needs_input_grad)
        _, needs_hidden, *flags = ctx.needs_input_grad
        (needs,) = read(flags, AttentionParameters)
        saved, norm_saved = read(ctx.saved_tensors, AttentionSaved, NormSaved)
        dout = dz = None
        vectors = _VectorGradients()
        if dy is not None:
            dout, dz, _, sums = _norm_backward(dy, ctx.arguments, norm_saved, saved.seed, again=False)
            vectors = _VectorGradients(*column_sums(sums))
        dhidden, dparameters = _attend_backward(dout, dz, dprobs, vectors, ctx.arguments, saved, needs_hidden, needs)
        return None, dhidden, *dparameters


class FeedForwardBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # None: nothing is kept
        arguments: FeedForwardArguments,
        hidden: torch.Tensor,
        *parameters: torch.Tensor | None,
    ) -> torch.Tensor:
        y, saved, norm_saved = _feed_forward(hidden, arguments, keep=ctx is not None, again=False)
        if ctx is not None:
            ctx.save_for_backward(*saved, *norm_saved)
            ctx.arguments, ctx.device_type = arguments, hidden.device.type
        return y

    @staticmethod
    @_backward_pass
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, needs_hidden, *flags = ctx.needs_input_grad
        (needs,) = read(flags, FeedForwardParameters)
        saved, norm_saved = read(ctx.saved_tensors, FeedForwardSaved, NormSaved)
        dhidden, dpre, dweight, sums = _feed_forward_backward(
            dy, ctx.arguments, saved, norm_saved, needs_hidden, needs.weight
        )
        dup_weight = dpre.t() @ saved.x if needs.up_weight else None
        dup_bias, dnorm_weight, dnorm_bias, dbias = column_sums(*sums)
        return None, dhidden, *FeedForwardParameters(
            up_weight=dup_weight, up_bias=dup_bias, weight=dweight, bias=dbias, norm_weight=dnorm_weight,
            norm_bias=dnorm_bias,
        )  # fmt: skip


#: Gradients of the feed-forward block's parameters where nobody used its result.
_UNUSED: FeedForwardParameters[torch.Tensor | None] = FeedForwardParameters(None, None, None, None, None, None)


class Layer(torch.autograd.Function):
    """Both blocks. What the first hands to the second is not kept: the backward pass of its norm makes it again."""

    @staticmethod
    def forward(
        ctx: Any,  # None: nothing is kept
        attention: AttentionArguments,
        feed_forward: FeedForwardArguments,
        hidden: torch.Tensor,
        *parameters: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        keep = ctx is not None
        attended, probs, attention_saved, attention_norm = _attend(hidden, attention, keep)
        y, feed_forward_saved, feed_forward_norm = _feed_forward(attended, feed_forward, keep, again=True)
        if keep:
            ctx.save_for_backward(*attention_saved, *attention_norm, *feed_forward_saved, *feed_forward_norm)
            ctx.attention, ctx.feed_forward, ctx.device_type = attention, feed_forward, hidden.device.type
            ctx.set_materialize_grads(False)
            if probs is not None:
                _, _, needs_hidden, *flags = ctx.needs_input_grad
                _, needs = read(flags, FeedForwardParameters, AttentionParameters)
                _mark_maps(ctx, probs, needs_hidden, needs)
        return y, probs

    @staticmethod
    @_backward_pass
    def backward(ctx: Any, dy: torch.Tensor | None, dprobs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if dy is None and dprobs is None:
            return (None,) * len(ctx.needs_input_grad)
        _, _, needs_hidden, *flags = ctx.needs_input_grad
        feed_forward_needs, attention_needs = read(flags, FeedForwardParameters, AttentionParameters)
        attention_saved, attention_norm, feed_forward_saved, feed_forward_norm = read(
            ctx.saved_tensors, AttentionSaved, NormSaved, FeedForwardSaved, NormSaved
        )
        dout = dz = None
        dfeed_forward, vectors = _UNUSED, _VectorGradients()
        if dy is not None:
            dattended, dpre, dweight, sums = _feed_forward_backward(
                dy, ctx.feed_forward, feed_forward_saved, feed_forward_norm, True, feed_forward_needs.weight
            )
            assert dattended is not None
            dout, dz, attended, attention_sums = _norm_backward(
                dattended, ctx.attention, attention_norm, attention_saved.seed, again=feed_forward_needs.up_weight
            )
            dup_weight = dpre.t() @ attended.view(-1, attended.shape[-1]) if feed_forward_needs.up_weight else None
            dup_bias, dnorm_weight, dnorm_bias, dbias, *attention_vectors = column_sums(*sums, attention_sums)
            dfeed_forward = FeedForwardParameters(
                up_weight=dup_weight, up_bias=dup_bias, weight=dweight, bias=dbias, norm_weight=dnorm_weight,
                norm_bias=dnorm_bias,
            )  # fmt: skip
            vectors = _VectorGradients(*attention_vectors)
            del dpre, attended
        dhidden, dattention = _attend_backward(
            dout, dz, dprobs, vectors, ctx.attention, attention_saved, needs_hidden, attention_needs
        )
        return None, None, dhidden, *dfeed_forward, *dattention


def attention_block(hidden: torch.Tensor, attention: AttentionArguments) -> tuple[torch.Tensor, torch.Tensor | None]:
    """LayerNorm(dropout(attention(hidden) @ weight^T + bias) + hidden), where `runs_as_block`.

    Args:
        hidden: (batch, seq, hidden), or packed (1, tokens, hidden).
        attention: all else.

    Returns:
        Like hidden, and the probabilities if asked for.

    Raises:
        ValueError, TypeError: as the ops do.
        RuntimeError: for products of different dtypes.
    """
    return _run(AttentionBlock, attention, hidden, *attention.parameters())


def feed_forward_block(hidden: torch.Tensor, feed_forward: FeedForwardArguments) -> torch.Tensor:
    """LayerNorm(dropout(f(hidden @ up_weight^T + up_bias) @ weight^T + bias) + hidden), where `runs_as_block`.

    Args:
        hidden: (..., hidden).
        feed_forward: all else.

    Returns:
        Like hidden.

    Raises:
        ValueError, TypeError: as the ops do.
        RuntimeError: for products of different dtypes.
    """
    return _run(FeedForwardBlock, feed_forward, hidden, *feed_forward.parameters())


def layer_block(
    hidden: torch.Tensor, attention: AttentionArguments, feed_forward: FeedForwardArguments
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention_block`, then `feed_forward_block`: the hidden states and the probabilities; raises as they do."""
    return _run(Layer, attention, feed_forward, hidden, *feed_forward.parameters(), *attention.parameters())

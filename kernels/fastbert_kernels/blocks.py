"""An encoder layer, or one of its two blocks, as one step of autograd: products, and the ops around them.

Where a map that has a gradient is handed out there are two steps, with the map between them, as in `attention_map`.

What a step saves against its ops called one by one lies between them: most of autograd's Python; the launches that add
the gradient of a block's input to that of its residual; and what the backward pass makes again, which is the activation
and, in a whole layer, what the attention block hands to the feed-forward block.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from . import cpu_layer
from .attention_map import handed_out, in_graph, map_gradient, watch
from .backend import is_traced, uses_cpu_layers, uses_triton
from .block_passes import (
    after_context_backward,
    after_context_gradients,
    attend,
    attend_backward,
    feed_forward_backward,
    feed_forward_forward,
    output_product,
    projection_gradients,
    second_block,
)
from .block_records import (
    AttentionArguments,
    AttentionSaved,
    FeedForwardArguments,
    FeedForwardParameters,
    FeedForwardSaved,
    MapSaved,
    NormSaved,
    ProjectionParameters,
    read,
)
from .column_sums import column_sums
from .gradients import needed_gradients, refuse_batched, second_derivative_error
from .onednn import product_dtype


def runs_as_block(x: torch.Tensor) -> bool:
    """Whether a block may run on x: where no compiler or functorch transform is to see the ops, and kernels run, or
    oneDNN on a CPU."""
    if type(x) is not torch.Tensor or is_traced():
        return False
    return uses_triton(x) or (uses_cpu_layers(x) and product_dtype(x.dtype) is not None)


def _function(step: type[torch.autograd.Function]) -> Callable[..., Any]:
    """A step of autograd as a function; where gradients are off, its forward alone."""
    if not torch.is_grad_enabled():
        return functools.partial(step.forward, None)
    # Its own `apply` first looks whether functorch, which `is_traced` rules out, has wrapped an argument.
    return super(torch.autograd.Function, step).apply  # type: ignore[misc]


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
        refuse_batched("layer", grads)
        if torch.is_grad_enabled():  # with create_graph=True
            with torch.no_grad():
                found = wrapped(ctx, *grads)
            return SecondDerivative.apply(torch.ones((), requires_grad=True), *found)
        if not torch.is_autocast_enabled(ctx.device_type):
            return backward(ctx, *grads)
        with torch.autocast(ctx.device_type, enabled=False):
            return backward(ctx, *grads)

    return wrapped


class FeedForwardBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # None: nothing is kept
        arguments: FeedForwardArguments,
        hidden: torch.Tensor,
        *parameters: torch.Tensor | None,
    ) -> torch.Tensor:
        y, saved, norm_saved = feed_forward_forward(hidden, arguments, keep=ctx is not None, again=False)
        if ctx is not None:
            ctx.save_for_backward(*saved, *norm_saved)
            ctx.arguments, ctx.device_type = arguments, hidden.device.type
        return y

    @staticmethod
    @_backward_pass
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs_hidden, *flags = needed_gradients(ctx)[1:]
        (needs,) = read(flags, FeedForwardParameters)
        saved, norm_saved = read(ctx.saved_tensors, FeedForwardSaved, NormSaved)
        dhidden, dpre, dweight, sums = feed_forward_backward(
            dy, ctx.arguments, saved, norm_saved, needs_hidden, needs.weight
        )
        dup_weight = dpre.t() @ saved.x if needs.up_weight else None
        dup_bias, dnorm_weight, dnorm_bias, dbias = column_sums(*sums)
        return None, dhidden, *FeedForwardParameters(
            up_weight=dup_weight, up_bias=dup_bias, weight=dweight, bias=dbias, norm_weight=dnorm_weight,
            norm_bias=dnorm_bias,
        )  # fmt: skip


class Layer(torch.autograd.Function):
    """Both blocks."""

    @staticmethod
    def forward(
        ctx: Any,  # None: nothing is kept
        attention: AttentionArguments,
        feed_forward: FeedForwardArguments | None,
        hidden: torch.Tensor,
        *parameters: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The maps have no gradient here: see `_run_with_maps`."""
        keep, hidden = ctx is not None, hidden.contiguous()
        context, probs, saved = attend(hidden, attention, keep)
        attended, saved_output = output_product(context, hidden, attention, keep)
        del context  # where nothing is kept, its memory is free before the next block's is taken
        y, saved_second = second_block(attended, feed_forward, keep)
        if keep:
            ctx.save_for_backward(*saved, *saved_output, *saved_second)
            ctx.attention, ctx.feed_forward, ctx.device_type = attention, feed_forward, hidden.device.type
            if probs is not None:
                ctx.mark_non_differentiable(probs)
                ctx.set_materialize_grads(False)  # or the backward pass is given a map of zeros
        return y, probs

    @staticmethod
    @_backward_pass
    def backward(ctx: Any, dy: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        needs_hidden, *flags = needed_gradients(ctx)[2:]
        tensors, first, last = ctx.saved_tensors, len(AttentionSaved._fields), len(ProjectionParameters._fields)
        (saved,), (needs,) = read(tensors[:first], AttentionSaved), read(flags[-last:], ProjectionParameters)
        dcontext, dz, dweights, sums = after_context_backward(
            dy, ctx.attention, ctx.feed_forward, tensors[first:], flags[:-last]
        )
        context = tensors[first]
        dhidden, dprojections, bias_sums = attend_backward(
            dcontext, dz, None, context, ctx.attention, saved, needs_hidden, needs
        )
        vectors = column_sums(*sums, *bias_sums)
        after = after_context_gradients(dweights, vectors[:-3])
        return None, None, dhidden, *after, *projection_gradients(dprojections, vectors[-3:])


class AttentionBlock(Layer):
    """The first block alone."""


class AttentionMap(torch.autograd.Function):
    """A layer up to its map, and what the rest of it is made of: the context, the residual, whose gradient comes this
    way so that it is added inside a product, and the projections, whose gradient does not."""

    @staticmethod
    def forward(
        ctx: Any, arguments: AttentionArguments, hidden: torch.Tensor, *parameters: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        hidden = hidden.contiguous()
        context, probs, saved = attend(hidden, arguments, keep=True)
        ctx.save_for_backward(*saved)
        ctx.arguments, ctx.device_type = arguments, hidden.device.type
        ctx.set_materialize_grads(False)
        qkv = AttentionSaved(*saved).qkv
        ctx.mark_non_differentiable(qkv)
        return probs, context, hidden.view_as(hidden), qkv

    @staticmethod
    @_backward_pass
    def backward(
        ctx: Any, dprobs: torch.Tensor | None, dcontext: torch.Tensor | None, dz: torch.Tensor | None, _: None
    ) -> tuple[torch.Tensor | None, ...]:
        if dprobs is None:  # the context's gradient never comes alone
            return (None,) * len(ctx.needs_input_grad)
        needs_hidden, *flags = needed_gradients(ctx)[1:]
        (saved,), (needs,) = read(ctx.saved_tensors, AttentionSaved), read(flags, ProjectionParameters)
        dz = None if dz is None else dz.detach()  # with create_graph=True a view that nobody may write to
        dhidden, dprojections, bias_sums = attend_backward(
            dcontext, dz, dprobs, None, ctx.arguments, saved, needs_hidden, needs
        )
        dprojections = projection_gradients(dprojections, column_sums(*bias_sums))
        if dcontext is None:  # no map depends on a value
            dprojections = dprojections._replace(value_weight=None, value_bias=None)
        return None, dhidden, *dprojections


class AfterMap(torch.autograd.Function):
    """The rest of a layer, or of its attention block, in the graph behind the map that was handed out."""

    @staticmethod
    def forward(
        ctx: Any,
        attention: AttentionArguments,
        feed_forward: FeedForwardArguments | None,
        check: Callable[[], None],
        inner: torch.Tensor,
        context: torch.Tensor,
        residual: torch.Tensor,
        qkv: torch.Tensor,
        *parameters: torch.Tensor | None,
    ) -> torch.Tensor:
        attended, saved_output = output_product(context, residual, attention, keep=True)
        y, saved_second = second_block(attended, feed_forward, keep=True)
        ctx.save_for_backward(*MapSaved(qkv, attention.cu_seqlens, attention.columns), *saved_output, *saved_second)
        ctx.attention, ctx.feed_forward, ctx.device_type = attention, feed_forward, residual.device.type
        ctx.check, ctx.side = check, inner.shape[-1]
        return y

    @staticmethod
    @_backward_pass
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.check()
        tensors, first = ctx.saved_tensors, len(MapSaved._fields)
        (saved,) = read(tensors[:first], MapSaved)
        flags = needed_gradients(ctx)[7:]
        dcontext, dz, dweights, sums = after_context_backward(
            dy, ctx.attention, ctx.feed_forward, tensors[first:], flags
        )
        dinner = map_gradient.fn(  # no second derivative is looked for here, and counters see products
            dcontext, saved.qkv, saved.cu_seqlens, ctx.attention.max_seqlen, saved.columns, ctx.side
        )
        after = after_context_gradients(dweights, column_sums(*sums))
        return None, None, None, dinner, dcontext, dz, None, *after


def _run_with_maps(
    hidden: torch.Tensor,
    attention: AttentionArguments,
    feed_forward: FeedForwardArguments | None,
    projections: ProjectionParameters[torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer, or its attention block, in two steps of autograd with the map between them."""
    probs, context, residual, qkv = _function(AttentionMap)(attention, hidden, *projections)
    handed, inner = handed_out(probs, attention.hand_out)
    parameters = () if feed_forward is None else feed_forward.parameters()
    y = _function(AfterMap)(
        attention, feed_forward, watch(handed), inner, context, residual, qkv, *parameters,
        *attention.output_parameters(),
    )  # fmt: skip
    return y, handed


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
    return layer_block(hidden, attention, None)


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
    if not uses_triton(hidden):
        return cpu_layer.feed_forward_block(hidden, feed_forward)
    return _function(FeedForwardBlock)(feed_forward, hidden, *feed_forward.parameters())


def layer_block(
    hidden: torch.Tensor, attention: AttentionArguments, feed_forward: FeedForwardArguments | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention_block`, then `feed_forward_block` if there is one: the hidden states and the probabilities; raises as
    they do."""
    if not uses_triton(hidden):
        return cpu_layer.layer_block(hidden, attention, feed_forward)
    projections = ProjectionParameters(attention.head_mask, *attention.qkv_parameters)
    if attention.probs_seq is not None and in_graph(hidden, *projections):
        return _run_with_maps(hidden, attention, feed_forward, projections)
    block, first = (AttentionBlock, ()) if feed_forward is None else (Layer, feed_forward.parameters())
    y, probs = _function(block)(attention, feed_forward, hidden, *first, *attention.output_parameters(), *projections)
    return y, None if probs is None else handed_out(probs, attention.hand_out)[0]

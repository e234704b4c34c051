"""An encoder layer, or one of its two blocks, as one step of autograd: products, and the ops around them.

What a step saves against its ops called one by one lies between them: most of autograd's Python; the launches that add
the gradient of a block's input to that of its residual; and what the backward pass makes again, which is the activation
and, in a whole layer, what the attention block hands to the feed-forward block.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from . import cpu_layer
from .attention import _backward as attend_backward
from .attention import _forward as attend_forward
from .attention import op_arguments as attend_arguments
from .backend import is_traced, second_derivative_error, uses_cpu_layers, uses_triton
from .column_sums import PartialSums, column_sums
from .feed_forward import in_product_dtype, products, products_backward
from .layer_norm import _forward as norm_forward
from .layer_norm import forward_in_place as norm_forward_in_place
from .layer_norm import gradients as norm_gradients
from .layer_norm import op_arguments as norm_arguments
from .onednn import product_dtype


def runs_as_block(x: torch.Tensor) -> bool:
    """Whether a block may run on x: where no compiler or functorch transform is to see the ops, and kernels run, or
    oneDNN on a CPU."""
    if type(x) is not torch.Tensor or is_traced():
        return False
    return uses_triton(x) or (uses_cpu_layers(x) and product_dtype(x.dtype) is not None)


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


class AttentionArguments(NamedTuple):
    """What the attention block takes beside the hidden states.

    Attributes:
        qkv_weight, qkv_bias: (3 * hidden, hidden) and (3 * hidden,), detached.
        qkv_parameters: the three weights, and the biases if any, that these are views of.
        weight, bias: (hidden, hidden) and (hidden,), of the output product.
        norm_weight, norm_bias, eps: as in `layer_norm.add_layer_norm`.
        mask: the `bias` of `attention.attention`, which says what the others of these names are.
        hidden_dropout_p, hidden_stream: of the dropout before the norm; the others are the attention's.
    """

    qkv_weight: torch.Tensor
    qkv_bias: torch.Tensor | None
    qkv_parameters: tuple[torch.Tensor, ...]
    weight: torch.Tensor
    bias: torch.Tensor | None
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    eps: float
    heads: int
    cu_seqlens: torch.Tensor | None
    max_seqlen: int
    mask: torch.Tensor | None
    head_mask: torch.Tensor | None
    scale: float
    probs_seq: int | None
    columns: torch.Tensor | None
    order: torch.Tensor | None
    dropout_p: float
    hidden_dropout_p: float
    seed: torch.Tensor | None
    stream: int
    hidden_stream: int

    def differentiable(self) -> tuple[torch.Tensor | None, ...]:
        """What may have a gradient: the projections' parameters last, as many as there are."""
        of_output = self.head_mask, self.weight, self.bias, self.norm_weight, self.norm_bias
        return *of_output, *self.qkv_parameters


class FeedForwardArguments(NamedTuple):
    """What the feed-forward block takes beside the hidden states.

    Attributes:
        up_weight, up_bias: (intermediate, hidden) and (intermediate,).
        weight, bias: (hidden, intermediate) and (hidden,).
        norm_weight, norm_bias, eps: as in `layer_norm.add_layer_norm`.
        activation: as in `bias_gelu.bias_activation`.
        fused: as in `feed_forward.feed_forward`; needs up_bias.
        hidden_dropout_p, seed, hidden_stream: of the dropout before the norm.
    """

    up_weight: torch.Tensor
    up_bias: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor | None
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    eps: float
    activation: str
    fused: bool
    hidden_dropout_p: float
    seed: torch.Tensor | None
    hidden_stream: int

    def differentiable(self) -> tuple[torch.Tensor | None, ...]:
        """What may have a gradient."""
        return self[:6]


def _norm(
    x: torch.Tensor, residual: torch.Tensor, of: AttentionArguments | FeedForwardArguments, keep: bool, again: bool
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """A block's norm, of the result of its last product; and, to keep, the tensors of `_norm_backward`: those that it
    makes the result `again` from too, if asked."""
    arguments = norm_arguments(
        x, of.bias, residual, of.norm_weight, of.norm_bias, of.eps, of.hidden_dropout_p, of.seed, of.hidden_stream
    )
    if not keep:
        return norm_forward(*arguments, False)[0], ()
    y, normed, rstd = norm_forward_in_place(*arguments)
    return y, (normed, rstd, arguments[3], arguments[4] if again else None, of.seed)


def _norm_backward(
    dy: torch.Tensor, of: AttentionArguments | FeedForwardArguments, tensors: tuple[Any, ...], again: bool
) -> tuple[Any, ...]:
    """What `layer_norm.gradients` returns, of a block's norm; `again`: its result too."""
    normed, rstd, norm_weight, norm_bias, seed = tensors
    return norm_gradients(
        *(dy, normed, norm_weight, norm_bias if again else None, rstd),
        *(None if of.bias is None else of.bias.dtype, of.hidden_dropout_p, seed, of.hidden_stream),
    )


#: How many tensors a norm keeps: the first ones of a block's.
_OF_NORM = 5


def _attend(
    hidden: torch.Tensor, of: AttentionArguments, keep: bool
) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor | None, ...]]:
    """The attention block's result and maps; and, to keep, the tensors of its backward pass."""
    hidden = hidden.contiguous()
    x, qkv_weight, weight, qkv_bias = in_product_dtype(hidden, of.qkv_weight, of.weight, of.qkv_bias)
    head_dim = qkv_weight.shape[0] // (3 * of.heads)
    qkv = F.linear(x, qkv_weight, qkv_bias).view(-1, 3, of.heads, head_dim)
    arguments = attend_arguments(
        qkv, of.cu_seqlens, of.max_seqlen, of.mask, of.head_mask, of.scale, of.dropout_p, of.seed, of.stream,
        of.probs_seq, of.columns, of.order,
    )  # fmt: skip
    context, stats, probs = attend_forward(*arguments)
    if of.probs_seq is None:
        probs = None
    if not keep:
        del qkv, arguments
    out = F.linear(context.view(*hidden.shape[:-1], of.heads * head_dim), weight)
    y, of_norm = _norm(out, hidden, of, keep, again=True)
    if not keep:
        return y, probs, ()
    qkv, cu_seqlens, _, mask, head_mask, *_, columns, order = arguments
    tensors = (
        *of_norm,
        *(x, qkv_weight, weight, qkv, context, stats, cu_seqlens, mask, head_mask, columns, order),
        # That they do not change meanwhile: qkv_weight tells of the first one only.
        *(of.qkv_parameters[1:3] if x.dtype == of.qkv_weight.dtype else ()),
    )
    return y, probs, tensors


def _attend_backward(
    dout: torch.Tensor | None,
    dz: torch.Tensor | None,
    dprobs: torch.Tensor | None,
    of: AttentionArguments,
    tensors: tuple[Any, ...],
    needs: tuple[bool, ...],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, list[torch.Tensor | None]]:
    """From the gradients of the output product, of the residual and of the maps: those of the hidden states, the head
    mask, the output product's weight and the projections' parameters, which are as `needs` says of the block's inputs.
    """
    *_, seed = tensors[:_OF_NORM]
    x, qkv_weight, weight, qkv, context, stats, cu_seqlens, mask, head_mask, columns, order, *_ = tensors[_OF_NORM:]
    needs_hidden, _, needs_weight, *_ = needs
    dweight = None
    if dout is None:  # the probabilities alone were used
        dcontext = torch.zeros_like(context)
    else:
        dout = dout.view(-1, dout.shape[-1])  # the memory of dz where nothing was dropped: dz may change last
        dweight = dout.t() @ context.flatten(1) if needs_weight else None
        dcontext = (dout @ weight).view(context.shape)
    dqkv, dhead_mask = attend_backward(
        *(dcontext, dprobs, qkv, context, stats, cu_seqlens, of.max_seqlen, mask, head_mask),
        *(of.scale, of.dropout_p, seed, of.stream, columns, order),
    )
    dqkv, dtype = dqkv.flatten(1), of.qkv_weight.dtype
    dparts: list[torch.Tensor | None] = [None] * 3
    if any(needs[6:9]):
        dparts = [*(dqkv.t() @ x.view(-1, x.shape[-1])).to(dtype).chunk(3)]
    if of.qkv_bias is not None:
        dparts += dqkv.sum(0, dtype=dtype).chunk(3)
    if dout is None:
        dparts[2::3] = [None] * (len(dparts) // 3)  # no map depends on a value
    dhidden = None
    if needs_hidden:
        dhidden = (dqkv @ qkv_weight).view(x.shape) if dz is None else _add_product(dz, dqkv, qkv_weight)
    return dhidden, None if head_mask is None else dhead_mask, dweight, dparts


def _mark_maps(ctx: Any, probs: torch.Tensor | None, needs: tuple[bool, ...]) -> None:
    """Say that maps have no gradient where none of what they are made of has; `needs` as in `_attend_backward`."""
    if probs is not None and not any((*needs[:2], *needs[6:])):
        ctx.mark_non_differentiable(probs)


def _feed_forward(
    hidden: torch.Tensor, of: FeedForwardArguments, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """The feed-forward block's result and the rows it multiplied; and, to keep, the tensors of its backward pass."""
    hidden = hidden.contiguous()
    x, weight1, weight2 = in_product_dtype(
        hidden.view(-1, hidden.shape[-1]), of.up_weight.contiguous(), of.weight.contiguous()
    )
    bias1 = None if of.up_bias is None else of.up_bias.contiguous()
    out, pre = products(x, weight1, bias1, weight2, of.activation, of.fused, keep)
    out = out.view(hidden.shape)
    y, of_norm = _norm(out, hidden, of, keep, again=False)
    return y, x, (*of_norm, weight1, bias1, weight2, pre) if keep else ()


def _feed_forward_backward(
    dy: torch.Tensor, of: FeedForwardArguments, tensors: tuple[Any, ...], needs_hidden: bool, needs_weight: bool
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, tuple[PartialSums, PartialSums]]:
    """Gradients of the hidden states, of the first product, of the second's weight, and for `column_sums` those of the
    first product's bias, and of the norm and the second product's bias."""
    weight1, bias1, weight2, pre = tensors[_OF_NORM:]
    dout, dz, _, of_norm = _norm_backward(dy, of, tensors[:_OF_NORM], again=False)
    dpre, dweight2, of_bias = products_backward(
        dout.view(-1, dout.shape[-1]), weight2, bias1, pre, of.activation, of.fused, needs_weight
    )
    dhidden = _add_product(dz, dpre, weight1) if needs_hidden else None
    return dhidden, dpre, dweight2, (of_bias, of_norm)


class _AttentionBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # None: nothing is kept
        of: AttentionArguments,
        hidden: torch.Tensor,
        *parameters: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        y, probs, tensors = _attend(hidden, of, keep=ctx is not None)
        if ctx is not None:
            ctx.save_for_backward(*tensors)
            ctx.of, ctx.device_type = of, hidden.device.type
            ctx.set_materialize_grads(False)
            _mark_maps(ctx, probs, ctx.needs_input_grad[1:])
        return y, probs

    @staticmethod
    @_backward
    def backward(ctx: Any, dy: torch.Tensor | None, dprobs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        _, *needs = ctx.needs_input_grad
        if dy is None and dprobs is None:
            return None, *[None] * len(needs)
        tensors = ctx.saved_tensors
        dout = dz = dnorm_weight = dnorm_bias = dbias = None
        if dy is not None:
            dout, dz, _, partials = _norm_backward(dy, ctx.of, tensors[:_OF_NORM], again=False)
            dnorm_weight, dnorm_bias, dbias = column_sums(partials)
        dhidden, dhead_mask, dweight, dparts = _attend_backward(dout, dz, dprobs, ctx.of, tensors, needs)
        return None, dhidden, dhead_mask, dweight, dbias, dnorm_weight, dnorm_bias, *dparts


class _FeedForwardBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # None: nothing is kept
        of: FeedForwardArguments,
        hidden: torch.Tensor,
        *parameters: torch.Tensor | None,
    ) -> torch.Tensor:
        y, x, tensors = _feed_forward(hidden, of, keep=ctx is not None)
        if ctx is not None:
            ctx.save_for_backward(x, *tensors)
            ctx.of, ctx.device_type = of, hidden.device.type
        return y

    @staticmethod
    @_backward
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, needs_hidden, needs_up_weight, _, needs_weight, *_ = ctx.needs_input_grad
        x, *tensors = ctx.saved_tensors
        dhidden, dpre, dweight, partials = _feed_forward_backward(dy, ctx.of, tensors, needs_hidden, needs_weight)
        dup_weight = dpre.t() @ x if needs_up_weight else None
        dup_bias, dnorm_weight, dnorm_bias, dbias = column_sums(*partials)
        return None, dhidden, dup_weight, dup_bias, dweight, dbias, dnorm_weight, dnorm_bias


class _Layer(torch.autograd.Function):
    """Both blocks. What the first hands to the second is not kept: the backward pass of its norm makes it again."""

    @staticmethod
    def forward(
        ctx: Any,  # None: nothing is kept
        first: AttentionArguments,
        second: FeedForwardArguments,
        hidden: torch.Tensor,
        *parameters: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, probs, of_first = _attend(hidden, first, keep=ctx is not None)
        y, _, of_second = _feed_forward(attended, second, keep=ctx is not None)
        if ctx is not None:
            ctx.save_for_backward(*of_second, *of_first)
            ctx.first, ctx.second, ctx.split = first, second, len(of_second)
            ctx.device_type = hidden.device.type
            ctx.set_materialize_grads(False)
            _, _, needs_hidden, *needs = ctx.needs_input_grad
            _mark_maps(ctx, probs, (needs_hidden, *needs[6:]))
        return y, probs

    @staticmethod
    @_backward
    def backward(ctx: Any, dy: torch.Tensor | None, dprobs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        _, _, needs_hidden, needs_up_weight, _, needs_weight, _, _, _, *needs = ctx.needs_input_grad
        if dy is None and dprobs is None:
            return (None,) * len(ctx.needs_input_grad)
        tensors = ctx.saved_tensors
        of_second, of_first = tensors[: ctx.split], tensors[ctx.split :]
        dout = dz = dup_weight = ddown_weight = None
        vectors: list[torch.Tensor | None] = [None] * 7
        if dy is not None:
            dattended, dpre, ddown_weight, of_both = _feed_forward_backward(
                dy, ctx.second, of_second, True, needs_weight
            )
            assert dattended is not None
            dout, dz, attended, of_norm = _norm_backward(
                dattended, ctx.first, of_first[:_OF_NORM], again=needs_up_weight
            )
            dup_weight = dpre.t() @ attended.view(-1, attended.shape[-1]) if needs_up_weight else None
            vectors = column_sums(*of_both, of_norm)
            del dpre, attended
        dhidden, dhead_mask, dweight, dparts = _attend_backward(
            dout, dz, dprobs, ctx.first, of_first, (needs_hidden, *needs)
        )
        dup_bias, dnorm_weight2, dnorm_bias2, ddown_bias, dnorm_weight, dnorm_bias, dbias = vectors
        of_feed_forward = dup_weight, dup_bias, ddown_weight, ddown_bias, dnorm_weight2, dnorm_bias2
        of_attention = dhead_mask, dweight, dbias, dnorm_weight, dnorm_bias, *dparts
        return None, None, dhidden, *of_feed_forward, *of_attention


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
    if not uses_triton(hidden):
        return cpu_layer.attention_block(hidden, attention)
    return _run(_AttentionBlock, attention, hidden, *attention.differentiable())


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
    return _run(_FeedForwardBlock, feed_forward, hidden, *feed_forward.differentiable())


def layer_block(
    hidden: torch.Tensor, attention: AttentionArguments, feed_forward: FeedForwardArguments
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention_block`, then `feed_forward_block`: the hidden states and the probabilities; raises as they do."""
    if not uses_triton(hidden):
        return cpu_layer.layer_block(hidden, attention, feed_forward)
    parameters = *feed_forward.differentiable(), *attention.differentiable()
    return _run(_Layer, attention, feed_forward, hidden, *parameters)

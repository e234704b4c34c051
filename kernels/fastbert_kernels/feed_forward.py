"""The feed-forward block without its last bias: f(x @ W1^T + b1) @ W2^T, the activation inside its products.

Only x and the pre-activation are kept for the backward pass, whose product with W2 applies f', sums the bias gradient
and computes f again on the way. All other products are cuBLAS's.
"""

import contextvars
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from . import reference
from .backend import check_same_device, is_traced, uses_triton
from .bias_activation import _forward as activation_forward
from .bias_activation import backward_in_place as activation_backward
from .bias_activation import bias_activation
from .bias_activation import check as check_bias_activation
from .catalogue import Tiles
from .column_sums import PartialSums, column_sums
from .feed_forward_kernels import feed_forward_backward, feed_forward_forward
from .gradients import needed_gradients
from .language import triton
from .launch import cdiv, multiprocessors, register_op, row_multiple, wrap_triton
from .tiles import PRODUCT_PROGRAMS, feed_forward_fits, feed_forward_tiles


def _launch(kernel: Any, tiles: Tiles, count: int, features: int, like: torch.Tensor, **arguments: Any) -> None:
    """Launch a persistent kernel on the tiles of (count, features), on the device of `like`."""
    every = cdiv(count, tiles["BLOCK_M"]) * triton.cdiv(features, tiles["BLOCK_N"])
    programs = torch.sym_min(every, PRODUCT_PROGRAMS * multiprocessors(like.device))
    launch: Callable[..., Any] = wrap_triton(kernel)[(programs,)]
    arguments |= {"count": count, "features": features, **tiles}
    if not tiles["HAS_DESCRIPTORS"]:
        launch(**arguments)
        return

    def launch_with_memory() -> None:
        # Descriptors are made on the device, in memory that Triton asks for.
        triton.set_allocator(lambda size, align, stream: like.new_empty(size, dtype=torch.int8))
        launch(**arguments)

    # Not for others: their allocator stays theirs.
    contextvars.copy_context().run(launch_with_memory)


def _forward_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, torch.empty_like(y) if keep else x.new_empty(0)


@register_op("feed_forward", _forward_fake)
def _forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """f(x @ weight^T + bias) and, to keep, what it is f of: x (count, inner), weight (features, inner)."""
    (count, inner), features = x.shape, weight.shape[0]
    y = x.new_empty(count, features)
    pre = torch.empty_like(y) if keep else x.new_empty(0)
    if count > 0:
        _launch(
            feed_forward_forward,
            feed_forward_tiles("forward", x, weight),
            count,
            features,
            x,
            x_ptr=x,
            weight_ptr=weight,
            bias_ptr=bias,
            y_ptr=y,
            pre_ptr=pre if keep else y,
            inner=inner,
            ROW_MULTIPLE=row_multiple(inner, features),
            ACTIVATION=activation,
            HAS_PRE=keep,
        )
    return y, pre


def _backward_fake(
    dout: torch.Tensor, weight: torch.Tensor, pre: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = cdiv(pre.shape[0], feed_forward_tiles("backward", dout, weight)["BLOCK_M"])
    return torch.empty_like(pre), torch.empty_like(pre), pre.new_empty(rows, pre.shape[1], dtype=torch.float32)


@register_op("feed_forward_backward", _backward_fake)
def _backward(
    dout: torch.Tensor, weight: torch.Tensor, pre: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dpre = (dout @ weight) * f'(pre), f(pre), and rows of partial sums of dpre.

    dout (count, inner), weight (inner, features), pre (count, features).
    """
    (count, features), inner = pre.shape, weight.shape[0]
    dpre, y = torch.empty_like(pre), torch.empty_like(pre)
    tiles = feed_forward_tiles("backward", dout, weight)
    partials = pre.new_empty(cdiv(count, tiles["BLOCK_M"]), features, dtype=torch.float32)
    if count > 0:
        _launch(
            feed_forward_backward,
            tiles,
            count,
            features,
            pre,
            dout_ptr=dout,
            weight_ptr=weight,
            pre_ptr=pre,
            dpre_ptr=dpre,
            y_ptr=y,
            partials_ptr=partials,
            inner=inner,
            ROW_MULTIPLE=row_multiple(inner, features),
            ACTIVATION=activation,
        )
    return dpre, y, partials


_backward.forbid_double_backward("feed_forward")


def products(
    x: torch.Tensor, weight1: torch.Tensor, bias1: torch.Tensor | None, weight2: torch.Tensor, activation: str,
    fused: bool, keep: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """f(x @ weight1^T + bias1) @ weight2^T for x (count, inner), and, to keep, the pre-activation, with its bias where
    fused, else without, and then the bias as it was, if any."""
    pre: torch.Tensor | None
    then_bias: torch.Tensor | None = None
    if fused:
        assert bias1 is not None
        y, pre = _forward(x, weight1, bias1, activation, keep)
    else:
        pre = F.linear(x, weight1)
        check_bias_activation(pre, bias1, activation)
        y, then_bias = activation_forward(pre, bias1, activation, keep)
        then_bias = None if bias1 is None else then_bias
    if not keep:
        pre = None  # its memory is free before the second product's is taken
    return F.linear(y, weight2), pre, then_bias


def products_backward(
    dout: torch.Tensor, weight2: torch.Tensor, then_bias: torch.Tensor | None, pre: torch.Tensor, activation: str,
    fused: bool, needs2: bool, bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor | None, PartialSums]:  # fmt: skip
    """Gradients of the first product and, if needed, of weight2; and for `column_sums` that of bias1."""
    if fused:
        dpre, y, partials = _backward(dout, weight2, pre, activation)
    else:
        dpre, y, partials = activation_backward(dout @ weight2, pre, then_bias, activation, needs2)
    return dpre, dout.t() @ y if needs2 else None, (partials, (bias_dtype,))


class FeedForward(torch.autograd.Function):
    """The products as one step of autograd, so that f(pre) is not kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight1: torch.Tensor,
        bias1: torch.Tensor,
        weight2: torch.Tensor,
        activation: str,
        fused: bool,
    ) -> torch.Tensor:
        y, pre, then_bias = products(x, weight1, bias1, weight2, activation, fused, keep=True)
        # Aliases: of a parameter itself, autograd would give back what its `.data` is then.
        ctx.save_for_backward(x, weight1.detach(), then_bias, weight2.detach(), pre)
        ctx.activation, ctx.fused, ctx.bias_dtype = activation, fused, bias1.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight1, then_bias, weight2, pre = ctx.saved_tensors
        needs_x, needs1, _, needs2, *_ = needed_gradients(ctx)
        dpre, dweight2, partials = products_backward(
            dout.contiguous(), weight2, then_bias, pre, ctx.activation, ctx.fused, needs2, ctx.bias_dtype
        )
        (dbias1,) = column_sums(partials)
        dweight1 = dpre.t() @ x if needs1 else None
        return dpre @ weight1 if needs_x else None, dweight1, dbias1, dweight2, None, None


def feed_forward_is_fused(x: torch.Tensor, weight1: torch.Tensor, activation: str) -> bool:
    """Whether `feed_forward` on x (..., hidden) and weight1 (intermediate, hidden) runs as fused kernels."""
    # A graph holds for any number of tokens, and runs when the memory of descriptors is no longer asked for here.
    if not uses_triton(x) or torch.compiler.is_compiling():
        return False
    features, inner = weight1.shape
    dtype = _autocast_dtype(x) or x.dtype
    return feed_forward_fits(x.device, dtype, x.numel() // inner, inner, features, activation)


def _autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype in which autocast has products with x computed, None where it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def in_product_dtype(x: torch.Tensor, *others: torch.Tensor | None) -> tuple[Any, ...]:
    """The factors of products, and biases, as autocast has them."""
    dtype = _autocast_dtype(x)
    if dtype is None:
        return x, *others
    return x.to(dtype), *(None if other is None else other.to(dtype) for other in others)


def feed_forward(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    activation: str = "gelu",
    fused: bool | None = None,
) -> torch.Tensor:
    """f(x @ weight1^T + bias1) @ weight2^T, the activation computed in float32.

    Args:
        x: (..., hidden).
        weight1: (intermediate, hidden), dtype of x but for autocast.
        bias1: (intermediate,), any floating dtype.
        weight2: (hidden, intermediate), dtype of weight1.
        activation: "gelu" (the erf form), "gelu_tanh", "relu" or "silu".
        fused: whether Triton's product has the activation inside, or cuBLAS's product is followed by it; default as
            `feed_forward_is_fused` says. Plain PyTorch has one way only.

    Returns:
        Like x; under autocast in its dtype.

    Raises:
        ValueError: for an unknown activation, shapes that do not fit each other, mixed devices.
        TypeError: for a dtype that no kernel has, or x and weights of different dtypes.
    """
    reference.check_activation(activation)
    hidden, intermediate = x.shape[-1], weight1.shape[0]
    wanted = {"weight1": (intermediate, hidden), "bias1": (intermediate,), "weight2": (hidden, intermediate)}
    for (name, shape), tensor in zip(wanted.items(), (weight1, bias1, weight2), strict=True):
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape} for x of {hidden} features, got {tuple(tensor.shape)}")
    check_same_device("feed_forward", x=x, weight1=weight1, bias1=bias1, weight2=weight2)
    if not uses_triton(x):
        return reference.feed_forward(x, weight1, bias1, weight2, activation)
    if fused is None:
        fused = feed_forward_is_fused(x, weight1, activation)
    if not fused and is_traced():
        return F.linear(bias_activation(F.linear(x, weight1), bias1, activation), weight2)
    x, weight1, weight2 = in_product_dtype(x, weight1, weight2)
    if not x.dtype == weight1.dtype == weight2.dtype:
        raise TypeError(
            f"x and the weights must have one dtype, got {x.dtype}, {weight1.dtype} and {weight2.dtype}: cast one of "
            "them, or use torch.autocast"
        )
    rows = x.reshape(-1, hidden).contiguous()
    operands = rows, weight1.contiguous(), bias1.contiguous(), weight2.contiguous()
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands):
        y = FeedForward.apply(*operands, activation, fused)
    else:
        y, *_ = products(*operands, activation, fused, keep=False)
    return y.view(x.shape)

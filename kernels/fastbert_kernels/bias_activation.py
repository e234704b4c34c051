"""f(x + bias) in one pass, forward and backward, for f one of gelu (erf), gelu_tanh, relu, silu.

Only x, the pre-activation before its bias, is kept for the backward pass, which recomputes f' and sums the bias
gradient on the way; and a copy of the bias, which `.data` may have changed meanwhile, unseen.
"""

from typing import Any

import torch

from . import reference
from .backend import check_same_device, uses_triton
from .catalogue import Tiles
from .column_sums import column_sums, empty_partials
from .language import tl, triton
from .launch import cdiv, is_watched, register_op, row_multiple, wrap_triton
from .numerics import activation as apply_activation
from .numerics import activation_grad, known_multiple, load_rows, load_vector, store_rows, store_vector
from .tiles import LOAD_STAGES, column_tiles
from .tuned import tuned_tiles

#: Names of the activations that the kernels have.
ACTIVATIONS = tuple(reference.ACTIVATIONS)


@triton.jit(do_not_specialize=["count"])
def _bias_activation_forward(
    x_ptr,  # (count, features)
    bias_ptr,  # (features,); unused without HAS_BIAS
    y_ptr,  # (count, features), dtype of x
    then_bias_ptr,  # (features,) float32, a copy of the bias; unused without HAS_THEN
    count,
    features,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_MULTIPLE: tl.constexpr,  # see launch.row_multiple
    HAS_BIAS: tl.constexpr,
    HAS_THEN: tl.constexpr,
):
    """One program: one tile."""
    features = known_multiple(features, ROW_MULTIPLE)
    col_blocks = tl.cdiv(features, BLOCK_N)
    rows = (tl.program_id(0) // col_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (tl.program_id(0) % col_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    x = load_rows(x_ptr, rows, cols, count, features)
    if HAS_BIAS:
        bias = load_vector(bias_ptr, cols, features)
        x += bias
        if HAS_THEN:
            if tl.program_id(0) < col_blocks:
                store_vector(then_bias_ptr, bias, cols, features)
    store_rows(y_ptr, apply_activation(x, ACTIVATION), rows, cols, count, features)


@triton.jit(do_not_specialize=["count"])
def _bias_activation_backward(
    dy_ptr,  # (count, features)
    x_ptr,  # (count, features)
    then_bias_ptr,  # (features,) float32; unused without HAS_BIAS
    dx_ptr,  # (count, features); may be dy_ptr
    y_ptr,  # (count, features), f(x + bias); unused without HAS_Y
    partials_ptr,  # (programs, features) float32; unused without HAS_BIAS
    count,
    features,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_MULTIPLE: tl.constexpr,  # see launch.row_multiple
    HAS_BIAS: tl.constexpr,
    HAS_Y: tl.constexpr,
):
    """One program: BLOCK_N columns of every num_programs(1)-th block of BLOCK_M rows."""
    features = known_multiple(features, ROW_MULTIPLE)
    program = tl.program_id(1)
    programs = tl.num_programs(1)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        bias = load_vector(then_bias_ptr, cols, features)
    dbias = tl.zeros([BLOCK_N], dtype=tl.float32)
    for row_start in tl.range(program * BLOCK_M, count, programs * BLOCK_M, num_stages=LOAD_STAGES):
        rows = row_start + tl.arange(0, BLOCK_M)
        x = load_rows(x_ptr, rows, cols, count, features)
        if HAS_BIAS:
            x += bias
        if HAS_Y:
            store_rows(y_ptr, apply_activation(x, ACTIVATION), rows, cols, count, features)
        dx = load_rows(dy_ptr, rows, cols, count, features) * activation_grad(x, ACTIVATION)
        store_rows(dx_ptr, dx, rows, cols, count, features)
        dbias += tl.sum(dx, axis=0)
    if HAS_BIAS:
        tl.store(partials_ptr + program.to(tl.int64) * features + cols, dbias, mask=cols < features)


def _empty_copy(x: torch.Tensor, bias: torch.Tensor | None, keep: bool) -> torch.Tensor:
    """Memory for a copy of the bias, if one is to be kept."""
    return x.new_empty(0 if bias is None or not keep else bias.shape[0], dtype=torch.float32)


def _forward_fake(
    x: torch.Tensor, bias: torch.Tensor | None, activation: str, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), _empty_copy(x, bias, keep)


@register_op("bias_activation", _forward_fake)
def _forward(
    x: torch.Tensor, bias: torch.Tensor | None, activation: str, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """f(x + bias) and, to keep, a copy of the bias."""
    features = x.shape[-1]
    count = x.numel() // features if features > 0 else 0
    y, then_bias = torch.empty_like(x), _empty_copy(x, bias, keep)
    tiles = tuned_tiles("bias_activation_forward", x, features, column_tiles(features))
    grid = (cdiv(count, tiles["BLOCK_M"]) * cdiv(features, tiles["BLOCK_N"]),)
    if count > 0:
        wrap_triton(_bias_activation_forward)[grid](
            x_ptr=x,
            bias_ptr=x if bias is None else bias,
            y_ptr=y,
            then_bias_ptr=then_bias,
            count=count,
            features=features,
            ROW_MULTIPLE=row_multiple(features),
            ACTIVATION=activation,
            HAS_BIAS=bias is not None,
            HAS_THEN=keep and bias is not None,
            **tiles,
        )
    return y, then_bias


def _backward_plan(x: torch.Tensor, then_bias: torch.Tensor | None) -> tuple[int, int, Tiles, torch.Tensor]:
    """Of the backward pass: rows, features, tiles, and the memory of its partial sums."""
    features = int(x.shape[-1])  # of a graph's symbol, the number
    count = x.numel() // features if features > 0 else 0
    tiles = tuned_tiles("bias_activation_backward", x, features, column_tiles(features))
    return count, features, tiles, empty_partials(x, count, tiles["BLOCK_M"], 0 if then_bias is None else features)


def _backward_fake(
    dy: torch.Tensor, x: torch.Tensor, then_bias: torch.Tensor | None, activation: str, again: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *_, partials = _backward_plan(x, then_bias)
    return torch.empty_like(x), torch.empty_like(x) if again else x.new_empty(0), partials


def _launch_backward(
    dy: torch.Tensor, x: torch.Tensor, then_bias: torch.Tensor | None, activation: str, again: bool, *, dx: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `_backward` returns, the gradient of x in the memory of `dx`, which may be dy."""
    count, features, tiles, partials = _backward_plan(x, then_bias)
    y = torch.empty_like(x) if again else x.new_empty(0)
    wrap_triton(_bias_activation_backward)[(cdiv(features, tiles["BLOCK_N"]), partials.shape[0])](
        dy_ptr=dy,
        x_ptr=x,
        then_bias_ptr=x if then_bias is None else then_bias,
        dx_ptr=dx,
        y_ptr=y,
        partials_ptr=partials,
        count=count,
        features=features,
        ROW_MULTIPLE=row_multiple(features),
        ACTIVATION=activation,
        HAS_BIAS=then_bias is not None,
        HAS_Y=again,
        **tiles,
    )
    return dx, y, partials


@register_op("bias_activation_backward", _backward_fake)
def _backward(
    dy: torch.Tensor, x: torch.Tensor, then_bias: torch.Tensor | None, activation: str, again: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of x, dy * f'(x + bias); f(x + bias) `again`, if asked; and rows of partial sums of a bias's. The
    bias, float32, is the copy that the forward pass made."""
    return _launch_backward(dy.contiguous(), x, then_bias, activation, again, dx=torch.empty_like(x))


_backward.forbid_double_backward("bias_activation")


def backward_in_place(
    dy: torch.Tensor, x: torch.Tensor, then_bias: torch.Tensor | None, activation: str, again: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the op returns, but the gradient of x takes the memory of dy, which must be contiguous and nobody else's;
    without a gradient of its own. Nothing is taken where a dispatch mode may hold dy."""
    if is_watched():
        return _backward(dy, x, then_bias, activation, again)
    return _launch_backward(dy, x, then_bias, activation, again, dx=dy)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, bias, ctx.activation, ctx.keep = inputs
    _, then_bias = output
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, None if bias is None else then_bias)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(then_bias)


def _autograd(ctx: Any, dy: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if dy is None:
        return (None,) * 4
    if not ctx.keep:
        raise RuntimeError("bias_activation has a gradient with keep=True only")
    x, then_bias = ctx.saved_tensors
    dx, _, partials = _backward(dy, x, then_bias, ctx.activation, False)
    (dbias,) = column_sums((partials, (ctx.bias_dtype,)))
    return dx, dbias, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def bias_activation(x: torch.Tensor, bias: torch.Tensor | None, activation: str = "gelu") -> torch.Tensor:
    """f(x + bias), element by element, computed in float32.

    Args:
        x: (..., features), a linear layer's output.
        bias: (features,), the linear layer's bias where it was left to this op.
        activation: "gelu" (the erf form), "gelu_tanh", "relu" or "silu".

    Returns:
        Like x.

    Raises:
        ValueError: for an unknown activation, shapes that do not fit each other, mixed devices.
        TypeError: for a dtype that no kernel has.
    """
    check(x, bias, activation)
    if not uses_triton(x):
        return reference.bias_activation(x, bias, activation)
    bias = None if bias is None else bias.contiguous()
    return _forward(x.contiguous(), bias, activation, torch.is_grad_enabled())[0]


def check(x: torch.Tensor, bias: torch.Tensor | None, activation: str) -> None:
    """Raise ValueError for what `bias_activation` does not take."""
    reference.check_activation(activation)
    features = x.shape[-1]
    if bias is not None and bias.shape != (features,):
        raise ValueError(f"bias must have shape (features,) = ({features},), got {tuple(bias.shape)}")
    check_same_device("bias_activation", x=x, bias=bias)

"""LayerNorm(dropout(x + bias) + residual) in one pass, forward and backward.

For the backward pass the normalized sum is kept, which may take the memory of x, and the dropout mask drawn again.
Statistics are float32.
"""

from typing import Any, NamedTuple

import torch

from . import reference
from .backend import check_same_device, uses_triton
from .catalogue import Tiles
from .column_sums import PartialSums, column_sums, empty_partials
from .launch import cdiv, dropout_arguments, is_watched, register_op, row_multiple, wrap_triton
from .layer_norm_kernels import add_layer_norm_backward, add_layer_norm_forward
from .tiles import row_tiles
from .tuned import tuned_tiles

#: Features of a row that one program can hold.
MAX_FEATURES = 4096


def _forward_fake(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    stream: int,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = torch.empty_like(x if residual is None else residual)
    return y, torch.empty_like(x) if keep else x.new_empty(0), _empty_stats(x)


def _empty_stats(x: torch.Tensor) -> torch.Tensor:
    """Memory for weight and bias of the norm, and 1 / standard deviation of each row."""
    features = x.shape[-1]
    return x.new_empty(2 * features + x.numel() // features, dtype=torch.float32)


def _launch_forward(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    stream: int,
    *,
    normed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm and, given `normed` to keep it in without weight and bias, which may be x, its statistics."""
    features = x.shape[-1]
    y = torch.empty_like(x if residual is None else residual)
    count = x.numel() // features
    stats = _empty_stats(x)
    shipped = row_tiles("add_layer_norm_forward", features, x.element_size())
    tiles = tuned_tiles("add_layer_norm_forward", x, features, shipped)
    if count > 0:
        wrap_triton(add_layer_norm_forward)[(cdiv(count, tiles["BLOCK_M"]),)](
            x_ptr=x,
            bias_ptr=x if bias is None else bias,
            residual_ptr=x if residual is None else residual,
            weight_ptr=weight,
            norm_bias_ptr=norm_bias,
            y_ptr=y,
            normed_ptr=y if normed is None else normed,
            stats_ptr=stats,
            count=count,
            features=features,
            ROW_MULTIPLE=row_multiple(features),
            eps=eps,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            HAS_NORMED=normed is not None,
            **dropout_arguments(x, dropout_p, seed, stream),
            **tiles,
        )
    return y, stats


@register_op("add_layer_norm", _forward_fake)
def _forward(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    stream: int,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    normed = torch.empty_like(x) if keep else None
    y, stats = _launch_forward(x, bias, residual, weight, norm_bias, eps, dropout_p, seed, stream, normed=normed)
    return y, x.new_empty(0) if normed is None else normed, stats


def forward_in_place(x: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the op returns with keep=True, whose other arguments these are, but what is kept takes the memory of x;
    without a gradient of its own. A dispatch mode may hold x, as selective checkpointing does: there nothing is taken.
    """
    if is_watched():
        return _forward(x, *arguments, True)
    y, stats = _launch_forward(x, *arguments, normed=x)
    return y, x, stats


def _backward_plan(dy: torch.Tensor, count: int, has_bias: bool) -> tuple[Tiles, torch.Tensor]:
    """Tiles of the backward pass, and the memory of its partial sums."""
    features = int(dy.shape[-1])  # of a graph's symbol, the number
    shipped = row_tiles("add_layer_norm_backward", features, dy.element_size())
    tiles = tuned_tiles("add_layer_norm_backward", dy, features, shipped)
    return tiles, empty_partials(dy, count, tiles["BLOCK_M"], (3 if has_bias else 2) * features)


def _backward_fake(
    dy: torch.Tensor,
    normed: torch.Tensor,
    weight: torch.Tensor,
    stats: torch.Tensor,
    again: bool,
    has_bias: bool,
    dropout_p: float,
    seed: torch.Tensor | None,
    stream: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, y = (torch.empty_like(normed) if it else normed.new_empty(0) for it in (dropout_p > 0.0, again))
    _, partials = _backward_plan(dy, dy.numel() // dy.shape[-1], has_bias)
    return torch.empty_like(dy), dx, y, partials


@register_op("add_layer_norm_backward", _backward_fake)
def _backward(
    dy: torch.Tensor,
    normed: torch.Tensor,
    weight: torch.Tensor,
    stats: torch.Tensor,
    again: bool,
    has_bias: bool,
    dropout_p: float,
    seed: torch.Tensor | None,
    stream: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the sum (..., features), and of x where dropout ran; the norm's result `again`, if asked, in x's
    dtype; and rows of partial sums of dweight, dnorm_bias and, of a bias that x has, dbias.

    With g = dy * weight and n the normalized sum: dz = rstd * (g - mean(g) - n * mean(g * n)).
    """
    features = normed.shape[-1]
    count = normed.numel() // features
    dy = dy.contiguous()
    dz = torch.empty_like(dy)
    dx = torch.empty_like(normed) if dropout_p > 0.0 else normed.new_empty(0)
    y = torch.empty_like(normed) if again else normed.new_empty(0)
    tiles, partials = _backward_plan(dy, count, has_bias)
    wrap_triton(add_layer_norm_backward)[(partials.shape[0],)](
        dy_ptr=dy,
        normed_ptr=normed,
        weight_ptr=weight,
        stats_ptr=stats,
        dz_ptr=dz,
        dx_ptr=dx,
        y_ptr=y,
        partials_ptr=partials,
        count=count,
        features=features,
        ROW_MULTIPLE=row_multiple(features),
        HAS_BIAS=has_bias,
        HAS_Y=again,
        **dropout_arguments(normed, dropout_p, seed, stream),
        **tiles,
    )
    return dz, dx, y, partials


_backward.forbid_double_backward("add_layer_norm")


def gradients(
    dy: torch.Tensor,
    normed: torch.Tensor,
    weight: torch.Tensor,
    stats: torch.Tensor,
    again: bool,
    bias_dtype: torch.dtype | None,
    dropout_p: float,
    seed: torch.Tensor | None,
    stream: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PartialSums]:
    """Gradients of x and of the residual, the same tensor where nothing was dropped; the result `again`, if asked, in
    the dtype of x; and for `column_sums` those of weight, norm_bias and bias."""
    dz, dx, y, partials = _backward(dy, normed, weight, stats, again, bias_dtype is not None, dropout_p, seed, stream)
    if dropout_p == 0.0:
        dx = reference.in_dtype(dz, normed.dtype)
    return dx, dz, y, (partials, (weight.dtype, weight.dtype, bias_dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, bias, residual, weight, _, _, dropout_p, seed, stream, keep = inputs
    if not keep:
        raise RuntimeError("add_layer_norm has a gradient with keep=True only")
    _, normed, stats = output
    ctx.save_for_backward(normed, weight, stats, seed)
    ctx.constants = None if bias is None else bias.dtype, dropout_p, stream
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(normed, stats)


def _autograd(ctx: Any, dy: torch.Tensor | None, *nothing: Any) -> tuple[torch.Tensor | None, ...]:
    if dy is None:
        return (None,) * 10
    normed, weight, stats, seed = ctx.saved_tensors
    bias_dtype, dropout_p, stream = ctx.constants
    dx, dz, _, partials = gradients(dy, normed, weight, stats, False, bias_dtype, dropout_p, seed, stream)
    dweight, dnorm_bias, dbias = column_sums(partials)
    return dx, dbias, dz if ctx.has_residual else None, dweight, dnorm_bias, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def add_layer_norm(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    *,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    stream: int = 0,
) -> torch.Tensor:
    """LayerNorm(dropout(x + bias) + residual) over the last dimension.

    Args:
        x: (..., features), a linear layer's output.
        bias: (features,), the linear layer's bias where it was left to this op.
        residual: like x, what is added after the dropout.
        weight, norm_bias: (features,), the affine part of the norm.
        eps: added to the variance.
        dropout_p, seed, stream: as in `attention.attention`.

    Returns:
        Like x, in the residual's dtype (x's without one).

    Raises:
        ValueError: for shapes that do not fit each other, over 4096 features, a missing seed, mixed devices.
        TypeError: for a dtype that no kernel has.
    """
    if not uses_triton(x):
        _check(x, bias, residual, weight, norm_bias, dropout_p, seed)
        return reference.add_layer_norm(x, bias, residual, weight, norm_bias, eps, dropout_p)
    arguments = op_arguments(x, bias, residual, weight, norm_bias, eps, dropout_p, seed, stream)
    return _forward(*arguments, torch.is_grad_enabled())[0]


def _check(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    norm_bias: torch.Tensor,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> None:
    wanted = x.shape[-1:]
    if not (weight.shape == wanted == norm_bias.shape and (bias is None or bias.shape == wanted)):
        for name, vector in (("bias", bias), ("weight", weight), ("norm_bias", norm_bias)):
            if vector is not None and vector.shape != wanted:
                raise ValueError(f"{name} must have shape (features,) = {tuple(wanted)}, got {tuple(vector.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1], got {dropout_p}")
    check_same_device(
        "add_layer_norm", x=x, bias=bias, residual=residual, weight=weight, norm_bias=norm_bias, seed=seed
    )


class OpArguments(NamedTuple):
    """The arguments of the op, as `add_layer_norm` names them, but for `keep`."""

    x: torch.Tensor
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    weight: torch.Tensor
    norm_bias: torch.Tensor
    eps: float
    dropout_p: float
    seed: torch.Tensor | None
    stream: int


def op_arguments(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    stream: int,
) -> OpArguments:
    """The arguments of `add_layer_norm` as its op takes them, checked."""
    _check(x, bias, residual, weight, norm_bias, dropout_p, seed)
    if x.shape[-1] > MAX_FEATURES:
        raise ValueError(f"add_layer_norm has kernels for rows up to {MAX_FEATURES}, got {x.shape[-1]}")
    if dropout_p > 0.0 and seed is None:
        raise ValueError(f"add_layer_norm with dropout_p={dropout_p} needs a seed: an int64 scalar on {x.device}")
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    bias = None if bias is None else bias.contiguous()
    return OpArguments(x, bias, residual, weight.contiguous(), norm_bias.contiguous(), eps, dropout_p, seed, stream)

"""LayerNorm(dropout(x + bias) + residual) in one pass, forward and backward.

Nothing of the sum or of the dropout mask is stored: the backward pass reads x and the residual, which exist anyway,
and draws the same mask again. Statistics are float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from . import reference
from .backend import cdiv, check_same_device, forbid_double_backward, register_op, uses_triton, wrap_triton
from .column_sums import column_sums, partial_rows
from .numerics import cast, dropout_keep
from .tiles import BACKWARD_BYTES, FORWARD_BYTES, LOAD_STAGES, row_tiles
from .tuned import tuned_tiles

#: Features of a row that one program can hold.
MAX_FEATURES = 4096


@triton.jit
def load_rows(ptr, rows, cols, count, features):
    """A tile of a row-major matrix as float32, zero outside it: [BLOCK_M, BLOCK_N]."""
    mask = (rows[:, None] < count) & (cols[None, :] < features)
    offsets = rows[:, None].to(tl.int64) * features + cols[None, :]
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(ptr, x, rows, cols, count, features):
    mask = (rows[:, None] < count) & (cols[None, :] < features)
    offsets = rows[:, None].to(tl.int64) * features + cols[None, :]
    tl.store(ptr + offsets, cast(x, ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(ptr, cols, features):
    """A vector as float32, zero past its end: [1, BLOCK_N]."""
    return tl.load(ptr + cols, mask=cols < features, other=0.0).to(tl.float32)[None, :]


@triton.jit
def normalize(z, cols, features, eps):
    """(z - mean) * rstd by rows, mean and rstd: two passes over registers, so that a large mean costs no digits."""
    mean = tl.sum(z, axis=1) / features
    centered = tl.where(cols[None, :] < features, z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, axis=1) / features + eps)
    return centered * rstd[:, None], mean, rstd


@triton.jit
def normalize_backward(dnormed, normed, rstd, cols, features):
    """Gradient of the input of `normalize`: rstd * (g - mean(g) - normed * mean(g * normed)).

    Rows past the end have dnormed = 0 and so contribute nothing.
    """
    mean_grad = tl.sum(dnormed, axis=1) / features
    mean_grad_normed = tl.sum(dnormed * normed, axis=1) / features
    dz = (dnormed - mean_grad[:, None] - normed * mean_grad_normed[:, None]) * rstd[:, None]
    return tl.where(cols[None, :] < features, dz, 0.0)


@triton.jit
def _presum(
    x_ptr, bias_ptr, residual_ptr, seed_ptr, rows, cols, count, features, stream, keep_threshold, keep_scale,
    BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """dropout(x + bias) + residual of a tile, float32 [BLOCK_M, BLOCK_N]."""
    z = load_rows(x_ptr, rows, cols, count, features)
    if HAS_BIAS:
        z += load_vector(bias_ptr, cols, features)
    if HAS_DROPOUT:
        keep = dropout_keep(seed_ptr, stream, rows, keep_threshold, BLOCK_N)
        z = tl.where(keep, z * keep_scale, 0.0)
    if HAS_RESIDUAL:
        z += load_rows(residual_ptr, rows, cols, count, features)
    return z


@triton.jit(do_not_specialize=["stream", "keep_threshold"])
def _add_layer_norm_forward(
    x_ptr,  # (count, features)
    bias_ptr,  # (features,); unused without HAS_BIAS
    residual_ptr,  # (count, features); unused without HAS_RESIDUAL
    weight_ptr,  # (features,)
    norm_bias_ptr,  # (features,)
    seed_ptr,  # int64 scalar; unused without HAS_DROPOUT
    y_ptr,  # (count, features)
    mean_ptr,  # (count,) float32
    rstd_ptr,  # (count,) float32
    count,
    features,
    eps,
    stream,
    keep_threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    """One program: BLOCK_M whole rows."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    z = _presum(
        x_ptr, bias_ptr, residual_ptr, seed_ptr, rows, cols, count, features, stream, keep_threshold, keep_scale,
        BLOCK_N, HAS_BIAS, HAS_RESIDUAL, HAS_DROPOUT,
    )  # fmt: skip
    normed, mean, rstd = normalize(z, cols, features, eps)
    y = normed * load_vector(weight_ptr, cols, features) + load_vector(norm_bias_ptr, cols, features)
    store_rows(y_ptr, y, rows, cols, count, features)
    tl.store(mean_ptr + rows, mean, mask=rows < count)
    tl.store(rstd_ptr + rows, rstd, mask=rows < count)


@triton.jit(do_not_specialize=["stream", "keep_threshold"])
def _add_layer_norm_backward(
    dy_ptr,  # (count, features)
    x_ptr,  # (count, features)
    bias_ptr,  # (features,); unused without HAS_BIAS
    residual_ptr,  # (count, features); unused without HAS_RESIDUAL
    weight_ptr,  # (features,)
    seed_ptr,  # int64 scalar; unused without HAS_DROPOUT
    mean_ptr,  # (count,) float32
    rstd_ptr,  # (count,) float32
    dz_ptr,  # (count, features), gradient of the sum: of the residual, and of x where nothing was dropped
    dx_ptr,  # (count, features), gradient of x; unused without HAS_DROPOUT
    partials_ptr,  # (3, programs, features) float32: sums of dweight, dnorm_bias, dbias
    count,
    features,
    stream,
    keep_threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    """One program: every num_programs-th block of BLOCK_M rows, and the column sums over them."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    cols = tl.arange(0, BLOCK_N)
    weight = load_vector(weight_ptr, cols, features)
    dweight = tl.zeros([BLOCK_N], dtype=tl.float32)
    dnorm_bias = tl.zeros([BLOCK_N], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_N], dtype=tl.float32)
    for row_start in tl.range(program * BLOCK_M, count, programs * BLOCK_M, num_stages=LOAD_STAGES):
        rows = row_start + tl.arange(0, BLOCK_M)
        mean = tl.load(mean_ptr + rows, mask=rows < count, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < count, other=0.0)
        dy = load_rows(dy_ptr, rows, cols, count, features)
        z = _presum(
            x_ptr, bias_ptr, residual_ptr, seed_ptr, rows, cols, count, features, stream, keep_threshold, keep_scale,
            BLOCK_N, HAS_BIAS, HAS_RESIDUAL, HAS_DROPOUT,
        )  # fmt: skip
        normed = tl.where(cols[None, :] < features, (z - mean[:, None]) * rstd[:, None], 0.0)
        dz = normalize_backward(dy * weight, normed, rstd, cols, features)
        store_rows(dz_ptr, dz, rows, cols, count, features)
        dweight += tl.sum(dy * normed, axis=0)
        dnorm_bias += tl.sum(dy, axis=0)
        dx = dz
        if HAS_DROPOUT:
            keep = dropout_keep(seed_ptr, stream, rows, keep_threshold, BLOCK_N)
            dx = tl.where(keep, dz * keep_scale, 0.0)
            store_rows(dx_ptr, dx, rows, cols, count, features)
        if HAS_BIAS:
            dbias += tl.sum(dx, axis=0)
    partials_ptr += program.to(tl.int64) * features + cols
    tl.store(partials_ptr, dweight, mask=cols < features)
    tl.store(partials_ptr + programs.to(tl.int64) * features, dnorm_bias, mask=cols < features)
    if HAS_BIAS:
        tl.store(partials_ptr + 2 * programs.to(tl.int64) * features, dbias, mask=cols < features)


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    stats = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return torch.empty_like(x if residual is None else residual), stats, torch.empty_like(stats)


def dropout_arguments(x: torch.Tensor, dropout_p: float, seed: torch.Tensor | None, stream: int) -> dict[str, Any]:
    """The arguments by which every kernel draws its dropout. An absent seed is stood in for by x, never read."""
    return {
        "seed_ptr": x if seed is None else seed,
        "stream": stream,
        "keep_threshold": reference.dropout_threshold(dropout_p),
        "keep_scale": 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0,
        "HAS_DROPOUT": dropout_p > 0.0,
    }


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    features = x.shape[-1]
    y = torch.empty_like(x if residual is None else residual)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    count = mean.numel()
    rstd = torch.empty_like(mean)
    shipped = row_tiles(features, x.element_size(), FORWARD_BYTES)
    tiles = tuned_tiles("add_layer_norm_forward", x, features, shipped)
    if count > 0:
        wrap_triton(_add_layer_norm_forward)[(cdiv(count, tiles["BLOCK_M"]),)](
            x_ptr=x,
            bias_ptr=x if bias is None else bias,
            residual_ptr=x if residual is None else residual,
            weight_ptr=weight,
            norm_bias_ptr=norm_bias,
            y_ptr=y,
            mean_ptr=mean,
            rstd_ptr=rstd,
            count=count,
            features=features,
            eps=eps,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            **dropout_arguments(x, dropout_p, seed, stream),
            **tiles,
        )
    return y, mean, rstd


def _backward_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dropout_p: float,
    seed: torch.Tensor | None,
    stream: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sums = weight.new_empty(3 if bias is not None else 2, weight.shape[0])
    return torch.empty_like(dy), torch.empty_like(x) if dropout_p > 0.0 else x.new_empty(0), sums


@register_op("add_layer_norm_backward", _backward_fake)
def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dropout_p: float,
    seed: torch.Tensor | None,
    stream: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the sum (..., features), of x where dropout ran, and the rows dweight, dnorm_bias, dbias.

    With g = dy * weight and n the normalized sum: dz = rstd * (g - mean(g) - n * mean(g * n)).
    """
    count, features = mean.numel(), x.shape[-1]
    dy = dy.contiguous()
    dz = torch.empty_like(dy)
    dx = torch.empty_like(x) if dropout_p > 0.0 else x.new_empty(0)
    shipped = row_tiles(features, dy.element_size(), BACKWARD_BYTES)
    tiles = tuned_tiles("add_layer_norm_backward", dy, features, shipped)
    programs = partial_rows(cdiv(count, tiles["BLOCK_M"]))
    partials = x.new_empty(3 if bias is not None else 2, programs, features, dtype=torch.float32)
    wrap_triton(_add_layer_norm_backward)[(programs,)](
        dy_ptr=dy,
        x_ptr=x,
        bias_ptr=x if bias is None else bias,
        residual_ptr=x if residual is None else residual,
        weight_ptr=weight,
        mean_ptr=mean,
        rstd_ptr=rstd,
        dz_ptr=dz,
        dx_ptr=dx,
        partials_ptr=partials,
        count=count,
        features=features,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        **dropout_arguments(x, dropout_p, seed, stream),
        **tiles,
    )
    return dz, dx, column_sums(partials, weight.dtype)


forbid_double_backward(_backward, "add_layer_norm")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, bias, residual, weight, _, _, dropout_p, seed, stream = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, bias, residual, weight, mean, rstd, seed)
    ctx.dropout_p, ctx.stream = dropout_p, stream
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)


def gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dropout_p: float,
    seed: torch.Tensor | None,
    stream: int,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, bias, residual, weight and norm_bias. Where nothing was dropped, the first may be the third."""
    dz, dx, sums = _backward(dy, x, bias, residual, weight, mean, rstd, dropout_p, seed, stream)
    dweight, dnorm_bias, *dbiases = sums.unbind()
    if dropout_p == 0.0:
        dx = dz if dz.dtype == x.dtype else dz.to(x.dtype)
    dbias = None
    if bias is not None:
        dbias = dbiases[0] if bias.dtype == weight.dtype else dbiases[0].to(bias.dtype)
    return dx, dbias, dz, dweight, dnorm_bias


def _autograd(ctx: Any, dy: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    x, bias, residual, weight, mean, rstd, seed = ctx.saved_tensors
    dx, dbias, dz, *dnorm = gradients(dy, x, bias, residual, weight, mean, rstd, ctx.dropout_p, seed, ctx.stream)
    return dx, dbias, None if residual is None else dz, *dnorm, None, None, None, None


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
    return _forward(*op_arguments(x, bias, residual, weight, norm_bias, eps, dropout_p, seed, stream))[0]


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
) -> tuple[Any, ...]:
    """The arguments of `add_layer_norm` as its op takes them, checked."""
    _check(x, bias, residual, weight, norm_bias, dropout_p, seed)
    if x.shape[-1] > MAX_FEATURES:
        raise ValueError(f"add_layer_norm has kernels for rows up to {MAX_FEATURES}, got {x.shape[-1]}")
    if dropout_p > 0.0 and seed is None:
        raise ValueError(f"add_layer_norm with dropout_p={dropout_p} needs a seed: an int64 scalar on {x.device}")
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    bias = None if bias is None else bias.contiguous()
    return x, bias, residual, weight.contiguous(), norm_bias.contiguous(), eps, dropout_p, seed, stream

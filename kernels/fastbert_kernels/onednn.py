"""Products of a linear layer on a CPU, by oneDNN with bias, activation and residual inside.

torch's `F.linear` takes float32 to MKL, which on AMD processors runs at as little as half of what oneDNN gives. The op
used here is the one that torch's own compiler emits, and takes weights as they are, so that no second copy of one can
go stale. It is private to torch: its presence and its results are checked once, at the first use of each dtype, against
`F.linear`, which runs where the check fails, where torch's use of oneDNN is switched off, and where a compiler, a
transform or a mode is to see the ops. Half precision that a processor does not have is computed in float32 and rounded
once: `F.linear` takes several times as long.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F

from . import reference
from .backend import is_watched
from .gradients import needed_gradients

#: Activation -> its name and its algorithm in oneDNN; "none" is no activation.
_POINTWISE = {
    "none": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}

#: How far results may be from `F.linear`'s, relative to the largest: rounding, but not another formula.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def _call(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, residual: torch.Tensor | None
) -> torch.Tensor:
    """`linear` by oneDNN: x (rows, in), residual (rows, out)."""
    if residual is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
    name, algorithm = _POINTWISE[activation]
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, name, [], algorithm)


def _plain(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, residual: torch.Tensor | None
) -> torch.Tensor:
    """`linear` by `F.linear`."""
    y = F.linear(x, weight, bias)
    if activation != "none":
        return reference.bias_activation(y, None, activation)
    return y if residual is None else y + residual


@functools.cache
def why_not(dtype: torch.dtype) -> str | None:
    """Why products of this dtype are not oneDNN's, whatever is switched off; None where they are."""
    if dtype not in _TOLERANCE:
        return f"oneDNN is not used for {dtype}"
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    try:
        # Elsewhere oneDNN's own emulation is slower than torch's.
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "oneDNN has no bfloat16 on this processor"
        if dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
            return "oneDNN has no float16 on this processor"
        return _first_wrong(dtype)
    except (AttributeError, RuntimeError, TypeError) as error:  # the op is gone, takes other arguments or refuses these
        return f"torch's op for it fails: {str(error).splitlines()[0]}"


def _first_wrong(dtype: torch.dtype) -> str | None:
    """The first kind of product whose result differs from `F.linear`'s."""
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        # No random numbers: torch's generator is its user's.
        x, weight, bias, residual = (
            torch.arange(rows * columns).mul(step).sin().view(rows, columns).to(dtype)
            for rows, columns, step in ((24, 40, 0.7), (56, 40, 0.9), (1, 56, 1.1), (24, 56, 1.3))
        )
        kinds = [(name, None) for name in _POINTWISE] + [("none", residual)]
        for weights in (weight, weight.t().contiguous().t()):
            for activation, added in kinds:
                want = _plain(x, weights, bias[0], activation, added)
                error = (_call(x, weights, bias[0], activation, added) - want).abs().max()
                if not error <= _TOLERANCE[dtype] * want.abs().max():
                    return f"torch's op for it errs by {error.item():.1e} in {activation if added is None else 'add'}"
    return None


def product_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype in which oneDNN takes products of this dtype; None where it takes none."""
    if not torch._C._get_mkldnn_enabled():
        return None
    if why_not(dtype) is None:
        return dtype
    return torch.float32 if dtype in _TOLERANCE and why_not(torch.float32) is None else None


def describe_products(dtype: torch.dtype) -> str:
    """What the products of linear layers of this dtype are taken by on a CPU, for people."""
    if not torch._C._get_mkldnn_enabled():
        return "F.linear: torch.backends.mkldnn is switched off"
    found, reason = product_dtype(dtype), why_not(dtype)
    if found is None:
        return f"F.linear: {reason}"
    return "oneDNN" if found == dtype else f"oneDNN in float32: {reason}"


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """f(x @ weight^T + bias) + residual, without autograd, rounded once at the end where oneDNN runs.

    Args:
        x: (rows, in), of a dtype and a device that the other tensors share.
        weight: (out, in), of any strides.
        bias: (out,).
        activation: f, as in `bias_gelu.bias_activation`; or "none".
        residual: (rows, out), and then no activation.

    Returns:
        (rows, out).
    """
    dtype = product_dtype(x.dtype) if x.dtype == weight.dtype and not is_watched() else None
    if dtype is None or x.numel() == 0:  # oneDNN refuses what is empty
        return _plain(x, weight, bias, activation, residual)
    if dtype == x.dtype:
        return _call(x, weight, bias, activation, residual)
    bias, residual = (None if tensor is None else tensor.to(dtype) for tensor in (bias, residual))
    return _call(x.to(dtype), weight.to(dtype), bias, activation, residual).to(x.dtype)


class _Linear(torch.autograd.Function):
    """x @ weight^T + bias + residual. Its backward pass is made of itself, so that it may be differentiated again."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias, residual=residual)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_residual = needed_gradients(ctx)
        dx = linear(dy, weight.t()) if needs_x else None
        dweight = None
        if needs_weight:
            # oneDNN lays out transposed factors anew: worth it where torch's own product is MKL's.
            own = product_dtype(dy.dtype) == dy.dtype != torch.float32
            dweight = dy.t() @ x if own else linear(dy.t(), x.t())
        return dx, dweight, dy.sum(0) if needs_bias else None, dy if needs_residual else None


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`product`, differentiable."""
    if not torch.is_grad_enabled():
        return product(x, weight, bias, activation, residual)
    # An alias: of a parameter itself, autograd would give back what its `.data` is then.
    y = _Linear.apply(x, weight.view_as(weight), bias, residual)
    return y if activation == "none" else reference.bias_activation(y, None, activation)

"""The two-reference test: a kernel may err at most twice as far from float64 as plain PyTorch in the same dtype does.

A fixed tolerance is either too wide for the easy inputs or too narrow for the hard ones; the definition's own error in
the dtype under test moves with both.
"""

import math
from collections.abc import Callable, Mapping

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: What the bound adds to twice the definition's own error, so that an exact definition does not ask for exactness.
FLOOR = 1e-5

#: The same for float32 gradients, relative to the largest gradient.
FLOAT32_GRADIENT_FLOOR = 1e-4

Outputs = torch.Tensor | tuple[torch.Tensor | None, ...]


def _run(
    op: Callable[..., Outputs], inputs: Mapping[str, torch.Tensor], cotangents: list[torch.Tensor] | None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[torch.Tensor]]:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outputs = op(**leaves)
    given = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y is not None]
    if cotangents is None:
        cotangents = [torch.randn(y.shape, dtype=torch.float64).to(y) for y in given]
    grads = torch.autograd.grad(given, list(leaves.values()), [g.to(y) for g, y in zip(cotangents, given, strict=True)])
    results = {f"output {i}": y.detach() for i, y in enumerate(given)}
    return results, {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)}, cotangents


def two_references(
    kernel: Callable[..., Outputs],
    definition: Callable[..., Outputs],
    inputs: Mapping[str, torch.Tensor],
    *,
    summed_rows: Mapping[str, int] | None = None,
    plain: Callable[..., Outputs] | None = None,
) -> None:
    """Hold the outputs of `kernel(**inputs)` and the gradients of all inputs against `definition(**inputs)`.

    Cotangents are random, rounded to the output's dtype, and the same in all three runs.

    Args:
        kernel: the op under test.
        definition: the same in plain PyTorch, which float64 inputs put through in float64.
        inputs: float tensors by the name of their argument, in the dtypes under test; each gets a gradient.
        summed_rows: how many terms the gradient of an input sums; the floor of its bound grows with the square root.
        plain: the same written out in the dtype under test, whose error then bounds the gradients. A definition that
            computes in float32 rounds a gradient once, which no kernel that multiplies in half precision can do.
    """
    own, own_grads, cotangents = _run(definition, inputs, None)
    if plain is not None:
        _, own_grads, _ = _run(plain, inputs, cotangents)
    exact, exact_grads, _ = _run(definition, {name: x.double() for name, x in inputs.items()}, cotangents)
    got, got_grads, _ = _run(kernel, inputs, cotangents)
    assert got.keys() == own.keys()
    for name, y in got.items():
        floor = FLOOR
        if y.dtype == torch.float32 and y.numel():  # large values are a few roundings apart
            floor = max(floor, 4.0 * torch.finfo(torch.float32).eps * exact[name].abs().max().item())
        _compare(name, y, own[name], exact[name], floor)
    for name, g in got_grads.items():
        want = exact_grads[name]
        rows = (summed_rows or {}).get(name.removeprefix("gradient of "), 1)
        floor = FLOOR * math.sqrt(rows)
        if g.dtype == torch.float32 and all(x.dtype == torch.float32 for x in inputs.values()) and want.numel():
            floor = FLOAT32_GRADIENT_FLOOR * want.abs().max().item()
        _compare(name, g, own_grads[name], want, floor)


def _compare(name: str, got: torch.Tensor, own: torch.Tensor, exact: torch.Tensor, floor: float) -> None:
    assert got.dtype == own.dtype, f"{name} is {got.dtype}, the definition's {own.dtype}"
    assert got.shape == own.shape, f"{name} is {tuple(got.shape)}, the definition's {tuple(own.shape)}"
    assert exact.dtype == torch.float64, f"{name} was not computed in float64"
    if got.numel() == 0:
        return
    assert bool(torch.isfinite(got).all()), f"{name} is not finite"
    error = (got.double() - exact).abs().max().item()
    bound = 2.0 * (own.double() - exact).abs().max().item() + floor
    assert error <= bound, f"{name}: error {error:.2e} against float64, at most {bound:.2e} allowed"


def directional_derivatives(
    op: Callable[..., torch.Tensor], inputs: Mapping[str, torch.Tensor], step: float = 1e-2
) -> tuple[float, float]:
    """The derivative of a random projection of `op` along its own gradient: by backward pass, by central difference.

    The projection is summed in float64, so that float32 inputs leave three digits.
    """
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y = op(**leaves)
    cotangent = torch.randn(y.shape, dtype=torch.float64).to(y)
    grads = torch.autograd.grad(y, list(leaves.values()), cotangent)
    norm = math.sqrt(sum(g.double().square().sum().item() for g in grads))

    def projection(sign: float) -> float:
        moved = {name: x + sign * step / norm * g for (name, x), g in zip(inputs.items(), grads, strict=True)}
        return (op(**moved).double() * cotangent.double()).sum().item()

    return norm, (projection(1.0) - projection(-1.0)) / (2.0 * step)

"""bias + activation: the kernel against its definition."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from two_references import DTYPES, two_references

from fastbert_kernels import ACTIVATIONS, backend, bias_activation, reference
from fastbert_kernels.bias_activation import _backward, backward_in_place


def compare(inputs: dict[str, torch.Tensor], activation: str) -> None:
    def kernel(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        with backend("triton"):
            return bias_activation(x, bias, activation)

    def definition(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return reference.bias_activation(x, bias, activation)

    two_references(kernel, definition, inputs, summed_rows={"bias": inputs["x"][..., 0].numel()})


def random_inputs(
    rows: tuple[int, ...], features: int, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    inputs = {"x": 3.0 * torch.randn(*rows, features), "bias": torch.randn(features)}
    return {name: x.to(device, dtype) for name, x in inputs.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [1, 37, 100, 768, 1023])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_widths(device: torch.device, dtype: torch.dtype, features: int, activation: str) -> None:
    compare(random_inputs((5,), features, dtype, device), activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_bias(device: torch.device, dtype: torch.dtype, activation: str) -> None:
    compare({"x": random_inputs((20,), 100, dtype, device)["x"]}, activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 16, 17, 100])
def test_many_rows_to_a_program(device: torch.device, dtype: torch.dtype, rows: int, few_partial_sums: int) -> None:
    compare(random_inputs((rows,), 130, dtype, device), "gelu")


@pytest.mark.parametrize("rows", [(), (0,), (2, 3, 4)])
def test_any_leading_shape(device: torch.device, rows: tuple[int, ...]) -> None:
    compare(random_inputs(rows, 37, torch.float32, device), "gelu")


def test_strided_and_expanded_inputs(device: torch.device) -> None:
    compare({"x": torch.randn(37, 9, device=device).T, "bias": torch.randn(74, device=device)[::2]}, "gelu")
    compare(
        {"x": torch.randn(1, 37, device=device).expand(9, -1), "bias": torch.tensor(0.3, device=device).expand(37)},
        "silu",
    )


@pytest.mark.parametrize("low", DTYPES[1:])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mixed_dtypes_of_autocast(device: torch.device, low: torch.dtype, activation: str) -> None:
    inputs = random_inputs((9,), 100, low, device)
    inputs["bias"] = torch.randn(100, device=device)
    compare(inputs, activation)
    x, bias = (t.requires_grad_() for t in inputs.values())
    for name in ("triton", "torch"):
        with backend(name):
            y = bias_activation(x, bias, activation)
        assert y.dtype == low
        dx, dbias = torch.autograd.grad(y.sum(), (x, bias))
        assert (dx.dtype, dbias.dtype) == (low, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero(device: torch.device, dtype: torch.dtype, activation: str) -> None:
    x = torch.tensor([[-60000.0, -1000, -100, -90, -50, -20, -10, -6, -1e-6, 0, 1e-6, 6, 10, 50, 90, 1000, 60000]])
    compare({"x": x.to(device, dtype)}, activation)


def test_gelu_is_as_exact_as_with_erf(device: torch.device) -> None:
    x = torch.linspace(-12, 12, 100_001, device=device).view(1, -1)
    with backend("triton"):
        y = bias_activation(x, None)
    assert (y - torch.nn.functional.gelu(x.double())).abs().max() < 5e-7


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_infinities_and_nan(device: torch.device, activation: str) -> None:
    x = torch.tensor([[torch.inf, torch.nan, 1.0]], device=device, requires_grad=True)
    with backend("triton"):
        y = bias_activation(x, None, activation)
    assert y[0, 0] == torch.inf
    assert y[0, 1].isnan()
    assert y[0, 2].isfinite()


def test_relu_has_no_slope_at_zero(device: torch.device) -> None:
    x = torch.tensor([[-1.0, -0.0, 0.0, 1.0]], device=device, requires_grad=True)
    with backend("triton"):
        y = bias_activation(x, None, "relu")
    (dx,) = torch.autograd.grad(y, x, torch.full_like(y, 2.0))
    assert dx.tolist() == [[0.0, 0.0, 0.0, 2.0]]


def test_inputs_are_left_alone(device: torch.device) -> None:
    x, bias = (t.requires_grad_() for t in random_inputs((9,), 37, torch.float32, device).values())
    before = x.detach().clone(), bias.detach().clone()
    with backend("triton"):
        y = bias_activation(x, bias)
    dy = torch.randn_like(y)
    given = dy.clone()
    torch.autograd.grad(y, (x, bias), dy)
    for now, then in zip((x, bias, dy), (*before, given), strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_definition_has_the_right_gradients(device: torch.device, activation: str) -> None:
    x, bias = (t.requires_grad_() for t in random_inputs((3,), 7, torch.float64, device).values())
    assert torch.autograd.gradcheck(lambda x, bias: reference.bias_activation(x, bias, activation), (x, bias))


def test_definition_against_formulas_in_float64(device: torch.device) -> None:
    x, bias = random_inputs((3,), 7, torch.float64, device).values()
    z = x + bias
    cubic = (2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)
    want = {
        "gelu": z * 0.5 * torch.erfc(-z / 2**0.5),
        "gelu_tanh": 0.5 * z * (1 + cubic.tanh()),
        "relu": z.clamp(min=0),
        "silu": z / (1 + (-z).exp()),
    }
    assert want.keys() == set(ACTIVATIONS)
    for activation, y in want.items():
        torch.testing.assert_close(reference.bias_activation(x, bias, activation), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_backward_pass_makes_the_output_again(
    device: torch.device, dtype: torch.dtype, activation: str, with_bias: bool
) -> None:
    x, bias = random_inputs((5, 13), 130, dtype, device).values()
    with backend("triton"):
        y = bias_activation(x, bias if with_bias else None, activation)
        dy = torch.randn_like(y)
        dx, nothing, partials = _backward(dy, x, bias if with_bias else None, activation, False)
        same_dx, again, same_partials = _backward(dy, x, bias if with_bias else None, activation, True)
    assert nothing.numel() == 0
    assert torch.equal(again, y)
    assert torch.equal(dx, same_dx)
    assert torch.equal(partials, same_partials)


def test_the_gradient_takes_the_memory_of_the_incoming_one(device: torch.device) -> None:
    x, bias = random_inputs((100,), 130, torch.float32, device).values()
    dy = torch.randn_like(x)
    with backend("triton"), torch.no_grad():
        want, _, _ = _backward(dy, x, bias, "gelu", True)
        with FlopCounterMode(display=False):
            watched, _, _ = backward_in_place(dy, x, bias, "gelu", True)
        dx, _, _ = backward_in_place(dy, x, bias, "gelu", True)
    assert watched is not dy
    assert dx is dy
    assert torch.equal(watched, want)
    assert torch.equal(dx, want)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sweep(device: torch.device, dtype: torch.dtype, activation: str) -> None:
    compare(random_inputs((511,), 3072, dtype, device), activation)


# The op as torch sees it


@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(device: torch.device, with_bias: bool) -> None:
    x, bias = random_inputs((9,), 37, torch.float32, device).values()
    bias = bias if with_bias else None
    for again in (False, True):
        arguments = (torch.randn_like(x), x, bias, "gelu", again)
        torch.library.opcheck(torch.ops.fastbert.bias_activation_backward, arguments)
    bias = bias.requires_grad_() if with_bias else None
    torch.library.opcheck(torch.ops.fastbert.bias_activation, (x.requires_grad_(), bias, "gelu", True))


def test_second_derivative_is_refused(device: torch.device) -> None:
    x, bias = (t.requires_grad_() for t in random_inputs((3,), 37, torch.float32, device).values())
    with backend("triton"):
        y = bias_activation(x, bias)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="fastbert's bias_activation kernel has no second derivative"):
        gradient.sum().backward()


# Bad input


def test_bad_input(device: torch.device) -> None:
    x = torch.zeros(3, 37, device=device)
    with pytest.raises(ValueError, match="unknown activation 'tanh': the kernels have gelu, gelu_tanh, relu, silu"):
        bias_activation(x, None, "tanh")
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        reference.bias_activation(x, None, "tanh")
    with pytest.raises(ValueError, match=re.escape("bias must have shape (features,) = (37,), got (1, 37)")):
        bias_activation(x, x[:1])
    with pytest.raises(ValueError, match=rf"one device, got x on {device}.*bias on meta"):
        bias_activation(x, torch.zeros(37, device="meta"))
    with backend("triton"), pytest.raises(TypeError, match=r"no fastbert kernel has dtype torch\.float64"):
        bias_activation(x.double(), None)

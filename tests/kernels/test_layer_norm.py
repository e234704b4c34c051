"""bias + dropout + residual + LayerNorm: the kernel against its definition."""

import re

import pytest
import torch
import torch.nn.functional as F
from two_references import DTYPES, two_references

from fastbert_kernels import add_layer_norm, backend, layer_norm, reference

EPS = 1e-12
SEED, STREAM = -5, 3


def random_inputs(
    rows: tuple[int, ...], features: int, dtype: torch.dtype, device: torch.device, *, residual_mean: float = 0.0
) -> dict[str, torch.Tensor]:
    inputs = {
        "x": torch.randn(*rows, features),
        "bias": torch.randn(features),
        "residual": torch.randn(*rows, features) + residual_mean,
        "weight": torch.randn(features),
        "norm_bias": torch.randn(features),
    }
    return {name: x.to(device, dtype) for name, x in inputs.items()}


def compare(inputs: dict[str, torch.Tensor], dropout_p: float = 0.0) -> None:
    x = inputs["x"]
    rows = x[..., 0].numel()
    keep = None
    if dropout_p > 0.0:
        keep = reference.dropout_keep(SEED, STREAM, rows, x.shape[-1], dropout_p).view(x.shape).to(x.device)

    def kernel(
        x: torch.Tensor,
        weight: torch.Tensor,
        norm_bias: torch.Tensor,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        seed = torch.tensor(SEED, device=x.device) if dropout_p > 0.0 else None
        with backend("triton"):
            return add_layer_norm(
                x, bias, residual, weight, norm_bias, EPS, dropout_p=dropout_p, seed=seed, stream=STREAM
            )

    def definition(
        x: torch.Tensor,
        weight: torch.Tensor,
        norm_bias: torch.Tensor,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return reference.add_layer_norm(x, bias, residual, weight, norm_bias, EPS, dropout_p, keep)

    def plain(
        x: torch.Tensor,
        weight: torch.Tensor,
        norm_bias: torch.Tensor,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """In the dtype of x, in which what the gradients need is kept."""
        given = (None if t is None else t.to(x.dtype) for t in (bias, residual, weight, norm_bias))
        bias, residual, weight, norm_bias = given
        z = reference.dropout(x if bias is None else x + bias, dropout_p, keep)
        y = F.layer_norm(z if residual is None else z + residual, x.shape[-1:], weight, norm_bias, EPS)
        return y if residual is None else y.to(inputs["residual"].dtype)

    sums = dict.fromkeys(("bias", "weight", "norm_bias"), rows)
    alone = x.shape[-1] == 1  # of which torch's own gradients in float16 are NaN
    two_references(kernel, definition, inputs, summed_rows=sums, plain=None if alone else plain)


def without(inputs: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {name: x for name, x in inputs.items() if name not in names}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [1, 37, 40, 100, 768, 1023])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_widths(device: torch.device, dtype: torch.dtype, features: int, dropout_p: float) -> None:
    compare(random_inputs((9,), features, dtype, device), dropout_p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left_out", [("bias",), ("residual",), ("bias", "residual")])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_optional_inputs(device: torch.device, dtype: torch.dtype, left_out: tuple[str, ...], dropout_p: float) -> None:
    compare(without(random_inputs((9,), 100, dtype, device), *left_out), dropout_p)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_mean(device: torch.device, dtype: torch.dtype) -> None:
    inputs = random_inputs((9,), 768, dtype, device)
    inputs["x"] = (torch.randn(9, 768) * 0.5 - 20.0).to(device, dtype)
    compare(without(inputs, "bias", "residual"))
    compare(random_inputs((9,), 768, dtype, device, residual_mean=-20.0), 0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 16, 17, 100])
def test_many_rows_to_a_program(device: torch.device, dtype: torch.dtype, rows: int, few_partial_sums: int) -> None:
    compare(random_inputs((rows,), 37, dtype, device), 0.2)


def test_one_vector(device: torch.device) -> None:
    compare(random_inputs((), 37, torch.float32, device), 0.2)


def test_batch_of_sequences(device: torch.device) -> None:
    compare(random_inputs((2, 3, 4), 37, torch.float32, device), 0.2)


def test_no_rows(device: torch.device) -> None:
    compare(random_inputs((0,), 37, torch.float32, device))


def test_dropout_of_everything(device: torch.device) -> None:
    compare(random_inputs((3,), 37, torch.float32, device), 1.0)


def test_strided_and_expanded_inputs(device: torch.device) -> None:
    inputs = {
        "x": torch.randn(37, 9, device=device).T,
        "bias": torch.randn(74, device=device)[::2],
        "residual": torch.randn(1, 37, device=device).expand(9, -1),
        "weight": torch.tensor(0.7, device=device).expand(37),
        "norm_bias": torch.randn(37, 2, device=device)[:, 1],
    }
    compare(inputs, 0.2)


def test_strided_gradient_of_the_result(device: torch.device) -> None:
    inputs = random_inputs((9,), 37, torch.float32, device)
    x = inputs["x"].requires_grad_()
    with backend("triton"):
        y = add_layer_norm(x, None, None, inputs["weight"], inputs["norm_bias"], EPS)
    dy = torch.randn(37, 9, device=device).T
    strided, dense = (torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in (dy, dy.contiguous()))
    assert torch.equal(strided, dense)


@pytest.mark.parametrize("low", DTYPES[1:])
@pytest.mark.parametrize(
    "float32",
    [("weight", "norm_bias"), ("residual", "weight", "norm_bias"), ("bias", "residual", "weight", "norm_bias")],
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_mixed_dtypes_of_autocast(
    device: torch.device, low: torch.dtype, float32: tuple[str, ...], dropout_p: float
) -> None:
    inputs = random_inputs((9,), 100, low, device)
    compare(inputs | {name: torch.randn_like(inputs[name], dtype=torch.float32) for name in float32}, dropout_p)


def test_dtypes_of_results_and_gradients(device: torch.device) -> None:
    inputs = random_inputs((3,), 37, torch.float32, device)
    inputs["x"] = inputs["x"].bfloat16()
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    with backend("triton"):
        y = add_layer_norm(**leaves, eps=EPS)
        alone = add_layer_norm(leaves["x"], None, None, leaves["weight"], leaves["norm_bias"], EPS)
    assert (y.dtype, alone.dtype) == (torch.float32, torch.bfloat16)
    y.square().sum().backward()
    for name, x in leaves.items():
        assert x.grad is not None, name
        assert x.grad.dtype == x.dtype, name


def test_inputs_and_gradients_are_left_alone(device: torch.device) -> None:
    inputs = random_inputs((9,), 37, torch.float32, device)
    before = {name: x.clone() for name, x in inputs.items()}
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    with backend("triton"):
        y = add_layer_norm(**leaves, eps=EPS, dropout_p=0.2, seed=torch.tensor(SEED, device=device), stream=STREAM)
    dy = torch.randn_like(y)
    given = dy.clone()
    torch.autograd.grad(y, list(leaves.values()), dy)
    assert torch.equal(dy, given)
    for name, x in inputs.items():
        assert torch.equal(x, before[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_the_backward_pass_makes_the_result_again(device: torch.device, dtype: torch.dtype, dropout_p: float) -> None:
    inputs = random_inputs((9,), 37, dtype, device)
    x, bias, residual, weight, norm_bias = inputs.values()
    dropout = (dropout_p, torch.tensor(SEED, device=device), STREAM)
    with backend("triton"):
        y, normed, stats = layer_norm._forward(x, bias, residual, weight, norm_bias, EPS, *dropout, True)
        norm_bias.data.add_(1.0)  # which nobody sees
        dy = torch.randn_like(y)
        dx, dz, again, _ = layer_norm.gradients(dy, normed, weight, stats, True, dtype, *dropout)
        same_dx, same_dz, nothing, _ = layer_norm.gradients(dy, normed, weight, stats, False, dtype, *dropout)
    # Of the norm as it was kept, which half precision has rounded.
    ulps = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(again, y, rtol=ulps, atol=4 * ulps)
    assert nothing.numel() == 0
    assert torch.equal(dx, same_dx)
    assert torch.equal(dz, same_dz)
    assert dx.dtype == dz.dtype == again.dtype == dtype


def test_what_is_kept_takes_the_memory_of_x(device: torch.device) -> None:
    x, bias, residual, weight, norm_bias = random_inputs((100,), 37, torch.float32, device).values()
    arguments = (bias, residual, weight, norm_bias, EPS, 0.2, torch.tensor(SEED, device=device), STREAM)
    with backend("triton"), torch.no_grad():
        alone, nothing, _ = layer_norm._forward(x, *arguments, False)
        y, normed, stats = layer_norm._forward(x, *arguments, True)
        again, kept, same_stats = layer_norm.forward_in_place(x, *arguments)
    assert kept is x
    assert nothing.numel() == 0
    torch.testing.assert_close(normed * weight + norm_bias, y)
    for a, b in ((alone, y), (again, y), (x, normed), (same_stats, stats)):
        assert torch.equal(a, b)


def test_no_gradient_where_nothing_was_kept(device: torch.device) -> None:
    inputs = random_inputs((9,), 37, torch.float32, device)
    x, bias, residual, weight, norm_bias = (x.requires_grad_() for x in inputs.values())
    with backend("triton"), pytest.raises(RuntimeError, match="a gradient with keep=True only"):
        layer_norm._forward(x, bias, residual, weight, norm_bias, EPS, 0.0, None, 0, False)


def test_same_call_gives_the_same_bits(device: torch.device) -> None:
    inputs = {name: x.requires_grad_() for name, x in random_inputs((100,), 37, torch.float32, device).items()}

    def run() -> tuple[torch.Tensor, ...]:
        with backend("triton"):
            y = add_layer_norm(**inputs, eps=EPS)
        return y, *torch.autograd.grad(y.square().sum(), list(inputs.values()))

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_definition_has_the_right_gradients(device: torch.device) -> None:
    inputs = [x.requires_grad_() for x in random_inputs((3,), 7, torch.float64, device).values()]
    keep = reference.dropout_keep(SEED, STREAM, 3, 7, 0.3).to(device)

    def op(*tensors: torch.Tensor) -> torch.Tensor:
        return reference.add_layer_norm(*tensors, EPS, 0.3, keep)

    assert torch.autograd.gradcheck(op, inputs)


def test_definition_is_layer_norm_in_float64(device: torch.device) -> None:
    x, bias, residual, weight, norm_bias = random_inputs((3,), 7, torch.float64, device).values()
    z = x + bias + residual
    centered = z - z.mean(1, keepdim=True)
    want = centered / (centered.square().mean(1, keepdim=True) + 1e-3).sqrt() * weight + norm_bias
    got = reference.add_layer_norm(x, bias, residual, weight, norm_bias, 1e-3)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [384, 1024, 4096])
def test_sweep(device: torch.device, dtype: torch.dtype, features: int) -> None:
    compare(random_inputs((300,), features, dtype, device, residual_mean=5.0), 0.1)


# The op as torch sees it


@pytest.mark.parametrize("left_out", [(), ("bias", "residual")])
def test_opcheck_forward(device: torch.device, left_out: tuple[str, ...]) -> None:
    given = random_inputs((9,), 37, torch.float32, device)
    tensors = [None if name in left_out else x.requires_grad_() for name, x in given.items()]
    arguments = (0.0, None, 0) if left_out else (0.2, torch.tensor(SEED, device=device), STREAM)
    torch.library.opcheck(torch.ops.fastbert.add_layer_norm, (*tensors, EPS, *arguments, True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
def test_opcheck_backward(device: torch.device, dropout_p: float, again: bool, low: torch.dtype) -> None:
    x, bias, residual, weight, norm_bias = random_inputs((9,), 37, torch.float32, device).values()
    dropout = (dropout_p, torch.tensor(SEED, device=device), STREAM)
    given = (x.to(low), bias, residual, weight, norm_bias, EPS)
    y, normed, stats = torch.ops.fastbert.add_layer_norm(*given, *dropout, True)
    arguments = (torch.randn_like(y), normed, weight, stats, again, not again, *dropout)
    torch.library.opcheck(torch.ops.fastbert.add_layer_norm_backward, arguments)


def test_second_derivative_is_refused(device: torch.device) -> None:
    inputs = {name: x.requires_grad_() for name, x in random_inputs((3,), 37, torch.float32, device).items()}
    with backend("triton"):
        y = add_layer_norm(**inputs, eps=EPS)
    (gradient,) = torch.autograd.grad(y.square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="fastbert's add_layer_norm kernel has no second derivative"):
        gradient.sum().backward()


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(36)}, "bias must have shape (features,) = (37,), got (36,)"),
        ({"weight": torch.zeros(1)}, "weight must have shape (features,) = (37,), got (1,)"),
        ({"norm_bias": torch.zeros(1, 37)}, "norm_bias must have shape (features,) = (37,), got (1, 37)"),
        ({"residual": torch.zeros(1, 37)}, "residual must have x's shape (9, 37), got (1, 37)"),
        ({"dropout_p": 1.01}, "dropout_p must lie in [0, 1], got 1.01"),
        ({"dropout_p": -1.0}, "dropout_p must lie in [0, 1], got -1.0"),
        ({"dropout_p": 0.1}, "add_layer_norm with dropout_p=0.1 needs a seed"),
    ],
)
def test_bad_input(device: torch.device, change: dict, message: str) -> None:
    arguments = random_inputs((9,), 37, torch.float32, device) | change
    arguments = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with backend("triton"), pytest.raises(ValueError, match=re.escape(message)):
        add_layer_norm(**arguments, eps=EPS)


def test_row_too_wide(device: torch.device) -> None:
    inputs = random_inputs((1,), 4097, torch.float32, device)
    with backend("triton"), pytest.raises(ValueError, match="rows up to 4096, got 4097"):
        add_layer_norm(**inputs, eps=EPS)


def test_mixed_devices(device: torch.device) -> None:
    inputs = random_inputs((9,), 37, torch.float32, device) | {"weight": torch.ones(37, device="meta")}
    with pytest.raises(ValueError, match=rf"one device, got x on {device}.*weight on meta"):
        add_layer_norm(**inputs, eps=EPS)


def test_dtype_without_a_kernel(device: torch.device) -> None:
    with backend("triton"), pytest.raises(TypeError, match=r"no fastbert kernel has dtype torch\.float64"):
        add_layer_norm(**random_inputs((9,), 37, torch.float64, device), eps=EPS)

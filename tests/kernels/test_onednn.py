"""Products by oneDNN against the definition in float64, their gradients of both orders, and what runs without it."""

from typing import Any

import pytest
import torch
from helpers.models import onednn_enabled
from two_references import DTYPES

from fastbert_kernels import onednn, reference, runs_as_block
from fastbert_kernels.onednn import describe_products, linear, product, why_not

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "silu")


def factors(dtype: torch.dtype, rows: int = 33) -> dict[str, torch.Tensor]:
    shapes = {"x": (rows, 40), "weight": (65, 40), "bias": (65,), "residual": (rows, 65)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str = "none") -> torch.Tensor:
    y = x.double() @ weight.double().t() + bias.double()
    return y if activation == "none" else reference.bias_activation(y, None, activation)


@pytest.fixture(autouse=True)
def _checked_anew() -> None:
    why_not.cache_clear()


@pytest.fixture(params=["onednn", "switched off", "missing"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """How products are taken."""
    if request.param == "missing":
        monkeypatch.setattr(onednn, "_call", refuse)
    with onednn_enabled(request.param != "switched off"):
        yield request.param
    why_not.cache_clear()


def refuse(*arguments: Any) -> torch.Tensor:
    raise AttributeError("no such op")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_errs_no_more_than_torch(products: str, dtype: torch.dtype, activation: str) -> None:
    given = factors(dtype)
    del given["residual"]
    want = exact(**given, activation=activation)
    bound = 2 * (onednn._plain(**given, activation=activation, residual=None) - want).abs().max() + 1e-5
    assert (product(**given, activation=activation) - want).abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_adds_the_residual(products: str, dtype: torch.dtype) -> None:
    given = factors(dtype)
    residual = given.pop("residual")
    want = exact(**given) + residual.double()
    bound = 2 * (onednn._plain(**given, activation="none", residual=residual) - want).abs().max() + 1e-5
    assert (product(**given, residual=residual) - want).abs().max() <= bound


@pytest.mark.parametrize("rows", [0, 1, 300])
def test_any_number_of_rows(rows: int) -> None:
    given = factors(torch.float32, rows)
    want = exact(given["x"], given["weight"], given["bias"]) + given["residual"]
    torch.testing.assert_close(product(**given), want.float())


def test_factors_of_any_strides() -> None:
    given = factors(torch.float32)
    given["x"], given["weight"] = (given[name].t().contiguous().t() for name in ("x", "weight"))
    want = exact(given["x"], given["weight"], given["bias"]) + given["residual"]
    torch.testing.assert_close(product(**given), want.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_gradients_err_no_more_than_torch(products: str, dtype: torch.dtype, activation: str) -> None:
    given = factors(dtype)
    if activation != "none":
        del given["residual"]
    cotangent = torch.randn(33, 65)

    def gradients(function: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in given.items()}
        y = function(**{"bias": None, "residual": None, "activation": activation} | leaves)
        return torch.autograd.grad(y, list(leaves.values()), cotangent.to(y))

    exact_ones = gradients(onednn._plain, torch.float64)
    for got, own, want in zip(gradients(linear, dtype), gradients(onednn._plain, dtype), exact_ones, strict=True):
        assert got.dtype == dtype
        assert (got - want).norm() <= 2 * (own - want).norm() + 1e-5 * want.norm()


def test_gradients_of_gradients(products: str) -> None:
    given = factors(torch.float32)

    def second(function: Any) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in given.values()]
        y = function(*leaves[:3], "none", leaves[3])
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    for got, want in zip(second(linear), second(onednn._plain), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_a_weight_changed_before_the_backward_pass_is_an_error() -> None:
    given = factors(torch.float32)
    weight = given["weight"].requires_grad_()
    y = linear(given["x"].requires_grad_(), weight)
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_is_in_use_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not(torch.float32) is None
    assert describe_products(torch.float32) == "oneDNN"
    with onednn_enabled(False):
        assert describe_products(torch.float32) == "F.linear: torch.backends.mkldnn is switched off"
    half = describe_products(torch.float16)
    if why_not(torch.float16) is not None:
        assert half == "oneDNN in float32: oneDNN has no float16 on this processor"
    assert describe_products(torch.float64) == "F.linear: oneDNN is not used for torch.float64"


def test_a_missing_op_is_said_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_call", refuse)
    assert describe_products(torch.float32) == "F.linear: torch's op for it fails: no such op"
    given = factors(torch.float32)
    torch.testing.assert_close(product(**given), onednn._plain(**given, activation="none"))
    assert not runs_as_block(torch.zeros(2, 3))
    why_not.cache_clear()


@pytest.mark.parametrize("wrong", ["gelu", "add"])
def test_an_op_with_another_result_is_said_and_not_used(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    right = onednn._call

    def changed(x: Any, weight: Any, bias: Any, activation: str, residual: Any) -> torch.Tensor:
        y = right(x, weight, bias, activation, residual)
        return y + 0.01 if wrong == ("add" if residual is not None else activation) else y

    monkeypatch.setattr(onednn, "_call", changed)
    assert describe_products(torch.float32).startswith("F.linear: torch's op for it errs by ")
    assert describe_products(torch.float32).endswith(wrong)
    why_not.cache_clear()


def test_the_check_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    why_not(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)

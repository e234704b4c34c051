"""torch.func, forward-mode derivatives and second derivatives are eager's in plain PyTorch, and so are the first two
where kernels run; what these refuse works as their errors say."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import ids, mask_of, pair
from torch import nn
from torch.autograd import forward_ad as fwAD
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from fastbert_kernels import backend

SHAPES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}


def _parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _pooled(model: nn.Module, parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return functional_call(model, parameters, (), {"input_ids": x}).pooler_output


def _of_inputs(model: Any, x: torch.Tensor, e: torch.Tensor) -> Any:
    return grad(lambda e: model(inputs_embeds=e).pooler_output.square().sum())(e)


def _jacobian(model: Any, x: torch.Tensor, e: torch.Tensor) -> Any:
    return jacrev(lambda e: model(inputs_embeds=e).pooler_output)(e)


def _of_parameters(model: Any, x: torch.Tensor, e: torch.Tensor) -> Any:
    return grad(lambda p: _pooled(model, p, x).square().sum())(_parameters(model))


def _per_sample(model: Any, x: torch.Tensor, e: torch.Tensor) -> Any:
    one = grad(lambda p, row: _pooled(model, p, row[None]).square().sum())
    return vmap(one, in_dims=(None, 0))(_parameters(model), x)


def _ensemble(model: Any, x: torch.Tensor, e: torch.Tensor) -> Any:
    stacked = {name: torch.stack([value, value * 1.1]) for name, value in _parameters(model).items()}
    return vmap(lambda p: _pooled(model, p, x))(stacked)


def _tangent(model: Any, x: torch.Tensor, e: torch.Tensor) -> Any:
    parameters = _parameters(model)
    ones = {name: torch.ones_like(value) for name, value in parameters.items()}
    return jvp(lambda p: _pooled(model, p, x), (parameters,), (ones,))


def _penalty(model: Any, x: torch.Tensor, e: torch.Tensor) -> Any:
    e = e.clone().requires_grad_()
    (found,) = torch.autograd.grad(model(inputs_embeds=e).pooler_output.sum(), e, create_graph=True)
    found.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _dual(model: Any, x: torch.Tensor, e: torch.Tensor) -> Any:
    with torch.no_grad(), fwAD.dual_level():
        output = model(inputs_embeds=fwAD.make_dual(e, torch.ones_like(e))).pooler_output
        return fwAD.unpack_dual(output).tangent


def _over_inputs(model: Any, x: torch.Tensor, e: torch.Tensor) -> Any:
    return vmap(lambda e: model(inputs_embeds=e[None]).pooler_output)(e)


def _batched(model: Any, x: torch.Tensor, e: torch.Tensor) -> Any:
    output = model(inputs_embeds=e.requires_grad_()).pooler_output
    rows = torch.eye(output.numel())[:2].view(2, *output.shape)
    return torch.autograd.grad(output, e, rows, is_grads_batched=True)


def _tensors(found: Any) -> list[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        return [found]
    return [each for value in (found.values() if isinstance(found, dict) else found) for each in _tensors(value)]


TRANSFORMS = [_of_inputs, _jacobian, _of_parameters, _per_sample, _ensemble, _tangent, _dual, _over_inputs]
REFUSED = {_penalty: "has no second derivative", _batched: "takes one gradient at a time"}


def _compare(of: Callable[..., Any], backend_name: str, packing: bool | str = "auto") -> None:
    torch.manual_seed(0)
    plain, fused = pair(packing=packing, **SHAPES)
    x, e = ids(2, 3), torch.randn(2, 3, 16)
    with backend(backend_name):
        ours = _tensors(of(fused, x, e))
    theirs = _tensors(of(plain, x, e))
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-5


@pytest.mark.parametrize("backend_name", ["auto", "triton"])
@pytest.mark.parametrize("of", TRANSFORMS, ids=lambda of: of.__name__)
def test_transforms_are_eagers(of: Callable[..., Any], backend_name: str) -> None:
    _compare(of, backend_name)


@pytest.mark.parametrize("of", REFUSED, ids=lambda of: of.__name__)
def test_what_kernels_refuse_works_as_the_error_says(of: Callable[..., Any]) -> None:
    _compare(of, "auto")
    with pytest.raises(NotImplementedError, match=REFUSED[of]) as refused:
        _compare(of, "triton")
    assert "FASTBERT_BACKEND=torch or fastbert_kernels.set_backend('torch')" in str(refused.value)
    _compare(of, "torch")


def test_traced_functions_are_eagers() -> None:
    plain, fused = pair(packing="auto", **SHAPES)
    x, mask = ids(2, 3), torch.tensor([[1, 1, 1], [1, 0, 0]])
    traced = make_fx(lambda x, mask: fused(x, mask).pooler_output)(x, torch.ones_like(mask))
    torch.testing.assert_close(traced(x, mask), plain(x, mask).pooler_output)


def _flops(model: nn.Module, **arguments: Any) -> tuple[int, int]:
    """Of a forward pass, and of the backward pass after it."""
    with FlopCounterMode(display=False) as counter:
        output = model(**arguments)
        forward = counter.get_total_flops()
        output.last_hidden_state.square().sum().backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("backend_name", ["torch", "auto", "triton"])
@pytest.mark.parametrize("maps", [False, True])
def test_flops_are_counted_as_computed(backend_name: str, maps: bool) -> None:
    plain, fused = pair(packing="auto", **SHAPES)
    x = ids(3, 4)
    asked = {"output_attentions": maps}
    forward, backward = _flops(plain, input_ids=x, **asked)
    pairs = 3 * 4 * 4
    if backend_name == "triton":  # its kernels make scores again, twice, and dP once more
        backward += 3 * 2 * pairs * SHAPES["hidden_size"]
        if maps:
            backward += 2 * pairs * SHAPES["hidden_size"]  # dO V^T, for the map's gradient
    with backend(backend_name):
        assert _flops(fused, input_ids=x, **asked) == (forward, backward)
        shorter = {"attention_mask": mask_of([4, 1, 1], 4), "packing": True}
        assert _flops(fused, input_ids=x, **shorter)[0] < 0.6 * forward

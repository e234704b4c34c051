"""Query, key and value as one product over three parameters."""

import copy

import pytest
import torch
from torch import nn

from fastbert.projection import adjacent, project_qkv, rehome, separate, stack_parameters


def three(device: torch.device | str = "cpu", bias: bool = True) -> list[nn.Linear]:
    return [nn.Linear(6, 5, bias=bias, device=device) for _ in range(3)]


@pytest.mark.parametrize("bias", [True, False])
def test_one_product_equals_three_forward_and_backward(bias: bool) -> None:
    linears, x = three(bias=bias), torch.randn(4, 6)
    wanted = torch.cat([linear(x) for linear in linears], -1)
    cotangent = torch.randn_like(wanted)
    parameters = [p for linear in linears for p in linear.parameters()]
    wanted_grads = torch.autograd.grad(wanted, parameters, cotangent)
    got = project_qkv(*linears, x)
    torch.testing.assert_close(got, wanted)
    for a, b in zip(torch.autograd.grad(got, parameters, cotangent), wanted_grads, strict=True):
        torch.testing.assert_close(a, b)


def test_parameters_become_neighbours_and_keep_their_identity_and_values() -> None:
    linears = three()
    weights = tuple(linear.weight for linear in linears)
    before = [w.detach().clone() for w in weights]
    stacked = stack_parameters(weights)
    assert stacked is not None
    assert adjacent(weights)
    assert stacked.data_ptr() == weights[0].data_ptr()
    assert all(linear.weight is w for linear, w in zip(linears, weights, strict=True))
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    with torch.no_grad():
        weights[1].fill_(7.0)  # as an optimizer would, in place
    assert (stacked[5:10] == 7.0).all()


def test_gradients_are_slices_of_one_product_without_copies() -> None:
    linears = three()
    project_qkv(*linears, torch.randn(4, 6)).sum().backward()
    grads = [linear.weight.grad for linear in linears]
    assert adjacent(tuple(grads))


def test_moved_parameters_find_together_again(device: torch.device) -> None:
    linears = three(device)
    weights = tuple(linear.weight for linear in linears)
    assert rehome(weights)
    for linear in linears:
        linear.double()
    assert not adjacent(weights)
    project_qkv(*linears, torch.randn(2, 6, dtype=torch.float64, device=device))
    assert adjacent(weights)
    separate(weights)
    assert not adjacent(weights)
    assert all(w.untyped_storage().nbytes() == w.numel() * 8 for w in weights)


def test_views_of_a_larger_buffer_stay_where_they_are() -> None:
    linears = three()
    flat = torch.randn(200)
    for i, linear in enumerate(linears):
        linear.weight.data = flat[40 * i : 40 * i + 30].view(5, 6)
    x = torch.randn(2, 6)
    got = project_qkv(*linears, x)
    torch.testing.assert_close(got, torch.cat([linear(x) for linear in linears], -1))
    assert all(linear.weight.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for linear in linears)


def test_parameters_that_an_engine_fills_stay_where_it_fills_them() -> None:
    """FSDP2 gathers into buffers of its own, of which the parameters are views of the same size."""
    linears = three()
    buffers = [torch.randn(30) for _ in linears]
    for linear, buffer in zip(linears, buffers, strict=True):
        linear.weight = nn.Parameter(torch.as_strided(buffer, (5, 6), (6, 1)))
    x = torch.randn(2, 6)
    project_qkv(*linears, x)
    for buffer in buffers:
        buffer.normal_()  # the next step's parameters
    wanted = torch.cat(
        [x @ buffer.view(5, 6).T + linear.bias for linear, buffer in zip(linears, buffers, strict=True)], 1
    )
    torch.testing.assert_close(project_qkv(*linears, x), wanted)


def test_frozen_parameters_get_no_gradient() -> None:
    linears = three()
    linears[1].requires_grad_(False)
    project_qkv(*linears, torch.randn(2, 6)).sum().backward()
    assert linears[0].weight.grad is not None
    assert linears[1].weight.grad is None


def test_anything_but_a_plain_linear_is_called() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    linears: list[nn.Module] = [*three()]
    linears[1] = Doubled(6, 5)
    x = torch.randn(2, 6)
    torch.testing.assert_close(project_qkv(*linears, x), torch.cat([linear(x) for linear in linears], -1))
    hooked = three()
    hooked[0].register_forward_hook(lambda module, args, output: output + 1)
    torch.testing.assert_close(project_qkv(*hooked, x), torch.cat([linear(x) for linear in hooked], -1))


def test_a_parameter_whose_neighbour_was_replaced_finds_a_new_one() -> None:
    linears = three()
    assert rehome(tuple(linear.weight for linear in linears))
    linears[1].weight = nn.Parameter(torch.randn(5, 6))
    weights = tuple(linear.weight for linear in linears)
    assert not adjacent(weights)
    assert rehome(weights)
    assert adjacent(weights)


def test_copies_do_not_share() -> None:
    linears = nn.ModuleList(three())
    rehome(tuple(linear.weight for linear in linears))
    twin = copy.deepcopy(linears)
    with torch.no_grad():
        twin[0].weight.zero_()
    assert (linears[0].weight != 0).any()
    weights = tuple(linear.weight for linear in twin)
    assert rehome(weights)
    assert adjacent(weights)


def test_parameters_that_moved_in_inference_mode_can_be_trained() -> None:
    linears = three()
    with torch.inference_mode():
        project_qkv(*linears, torch.randn(2, 6))
    assert adjacent(tuple(linear.weight for linear in linears))
    project_qkv(*linears, torch.randn(2, 6)).sum().backward()
    assert linears[2].weight.grad is not None

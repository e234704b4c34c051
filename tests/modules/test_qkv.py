"""Query, key and value as one product over three parameters."""

import copy
from pathlib import Path

import accelerate
import pytest
import safetensors.torch
import torch
from models import ids, tiny_config
from torch import nn

import fastbert
from fastbert.modules.qkv import adjacent, project_qkv, qkv_parameters, rehome, separate, stack_parameters

NAMES = ("query", "key", "value")


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
    stacks = stack_parameters([weights])
    assert stacks is not None
    (stacked,) = stacks
    assert adjacent(weights)
    assert stacked.data_ptr() == weights[0].data_ptr()
    assert all(linear.weight is w for linear, w in zip(linears, weights, strict=True))
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    with torch.no_grad():
        weights[1].fill_(7.0)  # as an optimizer would, in place
    assert (stacked[5:10] == 7.0).all()


def test_frozen_weights_beside_trained_biases_get_no_gradient() -> None:
    linears = three()
    for linear in linears:
        linear.weight.requires_grad_(False)
    stacks = stack_parameters(qkv_parameters(*linears))
    assert stacks is not None
    assert [whole.requires_grad for whole in stacks] == [False, True]
    project_qkv(*linears, torch.randn(4, 6)).sum().backward()
    assert all(linear.bias.grad is not None and linear.weight.grad is None for linear in linears)


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


def test_every_tensor_of_a_state_dict_has_a_storage_of_its_own_and_the_parameters_memory() -> None:
    model = fastbert.BertModel(tiny_config())
    model(ids())
    parameters, state = dict(model.named_parameters()), model.state_dict()
    assert adjacent(tuple(parameters[f"encoder.layer.0.attention.self.{name}.weight"] for name in NAMES))
    assert len({value.untyped_storage().data_ptr() for value in state.values()}) == len(state)
    assert all(v.untyped_storage().nbytes() == v.numel() * v.element_size() for v in state.values())
    assert all(state[name].data_ptr() == p.data_ptr() for name, p in parameters.items())
    assert all(value is parameters[name] for name, value in model.state_dict(keep_vars=True).items())
    state["encoder.layer.1.attention.self.value.weight"].fill_(3.0)  # as moving averages of weights do
    assert (model.encoder.layer[1].attention.self.value.weight == 3.0).all()


def test_savers_that_keep_one_tensor_a_storage_lose_none(tmp_path: Path) -> None:
    model = fastbert.BertModel(tiny_config())
    model(ids())
    safetensors.torch.save_model(model, tmp_path / "whole.safetensors")
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.save_model(accelerator.prepare(model), tmp_path)
    accelerator.save_state(tmp_path / "state")
    for file in ("whole.safetensors", "model.safetensors", "state/model.safetensors"):
        saved = safetensors.torch.load_file(tmp_path / file)
        assert saved.keys() == model.state_dict().keys()
        assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    wanted = model.encoder.layer[0].attention.self.key.weight.detach().clone()
    with torch.no_grad():
        model.encoder.layer[0].attention.self.key.weight.zero_()
    accelerator.load_state(tmp_path / "state")
    assert torch.equal(model.encoder.layer[0].attention.self.key.weight, wanted)


def test_a_parameter_whose_neighbours_were_replaced_finds_them_again() -> None:
    linears = three()
    weights = tuple(linear.weight for linear in linears)
    assert rehome(weights)
    for i in (0, 2):  # as merging an adapter does
        weights[i].data = weights[i].data + 1.0
    assert not adjacent(weights)
    x = torch.randn(2, 6)
    wanted = torch.cat([linear(x) for linear in linears], -1)
    torch.testing.assert_close(project_qkv(*linears, x), wanted)
    assert adjacent(weights)

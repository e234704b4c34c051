"""Parameters changed by `.data` between forward and backward, as adversarial training does: the gradients are eager's.

Nothing tells of such a change. Eager attention reads weights of products and of norms as they are then, of products
those in the memory of the forward pass; all else is as it was.
"""

from collections.abc import Callable

import pytest
import torch
from models import ids, pair
from torch import nn

from fastbert_kernels import backend


def _add(p: nn.Parameter, by: torch.Tensor) -> None:
    p.data.add_(by)


def _replace(p: nn.Parameter, by: torch.Tensor) -> None:
    p.data = p.data + by


@pytest.mark.parametrize("backend_name", ["torch", "auto", "triton"])
@pytest.mark.parametrize("change", [_add, _replace])
@pytest.mark.parametrize("maps", [False, True])
def test_gradients_are_eagers(
    device: torch.device, maps: bool, change: Callable[[nn.Parameter, torch.Tensor], None], backend_name: str
) -> None:
    plain, fused = pair(device, num_hidden_layers=1)
    x, grads = ids(2, 5, device), []
    for model in (fused, plain):
        with backend(backend_name):
            output = model(x, output_attentions=maps)
            maps_loss = sum(probs.square().sum() for probs in output.attentions or ())
            loss = output.last_hidden_state.pow(3).sum() + maps_loss
            for p in model.parameters():
                change(p, torch.linspace(-1.0, 1.0, p.numel(), device=device).view_as(p))
            loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    ours, theirs = grads
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert (ours[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-3, name

"""A model's step of training by compiled kernels, beside plain PyTorch's. Run with the executor's plugin."""

from unittest import mock

import pytest
import torch

from tests.executor.calls import model_step

LENGTHS = [70, 41, 1]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_of_training(fused: bool) -> None:
    """Against float64, at most twice as far off as plain PyTorch in float32."""
    with mock.patch("fastbert.modules.layer.feed_forward_is_fused", return_value=fused):
        kernels = model_step("triton", torch.float32, LENGTHS, 0.0)
    plain = model_step("torch", torch.float32, LENGTHS, 0.0)
    exact = model_step("torch", torch.float64, LENGTHS, 0.0)
    for mine, theirs, truth in zip(kernels, plain, exact, strict=True):
        error, own = ((x.double() - truth).abs().max().item() for x in (mine, theirs))
        assert error <= 2 * own + 1e-5 * max(1.0, truth.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_training_with_dropout(dtype: torch.dtype) -> None:
    """Plain PyTorch draws other masks: what the executor checks, and that the masks are drawn."""
    kernels = model_step("triton", dtype, LENGTHS, 0.1)
    assert all(x.isfinite().all() for x in kernels)
    undropped = model_step("torch", dtype, LENGTHS, 0.0)
    assert not any(torch.allclose(x, y) for x, y in zip(kernels[1:3], undropped[1:3], strict=True))

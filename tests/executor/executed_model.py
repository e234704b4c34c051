"""A model's step of training by compiled kernels, beside plain PyTorch's. Run with the executor's plugin."""

from unittest import mock

import pytest
import torch

from tests.executor.calls import model_step


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_of_training(fused: bool) -> None:
    """Against float64, at most twice as far off as plain PyTorch in float32."""
    lengths = [70, 41, 1]
    with mock.patch("fastbert.modules.feed_forward_is_fused", return_value=fused):
        kernels = model_step("triton", torch.float32, lengths)
    plain = model_step("torch", torch.float32, lengths)
    exact = model_step("torch", torch.float64, lengths)
    for mine, theirs, truth in zip(kernels, plain, exact, strict=True):
        error, own = ((x.double() - truth).abs().max().item() for x in (mine, theirs))
        assert error <= 2 * own + 1e-5 * max(1.0, truth.abs().max().item())

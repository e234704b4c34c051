"""Devices: GPUs that run no kernel, models on several, and tensors without memory."""

import sys
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from fastbert.graphs.recording import why_not_here
from fastbert_kernels import backend, uses_triton
from fastbert_kernels.backend import why_no_kernels


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, the first older than any that kernels are compiled for; nobody has asked for them yet."""
    monkeypatch.setattr(sys.modules[why_no_kernels.__module__], "_kernelless", {})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(7, 5), (8, 0)][index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["Tesla T4", "A100"][index])


def on_gpu(index: int) -> Any:
    return Mock(is_cuda=True, get_device=lambda: index, device=torch.device("cuda", index), dtype=torch.float32)


T4 = "Tesla T4 has compute capability 7.5, and kernels need 8.0 or more"


@pytest.mark.usefixtures("gpus")
def test_an_old_gpu_runs_plain_pytorch_and_this_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with backend("auto"):
        assert [uses_triton(on_gpu(index)) for index in (0, 1, 0)] == [False, True, False]
    assert [record.message for record in caplog.records] == [f"fastbert: plain PyTorch runs on cuda:0: {T4}"]


@pytest.mark.usefixtures("gpus")
def test_kernels_on_an_old_gpu_are_an_error() -> None:
    with backend("triton"):
        assert uses_triton(on_gpu(1))
        with pytest.raises(RuntimeError, match=rf"FASTBERT_BACKEND=triton cannot run on cuda:0: {T4}; use"):
            uses_triton(on_gpu(0))


@pytest.mark.usefixtures("gpus")
def test_an_old_gpu_replays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with backend("auto"):
        assert why_not_here(torch.device("cuda", 0)) == f"plain PyTorch makes the GPU wait: {T4}"
        assert why_not_here(torch.device("cuda", 1)) is None


@pytest.mark.usefixtures("gpus")
def test_an_amd_gpu_has_capabilities_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with backend("auto"):
        assert uses_triton(on_gpu(0))


@pytest.mark.usefixtures("gpus")
def test_a_compiled_graph_asks_which_gpus_run_kernels_while_it_is_traced() -> None:
    def on_the_first(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if why_no_kernels(0) else x

    compiled = torch.compile(on_the_first, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))

"""Which backend the ops run on: the tensor's device decides, FASTBERT_BACKEND overrides."""

import os
import subprocess
import sys

import pytest
import torch

import fastbert_kernels
from fastbert_kernels import bias_activation, get_backend, reference, set_backend, uses_triton
from fastbert_kernels.backend import arch, check_interpreter, check_mode, check_same_device


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own: the environment is read when the package is imported."""
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_device_decides_by_default(device: torch.device) -> None:
    with fastbert_kernels.backend("auto"):
        assert not uses_triton(torch.zeros(1))
        assert uses_triton(torch.zeros(1, device=device)) == (device.type == "cuda")


def test_backends_override_the_device(device: torch.device) -> None:
    x = torch.zeros(1, device=device)
    with fastbert_kernels.backend("triton"):
        assert get_backend() == "triton"
        assert uses_triton(x)
        with fastbert_kernels.backend("torch"):
            assert not uses_triton(x)
        assert get_backend() == "triton"


def test_backend_is_restored_after_an_error() -> None:
    before = get_backend()

    def fail() -> None:
        with fastbert_kernels.backend("torch"):
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert get_backend() == before


def test_set_backend() -> None:
    before = get_backend()
    try:
        set_backend("torch")
        assert get_backend() == "torch"
    finally:
        set_backend(before)


def test_unknown_backend() -> None:
    message = "unknown fastbert backend 'cuda': FASTBERT_BACKEND takes one of auto, torch, triton"
    before = get_backend()
    with pytest.raises(ValueError, match=message):
        set_backend("cuda")
    with pytest.raises(ValueError, match=message), fastbert_kernels.backend("cuda"):
        pass
    assert get_backend() == before


def test_unknown_backend_in_the_environment() -> None:
    done = python("import fastbert_kernels", FASTBERT_BACKEND="fast")
    assert done.returncode != 0
    assert "unknown fastbert backend 'fast'" in done.stderr


def test_triton_on_a_cpu_needs_the_interpreter() -> None:
    code = "import torch, fastbert_kernels as k; k.bias_activation(torch.zeros(2, 8), None)"
    done = python(code, FASTBERT_BACKEND="triton", TRITON_INTERPRET="0")
    assert done.returncode != 0
    assert "RuntimeError: FASTBERT_BACKEND=triton cannot run on cpu tensors" in done.stderr
    assert "set TRITON_INTERPRET=1" in done.stderr


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_plain_pytorch_needs_no_interpreter(name: str) -> None:
    code = "import torch, fastbert_kernels as k; k.bias_activation(torch.zeros(2, 8), None)"
    assert python(code, FASTBERT_BACKEND=name, TRITON_INTERPRET="0").returncode == 0


def test_environment_chooses_the_interpreted_kernel() -> None:
    code = "import torch, fastbert_kernels as k; print(k.get_backend(), k.uses_triton(torch.zeros(1)))"
    assert python(code, FASTBERT_BACKEND="triton", TRITON_INTERPRET="1").stdout.split() == ["triton", "True"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_dtype_without_a_kernel(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.zeros(2, 8, device=device, dtype=dtype)
    with fastbert_kernels.backend("triton"), pytest.raises(TypeError, match=f"has dtype {dtype}: cast the model to"):
        uses_triton(x)


def test_float64_runs_in_plain_pytorch() -> None:
    x = torch.randn(2, 8, dtype=torch.float64)
    with fastbert_kernels.backend("torch"):
        assert torch.equal(bias_activation(x, None), reference.bias_activation(x, None, "gelu"))


def test_check_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTBERT_CHECK", raising=False)
    assert not check_mode()
    monkeypatch.setenv("FASTBERT_CHECK", "1")
    assert check_mode()


def test_check_same_device() -> None:
    check_same_device("op", a=torch.zeros(1), b=None, c=torch.zeros(1))
    with pytest.raises(ValueError, match="op needs every tensor on one device, got a on cpu, c on meta"):
        check_same_device("op", a=torch.zeros(1), b=None, c=torch.zeros(1, device="meta"))


def test_arch_of_a_cpu_is_the_interpreter() -> None:
    assert arch(torch.device("cpu")) == "interpreter"


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        ((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 7), "sm_86"), ((8, 9), "sm_89"), ((9, 0), "sm_90"),
        ((10, 0), "sm_100"), ((10, 3), "sm_100"), ((11, 0), "sm_100"), ((12, 0), "sm_120"), ((12, 1), "sm_120"),
    ],
)  # fmt: skip
def test_arch_of_a_gpu_is_the_nearest_smaller_one(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], target: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert arch.__wrapped__(torch.device("cuda", 0)) == target


@pytest.mark.parametrize(
    ("triton_version", "numpy_version"), [("3.6.0", "2.3.5"), ("3.7.0", "2.4.0"), ("3.9.0", "2.5.2")]
)
def test_an_interpreter_that_works(triton_version: str, numpy_version: str) -> None:
    check_interpreter(triton_version, numpy_version)


def test_an_interpreter_that_fails_says_what_to_install() -> None:
    with pytest.raises(ImportError, match=r"Triton 3\.6\.0 does not work with NumPy 2\.5\.2: install triton>=3\.7 or"):
        check_interpreter("3.6.0", "2.5.2")

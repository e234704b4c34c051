"""Which backend an op runs on.

There are three: plain PyTorch (`reference.py`), the op's Triton kernel under Triton's interpreter, and the same kernel
compiled for a GPU. The tensor's device decides, here and nowhere else:

| device | what runs |
|---|---|
| GPU | the compiled kernel |
| GPU older than sm_80, or without Triton | plain PyTorch |
| any, under torch.func or in forward-mode AD | plain PyTorch |
| CPU | plain PyTorch; whole layers by oneDNN |
| CPU, `FASTBERT_BACKEND=triton` with `TRITON_INTERPRET=1` | the kernel, interpreted |

`FASTBERT_BACKEND=torch` runs plain PyTorch everywhere.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from importlib.metadata import version

import torch
from packaging.version import Version
from torch._C import (
    _are_functorch_transforms_active,
    _get_dispatch_mode,
    _get_fp32_precision_getter,
    _is_tracing,
    _len_torch_dispatch_stack,
    _TorchDispatchModeKey,
)
from torch._subclasses import FakeTensor

from .language import MISSING, triton

#: True when Triton kernels run in Triton's interpreter. Triton reads the variable when a kernel is defined, so it must
#: be set before the first import.
INTERPRETED: bool = MISSING is None and triton.knobs.runtime.interpret


def check_interpreter(triton_version: str, numpy_version: str) -> None:
    """Raise ImportError for a Triton whose interpreter fails in every loop with that NumPy."""
    if Version(triton_version) < Version("3.7") and Version(numpy_version) >= Version("2.4"):
        raise ImportError(
            f"the interpreter of Triton {triton_version} does not work with NumPy {numpy_version}: install triton>=3.7 "
            "or numpy<2.4, or unset TRITON_INTERPRET"
        )


if INTERPRETED:
    check_interpreter(triton.__version__, version("numpy"))

#: Dtypes the kernels have. Everything else is an error on the Triton path.
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: The first compute capability of NVIDIA's that kernels are compiled for.
_FIRST_CAPABILITY = (8, 0)

_BACKENDS = ("auto", "torch", "triton")

logger = logging.getLogger("fastbert")


def require_triton(what: str) -> None:
    """Raise RuntimeError, naming what asks, where Triton cannot be imported."""
    if MISSING is not None:
        raise RuntimeError(f"{what} needs Triton, which cannot be imported here ({MISSING})")


def _checked(name: str) -> str:
    if name not in _BACKENDS:
        raise ValueError(f"unknown fastbert backend {name!r}: FASTBERT_BACKEND takes one of {', '.join(_BACKENDS)}")
    if name == "triton":
        require_triton("FASTBERT_BACKEND=triton")
    return name


_backend: str = _checked(os.environ.get("FASTBERT_BACKEND", "auto"))


def get_backend() -> str:
    """The backend in force: `"auto"`, `"torch"` or `"triton"`."""
    return _backend


def set_backend(name: str) -> None:
    """Override the choice of backend for this process.

    Args:
        name: `"auto"` (by device), `"torch"` or `"triton"`.

    Raises:
        ValueError: for any other name.
        RuntimeError: for `"triton"` where there is no Triton.
    """
    global _backend
    _backend = _checked(name)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run a block under another backend, e.g. `with backend("triton"): ...`."""
    before = get_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def is_traced() -> bool:
    """Whether a compiler, a tracer or a functorch transform is to see what runs, and not only torch's dispatcher."""
    return torch.compiler.is_compiling() or _are_functorch_transforms_active() or _is_tracing()


def is_watched() -> bool:
    """Whether any of these, or a dispatch mode, is to see ops, and not what they are made of."""
    return is_traced() or _len_torch_dispatch_stack() > 0


def is_transformed() -> bool:
    """Whether a transform of torch.func runs, whose tensors hold several values, or gradients, at once."""
    return _are_functorch_transforms_active()


def takes_tangents() -> bool:
    """Whether forward-mode derivatives are being taken."""
    return torch.autograd.forward_ad._current_level >= 0


@functools.cache
def _say_transformed() -> None:
    logger.warning("fastbert: plain PyTorch runs under torch.func and in forward-mode AD, for which no kernel is made")


#: GPU -> why it runs no kernel, or None; of those that somebody has asked for.
_kernelless: dict[int, str | None] = {}


@torch.compiler.assume_constant_result  # a graph is compiled for one machine, and traced code cannot log
def why_no_kernels(index: int) -> str | None:
    """Why a GPU runs no kernel, which is logged when it is found; None where it does."""
    if index not in _kernelless:
        reason = _kernelless[index] = _find_reason(index)
        if reason is not None:
            logger.warning(f"fastbert: plain PyTorch runs on cuda:{index}: {reason}")
    return _kernelless[index]


def _find_reason(index: int) -> str | None:
    if MISSING is not None:
        return f"Triton cannot be imported ({MISSING})"
    if torch.version.hip or index >= torch.cuda.device_count():  # fake tensors may be on a GPU that is not there
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability >= _FIRST_CAPABILITY:
        return None
    has, needs = (".".join(map(str, x)) for x in (capability, _FIRST_CAPABILITY))
    return f"{torch.cuda.get_device_name(index)} has compute capability {has}, and kernels need {needs} or more"


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether ops on `tensor` run as Triton kernels.

    Raises:
        RuntimeError: when the Triton backend is asked for on a CPU tensor without the interpreter, or on a GPU that
            runs no kernel.
        TypeError: when the Triton backend is in force and no kernel has the tensor's dtype.
    """
    if _backend == "torch" or (_backend == "auto" and not tensor.is_cuda):
        return False
    if not torch.compiler.is_compiling() and (is_transformed() or takes_tangents()):
        _say_transformed()
        return False
    if tensor.is_cuda:
        reason = why_no_kernels(tensor.get_device())
        if reason is not None and _backend == "auto":
            return False
        if reason is not None:
            raise RuntimeError(f"FASTBERT_BACKEND=triton cannot run on {tensor.device}: {reason}; use auto, or torch")
    elif tensor.is_meta:  # nothing to compute, with whatever
        return False
    elif not INTERPRETED:
        raise RuntimeError(
            f"FASTBERT_BACKEND=triton cannot run on {tensor.device} tensors without Triton's interpreter: set "
            "TRITON_INTERPRET=1 before importing fastbert, move the model to a GPU, or use FASTBERT_BACKEND=torch"
        )
    if tensor.dtype not in KERNEL_DTYPES:
        raise TypeError(
            f"no fastbert kernel has dtype {tensor.dtype}: cast the model to one of "
            f"{', '.join(map(str, KERNEL_DTYPES))}, or run plain PyTorch with FASTBERT_BACKEND=torch"
        )
    return True


def uses_cpu_layers(tensor: torch.Tensor) -> bool:
    """Whether layers on `tensor`, on which no kernel runs, are those of `cpu_layer.py`, and not the definition."""
    return (
        _backend == "auto"
        and tensor.is_cpu
        and tensor.dtype in KERNEL_DTYPES
        and not is_watched()
        and not torch.is_autocast_enabled("cpu")  # which knows the products of the definition, not oneDNN's
        and not takes_tangents()
    )


def has_values(x: torch.Tensor) -> bool:
    """Whether what a tensor holds may be read on the host.

    Not where a compiler or a tracer looks on, for its graph serves other values too; nor under torch.func, whose
    tensors may hold many; and on the meta device and under FakeTensorMode there is nothing to read.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed():
        return False
    modes = _TorchDispatchModeKey.FAKE, _TorchDispatchModeKey.PROXY
    return not (x.is_meta or isinstance(x, FakeTensor) or any(_get_dispatch_mode(mode) is not None for mode in modes))


def allows_tf32() -> bool:
    """Whether torch was told that a GPU may round the operands of float32 products to TF32."""
    return _get_fp32_precision_getter("cuda", "matmul") == "tf32"  # torch.backends takes six times as long


def check_mode() -> bool:
    """Whether `FASTBERT_CHECK=1` asks for the checks that cost a device synchronisation (ids in range, lengths)."""
    return os.environ.get("FASTBERT_CHECK", "0") == "1"


def check_same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError naming each tensor's device unless all given tensors share one."""
    first = None
    for tensor in tensors.values():
        if tensor is None:
            continue
        if first is None:
            first = tensor.device
        elif tensor.device != first:
            break
    else:
        return
    listing = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items() if tensor is not None)
    raise ValueError(f"{op} needs every tensor on one device, got {listing}: move them with .to(device)")


#: What CUDA GPUs have a row for, by compute capability; others take that of the nearest smaller one.
_CUDA_ARCHES = {
    (8, 0): "sm_80", (8, 6): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90", (10, 0): "sm_100", (12, 0): "sm_120",
}  # fmt: skip


@functools.cache
def arch(device: torch.device) -> str:
    """The target of the tile tables for a device: one of `"sm_80"`, `"sm_86"`, `"sm_89"`, `"sm_90"`, `"sm_100"`,
    `"sm_120"`, `"gfx942"`, or `"interpreter"`.

    GPUs that are none of these are taken for the nearest smaller one: tiles that fit there fit here.
    """
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    capability = torch.cuda.get_device_capability(device)
    return _CUDA_ARCHES[max(known for known in _CUDA_ARCHES if known <= capability)]

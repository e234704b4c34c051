"""Puts the executor in the place of Triton's driver: kernels compiled for sm_80 are launched here, on CPU tensors."""

import collections
import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from fastbert_kernels.backend import INTERPRETED, KERNEL_DTYPES, get_backend

from .counters import Counters
from .machine import Code, Machine
from .memory import GlobalMemory
from .ptx import TYPES, parse

TARGET = "sm_80"

#: Threads that run together, at most: enough for NumPy, few enough for the cache.
LANES = 2048


class Launches:
    """The kernels that were launched.

    Attributes:
        count: launches by kernel.
        counters: by kernel, where they are `counted`.
        codes: the kernels by their PTX.
    """

    def __init__(self, counted: bool) -> None:
        self.count: collections.Counter[str] = collections.Counter()
        self.counters: dict[str, Counters] = {}
        self.counted = counted
        self.codes: dict[str, Code] = {}

    def code(self, ptx: str) -> Code:
        """The kernel of this PTX."""
        if ptx not in self.codes:
            self.codes[ptx] = Code(parse(ptx))
        return self.codes[ptx]

    def launch(self, compiled: CompiledKernel, grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> None:
        """Run every program of a launch.

        Args:
            compiled: the kernel.
            grid: programs along x, y and z.
            arguments: one for each argument of the kernel's source, constants included.

        Raises:
            KernelError: when a rule of the memory or of synchronisation is broken.
            UnsupportedError: for an instruction that the executor does not know.
        """
        code = self.code(compiled.asm["ptx"])
        names = compiled.src.fn.arg_names
        constant = {path if isinstance(path, str) else names[path[0]] for path in compiled.src.constants}
        given = {
            name: value
            for (name, kind), value in zip(compiled.src.signature.items(), arguments, strict=True)
            if kind != "constexpr" and name not in constant
        }
        name = code.kernel.name
        self.count[name] += 1
        counters = self.counters.setdefault(name, Counters()) if self.counted else None
        execute(code, given, grid, compiled.metadata.shared, counters)


def execute(
    code: Code, arguments: dict[str, Any], grid: tuple[int, int, int], shared: int, counters: Counters | None = None
) -> None:
    """Run every program of a launch.

    Args:
        code: the kernel.
        arguments: tensors and numbers in the order of the kernel's parameters; parameters without one are 0.
        grid: programs along x, y and z.
        shared: bytes of shared memory of a program.
        counters: to count in, which takes longer than all else.

    Raises:
        KernelError: when a rule of memory or of synchronisation is broken.
        UnsupportedError: for an instruction that the executor does not know.
    """
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    memory = GlobalMemory([(t.data_ptr(), extent(t), name) for name, t in tensors.items()], code.global_grain)
    values = [memory.address(v.data_ptr()) if isinstance(v, torch.Tensor) else v for v in arguments.values()]
    parameters: dict[str, Any] = {}
    for position, (name, kind) in enumerate(code.kernel.parameters.items()):
        value = values[position] if position < len(values) else 0
        dtype = np.dtype(TYPES[kind])
        if dtype.kind != "f":
            value = int(value) & (1 << 8 * dtype.itemsize) - 1
        parameters[name] = np.asarray(value, dtype if dtype.kind == "f" else f"u{dtype.itemsize}")[()]
    programs, together = range(grid[0] * grid[1] * grid[2]), max(1, LANES // code.kernel.threads)
    with np.errstate(all="ignore"):
        for first in range(0, len(programs), together):
            chosen = programs[first : first + together]
            Machine(code, parameters, grid, chosen, shared, memory, counters).run()


def extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


class _Driver:
    """Triton's driver of a device that is this executor."""

    def __init__(self) -> None:
        self.utils = self

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": 166912}  # A100

    def load_binary(self, name: str, binary: bytes, shared: int, device: str) -> tuple[Any, ...]:
        """Module, function, registers, spills, and the most threads of a program."""
        return name, name, 0, 0, 1024

    def unload_module(self, *args: Any) -> None:
        pass

    def get_current_device(self) -> str:
        return f"executed {TARGET}"  # no real device's, whose compiled kernels Triton keeps under its number

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(TARGET.removeprefix("sm_")), 32)

    def launcher_cls(self, source: Any, metadata: Any) -> None:
        return None


def _uses_triton(tensor: torch.Tensor) -> bool:
    if get_backend() != "triton":
        return False
    if tensor.dtype not in KERNEL_DTYPES:
        raise TypeError(f"no fastbert kernel has dtype {tensor.dtype}: cast the model to")
    return True


@contextlib.contextmanager
def executed(counted: bool = False) -> Iterator[Launches]:
    """Run the Triton backend on CPU tensors as compiled code, executed here.

    Args:
        counted: whether to count what the kernels do, which takes longer than to run them.

    Raises:
        RuntimeError: under Triton's interpreter, which compiles nothing.
    """
    if INTERPRETED:
        raise RuntimeError("with TRITON_INTERPRET=1 kernels are not compiled: unset it")
    launches = Launches(counted)

    def init_handles(compiled: CompiledKernel) -> None:
        def run(x: int, y: int, z: int, stream: Any, function: Any, packed: Any, *more: Any) -> None:
            _, _, _, *arguments = more  # metadata and two hooks
            launches.launch(compiled, (x, y, z), tuple(arguments))

        compiled._run, compiled.function = run, compiled.name

    changes: dict[str, Any] = {"uses_triton": _uses_triton, "arch": lambda device: TARGET}
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("fastbert"):
                for function, change in changes.items():
                    if hasattr(module, function):
                        stack.enter_context(mock.patch.object(module, function, change))
        stack.enter_context(mock.patch.object(driver, "_active", _Driver()))
        stack.enter_context(mock.patch.object(CompiledKernel, "_init_handles", init_handles))
        stack.enter_context(mock.patch("fastbert_kernels.launch._launchers", {}))
        stack.enter_context(mock.patch("torch.cuda.current_device", return_value=None))  # a CPU tensor's index
        yield launches

"""A stand-in for a GPU that is not there: the host code of compiled kernels, run on CPU tensors.

Every launch goes all the way through Triton, which compiles the kernel for the target and looks up what it has
compiled, to the call that would hand it to the device. There it ends: results are whatever was in memory.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from triton.runtime import driver

from fastbert_kernels.backend import INTERPRETED, KERNEL_DTYPES

from .static.cases import TARGETS


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of a mock, which would take its time."""


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**20}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Module, function, registers, spills, and the most threads of a program."""
        return name, name, 0, 0, 1024

    unload_module = _nothing


class _Driver:
    """Triton's driver of a device that does nothing."""

    utils = _Utils()

    def __init__(self, target: str, launched: Counter[str]) -> None:
        self.target, self.launched = target, launched

    def get_current_device(self) -> str:
        return f"stand-in {self.target}"  # no real device's, whose compiled kernels Triton keeps under its number

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        return TARGETS[self.target]

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        name, launched = metadata.name, self.launched

        # Grid, stream, function, both metadata, both hooks, and the kernel's own arguments: as the driver's own.
        def launch(*given: Any) -> None:
            about, enter, leave = given[6:9]
            enter(about)
            launched[name] += 1
            leave(about)

        return launch


@contextlib.contextmanager
def as_on_a_gpu(target: str = "sm_90") -> Iterator[Counter[str]]:
    """Run the host code of the compiled kernels on CPU tensors, with launches that do nothing.

    Args:
        target: the GPU's, as `bench.static` names them.

    Yields:
        How often each kernel is launched, by name.

    Raises:
        RuntimeError: under Triton's interpreter, whose host code is another.
    """
    if INTERPRETED:
        raise RuntimeError("with TRITON_INTERPRET=1 the host code is not a GPU's: unset it")
    launched: Counter[str] = Counter()
    changes = {
        "uses_triton": lambda x: x.dtype in KERNEL_DTYPES,
        "arch": lambda device: target,
    }
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("fastbert"):
                for function, change in changes.items():
                    if hasattr(module, function):
                        stack.enter_context(mock.patch.object(module, function, change))
        stack.enter_context(mock.patch.object(driver, "_active", _Driver(target, launched)))
        stack.enter_context(mock.patch("fastbert_kernels.launch._launchers", {}))
        stack.enter_context(mock.patch("torch.cuda.current_device", _nothing))  # a CPU tensor's device.index is None
        yield launched

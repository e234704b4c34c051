"""The GPU run on a GPU that is not there: every section's own code, on a stand-in for torch's and tiny sizes.

As a script, in a process of its own that can be killed: `python tests/helpers/rehearsal.py CHECKPOINT --out DIR ...`.
Kernels are Triton's, interpreted, where a section asks for them; what each section starts in processes is a real
command line, whose work is small.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

if __name__ == "__main__":  # before kernels are defined
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from models import tiny_config
from torch.overrides import TorchFunctionMode

from bench import floors, kernel_cases
from bench.gpu import candidates, commands, kernels, models, ops
from bench.models import CONFIGS
from fastbert.benchmark import timing
from fastbert.benchmark.workloads import Workload, full
from fastbert.tuning.problems import Sizes
from fastbert_kernels import launch, tuned
from fastbert_kernels.backend import arch
from fastbert_kernels.catalogue import Launch, Product

CPU = torch.device("cpu")


class Event:
    """A moment on the host's clock."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.at - self.at) or 1e-6


class _OnCpu(TorchFunctionMode):
    """What is asked for on a GPU is on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        return func(*map(_there, args), **{name: _there(x) for name, x in (kwargs or {}).items()})


def _there(x: Any) -> Any:
    return CPU if isinstance(x, (str, torch.device)) and str(x).startswith("cuda") else x


def _stream(*given: Any) -> Any:
    return SimpleNamespace(wait_stream=lambda other: None)


_ABOUT = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=2**30, uuid="none", name="stand-in")
#: Of `torch.cuda`.
_CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "get_device_name": lambda device=None: "stand-in",
    "get_device_properties": lambda device=None: _ABOUT,
    "get_device_capability": lambda device=None: (9, 0),
    "synchronize": lambda device=None: None,
    "reset_peak_memory_stats": lambda device=None: None,
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 1,
    "_sleep": lambda cycles: None,
    "Event": Event,
    "Stream": _stream,
    "current_stream": _stream,
    "stream": lambda stream: contextlib.nullcontext(),
    "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
    "graph": lambda graph: contextlib.nullcontext(),
}


@contextlib.contextmanager
def stand_in_gpu() -> Iterator[None]:
    """Run a block with a GPU that is the CPU."""
    with contextlib.ExitStack() as stack:
        for name, stands_in in _CUDA.items():
            stack.enter_context(mock.patch(f"torch.cuda.{name}", stands_in))
        stack.enter_context(_OnCpu())
        try:
            yield
        finally:
            arch.cache_clear()
            launch.multiprocessors.cache_clear()
            tuned._tables.pop(torch.device("cuda", 0), None)


_ROWS = Launch("bias_activation_forward", torch.bfloat16, 32)
_ATTENTION = Launch("attention_forward", torch.bfloat16, 64, up_to=32)
_TINY = Sizes(lengths=(8,), tokens=16, heads=2, ragged=(1, 9), even=(5, 5), rows=20, vocabulary=30)


def tiny(checkpoint: Path) -> dict[Any, dict[str, Any]]:
    """Owner -> names and values that make every section small."""
    cases = {
        "attention": kernel_cases._attention_case(full(2, 8), "2 x 8", heads=2),
        "norm": kernel_cases._norm_case(32, dropout_p=0.1, tokens=10),
        "linear": kernel_cases._linear_case(32, 16, tokens=10),
    }
    workloads = (Workload("forward", (4, 9), "forward"), Workload("step", (9, 9), "finetune"))
    said = "bench = 'of the command, on a stand-in'; print(bench)"
    on_cpu = ("--small", "--device", "cpu")
    return {
        floors: {"COPY_BYTES": 1024, "SIDES": {"cuda": 32, "cpu": 32}},
        timing: {"FLUSH_BYTES": 1024},
        kernel_cases: {"compiled": lambda function: function, "_flex": _flex},
        kernels: {"CASES": cases, "SECONDS": 0.0},
        models: {
            "CHECKPOINT": checkpoint,
            "GPU_WORKLOADS": {workload.name: workload for workload in workloads},
            "SECONDS": 0.0,
            "ROUNDS": (1, 1),
        },
        candidates: {
            "LAUNCHES": (_ROWS,),
            "VARIED": (_ATTENTION,),
            "PRODUCTS": (Product(torch.bfloat16, 16, "gelu"),),
            "SIZES": _TINY,
            "SECONDS": 0.0,
        },
        ops: {"GROUPS": ("relation bfloat16",), "CALLS": on_cpu, "WATCHED_CALLS": (*on_cpu, "--no-definition")},
        commands: {"TUNE": ("-c", said), "SUITES": {"gpu": ("-c", said), "kernels": ("-c", said)}},
    }


def _flex(mask: Any, whole: bool) -> Any:
    def forward(q: Any, k: Any, v: Any) -> tuple[Any]:
        raise NotImplementedError("FlexAttention is compiled for a GPU")

    return forward


@contextlib.contextmanager
def rehearsal(checkpoint: Path) -> Iterator[None]:
    """A block in which the command runs here."""
    with contextlib.ExitStack() as stack:
        for owner, changes in tiny(checkpoint).items():
            for name, value in changes.items():
                stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.dict(CONFIGS, base=tiny_config(hidden_dropout_prob=0.1)))
        stack.enter_context(stand_in_gpu())
        yield


if __name__ == "__main__":
    import typer

    from bench.gpu.__main__ import main

    with rehearsal(Path(sys.argv.pop(1))):
        typer.run(main)

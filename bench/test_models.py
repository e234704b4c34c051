"""Models on the workloads of the runs, for everyday work: contenders stand side by side in a workload's group.

They do not take turns, as they do in `bench.cpu` and `bench.gpu`: good for a change against what was saved before it,
not for a ratio to quote.
"""

import functools
from collections.abc import Callable

import pytest
import torch

from bench.conftest import DEVICE
from bench.models import CONFIGS
from fastbert.benchmark.contenders import CONTENDERS
from fastbert.benchmark.measure import Field, random_source
from fastbert.benchmark.timing import Run
from fastbert.benchmark.workloads import CPU_WORKLOADS, GPU_WORKLOADS, Task

ON_GPU = DEVICE.type == "cuda"
MODEL, WORKLOADS = ("base", GPU_WORKLOADS) if ON_GPU else ("minilm", CPU_WORKLOADS)
#: The first of them are measured by default.
DTYPES = ("bfloat16", "float32") if ON_GPU else ("float32", "bfloat16")
EVERYDAY = ("fastbert", "eager", "sdpa")


@functools.cache
def field(dtype: str, task: Task) -> Field:
    return Field(MODEL, random_source(CONFIGS[MODEL], task), EVERYDAY, dtype=getattr(torch, dtype), device=DEVICE)


def _marks(everyday: bool) -> tuple[pytest.MarkDecorator, ...]:
    return () if everyday else (pytest.mark.slow,)


@pytest.mark.parametrize("contender", [pytest.param(name, marks=_marks(name in EVERYDAY)) for name in CONTENDERS])
@pytest.mark.parametrize("dtype", [pytest.param(name, marks=_marks(name == DTYPES[0])) for name in DTYPES])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_model(workload: str, dtype: str, contender: str, timed: Callable[[str, str, Run], None]) -> None:
    what = WORKLOADS[workload]
    # What "forward" and "backward" build serves both.
    contenders = field(dtype, "finetune" if what.task == "finetune" else "forward")
    if why := contenders.missing(contender, what):
        pytest.skip(f"{CONTENDERS[contender]}: {why}")
    timed(f"{workload} {MODEL} {dtype}", contender, contenders.ready(contender, what))

"""Set-up of the pytest-benchmark suites: `pytest bench --benchmark-enable`."""

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from fastbert.benchmark.provenance import device_name, versions
from fastbert.benchmark.timing import Run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def timed(benchmark: Any) -> Callable[[str, str, Run], None]:
    """Time a run that is ready: `timed(group, contender, run)`. On a GPU each run is waited for."""

    def time(group: str, contender: str, run: Run) -> None:
        def run_and_wait() -> None:
            run()
            torch.cuda.synchronize(DEVICE)

        benchmark.group = group
        benchmark.extra_info["contender"] = contender
        benchmark(run_and_wait if DEVICE.type == "cuda" else run)

    return time


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """A saved run says what it was made with; one compared with another says where these differ."""
    machine_info["device"] = device_name(DEVICE)
    machine_info["versions"] = versions()

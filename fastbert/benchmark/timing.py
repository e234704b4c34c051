"""Times of several contenders in one run: they take turns, so that whatever slows the machine slows all alike."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Run = Callable[[], Any]

#: Written before a timed run that must find nothing of its own in the L2 cache, which is smaller on every GPU.
FLUSH_BYTES = 256 * 1024 * 1024

#: Clock cycles that the GPU is kept busy while a kernel's run is launched: half a millisecond.
_LAUNCH_CYCLES = 1_000_000


@dataclass(frozen=True)
class Times:
    """How long one contender took.

    Attributes:
        q20, median, q80: quantiles over the rounds, in seconds.
        rounds: how many rounds there were.
    """

    q20: float
    median: float
    q80: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Times":
        """The quantiles of times in seconds."""
        q20, median, q80 = np.quantile(seconds, [0.2, 0.5, 0.8]).tolist()
        return cls(q20, median, q80, len(seconds))


def interleaved(
    runs: Mapping[str, Run],
    device: torch.device,
    *,
    seconds: float = 10.0,
    rounds: tuple[int, int] = (5, 100),
    flush: bool = False,
    on_round: Callable[[float], object] = lambda share: None,
) -> dict[str, Times]:
    """Time the runs in rounds: in each, every one has its turn, in an order that rotates.

    Args:
        runs: what to time, by name. Each has run before: nothing should be compiled here.
        device: where they run. On a GPU the time is that between two events on the current stream.
        seconds: no new round starts after this time, once the fewest rounds are done.
        rounds: fewest and most rounds.
        flush: for kernels. Empties the L2 cache before each run and keeps the GPU busy while the run is launched: its
            own time is left. Without it each run starts on an idle GPU and its launches count. Nothing on a CPU.
        on_round: called after each round with the share of the work that is done, up to 1.

    Returns:
        The times of each run, by name.

    Raises:
        ValueError: when `rounds` cannot be kept.
    """
    fewest, most = rounds
    if not 1 <= fewest <= most:
        raise ValueError(f"rounds {rounds} must be (fewest, most) with 1 <= fewest <= most")
    on_gpu = device.type == "cuda"
    cache = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if flush and on_gpu else None
    taken: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    start = time.perf_counter()
    for i in range(most):
        spent = time.perf_counter() - start
        if i >= fewest and spent >= seconds:
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:
            taken[name].append(_gpu_seconds(runs[name], cache) if on_gpu else _cpu_seconds(runs[name]))
        spent = time.perf_counter() - start
        on_round(min(1.0, max((i + 1) / most, min((i + 1) / fewest, spent / seconds if seconds else 1.0))))
    on_round(1.0)
    return {name: Times.of(values) for name, values in taken.items()}


def _cpu_seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _gpu_seconds(run: Run, cache: Tensor | None) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if cache is not None:
        cache.zero_()
        torch.cuda._sleep(_LAUNCH_CYCLES)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def graphed(run: Run) -> Run:
    """A CUDA graph of one run: replaying it costs one launch however many kernels there are.

    The run must do the same work on the same tensors each time and must not wait for the GPU.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peak_memory(run: Run, device: torch.device) -> int | None:
    """Bytes that a run allocates at its peak, over what was there before it; None on a CPU, where nobody counts."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before

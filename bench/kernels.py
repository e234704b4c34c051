"""The kernels one by one, against their floors and against what a user would call instead. For a GPU.

Every contender's result is compared with float32 before it is timed. Caches are flushed and launches hidden, so that
the GPU's own time is left. A floor is what `bench.static.limits` says the call must compute and move, at the measured
rates of products and copies.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.floors import Machine
from bench.kernel_cases import REFERENCES, SLOW_PEERS, Call, OpCase, draw
from fastbert.benchmark.measure import SLACK
from fastbert.benchmark.timing import Run, Times, interleaved
from fastbert_kernels.catalogue import dtype_name


@dataclass(frozen=True)
class KernelRow:
    """One contender on one call.

    Attributes:
        kernel: the op and its direction.
        case: the call's sizes, for people.
        dtype: of the activations.
        contender: who.
        times: of the GPU, flushed; None when it was not timed.
        flops, bytes: what the call must compute and move.
        floor: the least time, in seconds.
        error: largest error of a result, over the truth's largest value.
        bound: what the error may be.
        problem: why it was not timed.
    """

    kernel: str
    case: str
    dtype: str
    contender: str
    flops: float
    bytes: float
    floor: float
    times: Times | None = None
    error: float | None = None
    bound: float | None = None
    problem: str | None = None


def measure(
    case: OpCase,
    dtype: torch.dtype,
    device: torch.device,
    machine: Machine,
    *,
    seconds: float = 1.0,
    slow_peers: bool = True,
) -> Iterator[KernelRow]:
    """Compare and time contenders on a case, forward and backward.

    Args:
        case: the call.
        dtype: of the activations.
        device: where to run.
        machine: whose measured rates make the floors.
        seconds: for each direction.
        slow_peers: whether those of `SLOW_PEERS` take part.
    """
    for direction, work in (("forward", case.forward), ("backward", case.backward)):
        if work is None:
            continue
        blank = KernelRow(
            kernel=f"{case.kernel} {direction}",
            case=case.case,
            dtype=dtype_name(dtype),
            contender="",
            flops=work.flops,
            bytes=work.bytes,
            floor=machine.seconds(work, dtype),
        )
        yield from _measure_direction(case, direction, dtype, device, blank, seconds, slow_peers)


def _measure_direction(
    case: OpCase,
    direction: str,
    dtype: torch.dtype,
    device: torch.device,
    blank: KernelRow,
    seconds: float,
    slow_peers: bool,
) -> Iterator[KernelRow]:
    backward = direction == "backward"
    truth = _results(_reference(case.calls(torch.float32, device, 0.0)), backward)
    rows: dict[str, KernelRow] = {}
    runs: dict[str, Run] = {}
    exact = {k: v for k, v in case.calls(dtype, device, 0.0).items() if slow_peers or k not in SLOW_PEERS}
    timed = case.calls(dtype, device, case.dropout_p) if case.dropout_p else exact
    bound = None
    # Eager first: its error bounds the others'.
    for name in sorted(exact, key=lambda name: name not in REFERENCES):
        row = dataclasses.replace(blank, contender=name)
        call, dropped = exact[name], timed[name]
        if isinstance(call, str) or isinstance(dropped, str):
            rows[name] = dataclasses.replace(row, problem=str(call))
            continue
        try:
            error = _error(_results(call, backward), truth)
            bound = 2 * error + SLACK[dtype] if bound is None else bound
            row = dataclasses.replace(row, error=error, bound=bound)
            if not error <= bound:
                rows[name] = dataclasses.replace(row, problem=f"wrong: its error {error:.1e} is over {bound:.1e}")
                continue
            runs[name] = _run(dropped, backward)
            runs[name]()
        except Exception as failure:  # a peer that cannot do it is a row, not the end of the run
            runs.pop(name, None)
            row = dataclasses.replace(row, problem=f"failed: {type(failure).__name__}: {failure}"[:300])
        rows[name] = row
    times = interleaved(runs, device, seconds=seconds, rounds=(5, 200), flush=True) if runs else {}
    for name in exact:
        yield dataclasses.replace(rows[name], times=times.get(name))


def _reference(calls: dict[str, Call | str]) -> Call:
    return next(call for name, call in calls.items() if name in REFERENCES and isinstance(call, Call))


def _cotangents(call: Call) -> list[Tensor]:
    """Gradients of the compared outputs, the same for every contender."""
    with torch.no_grad():
        outputs = call.align(call.forward())
    torch.manual_seed(1)
    return [draw(*output.shape, dtype=output.dtype, device=output.device) for output in outputs]


def _results(call: Call, backward: bool) -> list[Tensor]:
    if not backward:
        with torch.no_grad():
            return call.align(call.forward())
    gradients = torch.autograd.grad(call.forward(), call.inputs, call.cotangents(_cotangents(call)))
    return call.align_gradients(gradients)


def _run(call: Call, backward: bool) -> Run:
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                call.forward()

        return forward
    outputs, cotangents = call.forward(), call.cotangents(_cotangents(call))
    return lambda: torch.autograd.grad(outputs, call.inputs, cotangents, retain_graph=True)


def _error(got: list[Tensor], want: list[Tensor]) -> float:
    """Largest difference, over the truth's largest value, of any result."""
    return (
        torch.stack([(g.float() - w).abs().max() / w.abs().max() for g, w in zip(got, want, strict=True)]).max().item()
    )

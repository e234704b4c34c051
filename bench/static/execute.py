"""What the kernels do when they run: the compiled code of sm_80, executed on this machine and counted.

Triton loads and stores global memory in the same layouts for sm_90; its shared memory and tensor cores are others.
"""

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from rich.table import Table

from fastbert.tuning.problems import Sizes, by_kernels, checked_problem, cotangents_of
from fastbert_kernels.tuned import Launch

from .cases import BATCH, DTYPES, Case
from .limits import Cost, cost

if TYPE_CHECKING:
    from tests.executor.counters import Counters

HEADS = 3
#: Enough for every stage of a pipeline. No sequence ends inside a tile.
SIZES = Sizes(ragged=(512,), even=(512,), rows=512)
#: Rows of the feed-forward kernels, which have hundreds of programs for each of a few.
FEW_ROWS = dataclasses.replace(SIZES, rows=128)

PIPES = ("float", "integer", "multiply", "special", "convert", "memory", "control", "tensor")

#: Flags of a case that are switches of no call: a case is counted without the first three.
_LEFT_OUT = ("ORDER", "Y", "SUMS")
_IMPLIED = ("NORMED", "DPROBS")

LEGEND = (
    "Thousands of instructions of warps by pipe, of PTX for sm_80. "
    "flops: of the tensor cores, and of those the case needs. "
    "load, store: sectors of global memory moved, of the fewest that hold what is asked for; "
    "banks: cycles of shared memory, of the fewest without bank conflicts; "
    "bytes: of all requests, as if no cache kept them, of those that the case must move once; under 1 where "
    "few rows leave fewer partial sums than a whole grid."
)


def execute(cases: Collection[Case]) -> dict[Case, "Counters"]:
    """Count what each case, but for its flags that are left out, does in one call of its op."""
    from tests.executor.launch import executed

    counted: dict[Case, Counters] = {}
    known: dict[tuple[Launch, tuple[str, ...], bool], dict[str, Counters]] = {}
    for case in cases:
        case = dataclasses.replace(case, flags=tuple(flag for flag in case.flags if flag not in _LEFT_OUT), batch=BATCH)
        call = _call(case)
        if call not in known:
            with executed(counted=True) as launches:
                _run(*call)
            known[call] = launches.counters
        counted[case] = next(c for name, c in known[call].items() if name.lstrip("_") == case.kernel)
    return counted


def _call(case: Case) -> tuple[Launch, tuple[str, ...], bool]:
    """The op's first kernel, the switches of its call, and whether gradients are taken."""
    first = {"attention": "attention_forward", "relation": "relation_forward", "embed": "embed_forward"}
    first |= {"add": "add_layer_norm_forward", "bias": "bias_activation_forward", "column": "add_layer_norm_forward"}
    kernel = case.kernel if case.traits.work == "product" else first[case.kernel.partition("_")[0]]
    maps = case.traits.attends and not {"BIAS", "PROBS", "DPROBS"}.isdisjoint(case.flags)
    switches = [flag for flag in case.flags if flag not in _IMPLIED]
    switches += ["PROBS"] * ("DPROBS" in case.flags) + ["BIAS"] * (case.kernel == "column_sums")
    if case.activation is not None:
        switches.append(case.activation)
    gradients = not case.kernel.endswith("forward") or "NORMED" in case.flags
    return Launch(kernel, DTYPES[case.dtype], case.width, maps), tuple(sorted(switches)), gradients


def _run(launch: Launch, switches: tuple[str, ...], gradients: bool) -> None:
    sizes = FEW_ROWS if launch.kernel.startswith("feed_forward") else SIZES
    problem = checked_problem(launch, switches, sizes, torch.device("cpu"))
    gradients = gradients and problem.differentiable
    inputs = [x.detach().requires_grad_(gradients) for x in problem.inputs]
    outputs = by_kernels(problem.op)(*inputs)
    if gradients:
        torch.autograd.grad(outputs, inputs, cotangents_of(outputs))


def table(counted: dict[Case, "Counters"]) -> Table:
    """What was counted, a row for each case."""
    out = Table(title="What the kernels do on sm_80", title_justify="left", header_style="bold")
    out.add_column("case", no_wrap=True)
    for name in (*PIPES, "flops", "load", "store", "banks", "bytes"):
        out.add_column(name, justify="right", no_wrap=True)
    for case, counters in counted.items():
        loads, stores = counters.total("global", "ld"), counters.total("global", "st")
        loads.add(counters.total("global", "cp"))
        least = _least(case)
        moved = 32 * (loads.moved + stores.moved)
        cells = [f"{counters.pipes[pipe] / 1e3:.1f}" for pipe in PIPES]
        cells.append(f"{counters.tensor_flops / least.flops:.2f}" if counters.tensor_flops else "")
        cells += [f"{traffic.excess:.2f}" for traffic in (loads, stores, counters.total("shared"))]
        out.add_row(str(case), *cells, f"{moved / least.bytes:.2f}")
    return out


def _least(case: Case) -> Cost:
    rows = FEW_ROWS.rows if case.traits.work == "product" else SIZES.rows
    return cost(
        case.kernel,
        lengths=list(SIZES.ragged) if case.traits.attends else [rows],
        heads=HEADS if case.traits.attends else 1,
        width=case.width,
        dtype=case.dtype,
        flags=case.flags,
        activation=case.activation,
    )


def worst(counted: dict[Case, "Counters"], count: int = 3) -> list[str]:
    """The instructions of each case that move most above the least, in words."""
    lines = []
    for case, counters in counted.items():
        for space, unit in (("global", "sectors"), ("shared", "cycles")):
            for place, opcode, traffic in counters.worst(space, count):
                if traffic.excess >= 1.5:
                    lines.append(
                        f"{case}: {place}: {opcode}: {traffic.moved:,} {unit} for {traffic.least:,} "
                        f"({traffic.excess:.1f}x) in {traffic.requests:,} requests"
                    )
    return lines

"""A whole layer in training: the least time of its work, and the time in which its kernels' instructions can be issued.

`python -m bench.static.layer` compiles the kernels with their shipped tiles and adds them up, for batches of short,
usual and long sequences and for one sequence alone, in BERT-base and BERT-large. Nothing is timed.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from fastbert_kernels.block_passes import sums_in_kernels
from fastbert_kernels.tiles import feed_forward_start

from .assembly import MachineCode, compile_all
from .cases import BATCH, DEVICES, TARGETS, Case, launch_tiles
from .limits import FEED_FORWARD, ITEMSIZE, PEAKS, Cost, Peaks, floor
from .report import Report

DTYPE = "bfloat16"
HEAD_DIM = 64
#: Hidden size by model.
MODELS = {"base": 768, "large": 1024}
#: Sequences, and tokens of each.
BATCHES = ((1092, 30), (32, 128), (16, 512), (1, 128))

LEGEND = (
    "products: the least time of the matrix products outside the kernels, at the peak of tensor cores and copies. "
    "MB: what the kernels must move, and for short sequences the pass that sums the projections' biases. "
    "floor: the least time of that, each kernel at its own limit. "
    "issue: the time in which the kernels' instructions can be issued, at least those of one program each. "
    "slower: the sum over the kernels of the larger of the two. Microseconds of one layer, forward and backward."
)


class Call(NamedTuple):
    """A kernel's launch in a layer.

    Attributes:
        case: what is launched.
        times: how often.
    """

    case: Case
    times: int = 1


class Total(NamedTuple):
    """Of a layer's kernels: bytes that they must move, and microseconds: see `LEGEND`."""

    bytes: float
    floor: float
    issue: float
    slower: float


def calls(hidden: int, batch: tuple[int, int], fused: bool) -> list[Call]:
    """The kernels of a layer in training, with dropout, on packed sequences.

    Args:
        hidden: of the model.
        batch: sequences, and tokens of each.
        fused: whether the feed-forward block's products have the activation inside.
    """
    packed = ("CU_SEQLENS", "ORDER", "DROPOUT")
    backward = (*packed, "SUMS") if sums_in_kernels(batch[0] * batch[1], batch[0]) else packed
    intermediate = FEED_FORWARD * hidden
    activation = [
        Call(Case("bias_activation_forward", DTYPE, intermediate, ("BIAS", "THEN"), "gelu")),
        Call(Case("bias_activation_backward", DTYPE, intermediate, ("BIAS", "Y"), "gelu")),
    ]
    if fused:
        activation = [
            Call(Case("feed_forward_forward", DTYPE, hidden, ("PRE",), "gelu")),
            Call(Case("feed_forward_backward", DTYPE, hidden, activation="gelu")),
        ]
    launched = [
        Call(Case("attention_forward", DTYPE, HEAD_DIM, packed)),
        Call(Case("add_layer_norm_forward", DTYPE, hidden, ("BIAS", "RESIDUAL", "DROPOUT", "NORMED")), 2),
        *activation,
        Call(Case("add_layer_norm_backward", DTYPE, hidden, ("BIAS", "DROPOUT"))),
        Call(Case("add_layer_norm_backward", DTYPE, hidden, ("BIAS", "DROPOUT", "Y"))),
        Call(Case("attention_backward_dq", DTYPE, HEAD_DIM, backward)),
        Call(Case("attention_backward_dkv", DTYPE, HEAD_DIM, backward)),
        Call(Case("column_sums", DTYPE, hidden)),
    ]
    return [Call(dataclasses.replace(case, batch=batch), times) for case, times in launched]


def _products(hidden: int, tokens: int, fused: bool) -> Iterator[Cost]:
    """The matrix products that no kernel of ours has inside, forward and backward."""
    intermediate = FEED_FORWARD * hidden
    for features, out in ((hidden, 3 * hidden), (hidden, hidden), (hidden, intermediate), (intermediate, hidden)):
        inside = fused and intermediate in (features, out)
        # Forward, the gradient of the input, and that of the weight; a kernel has the first product of the block and
        # the gradient of what the second takes.
        count = 2 if inside else 3
        moved = tokens * features + features * out + tokens * out
        yield Cost(count * 2 * tokens * features * out, count * moved * ITEMSIZE[DTYPE], 0)


def add_up(
    target: str, machines: dict[Case, MachineCode], hidden: int, batch: tuple[int, int], peaks: Peaks, fused: bool
) -> Total:
    """All kernels of a layer on `batch` sequences of so many tokens."""
    heads, (sequences, seq) = hidden // HEAD_DIM, batch
    summed = sums_in_kernels(sequences * seq, sequences)
    moved = 0.0 if summed else 3.0 * hidden * sequences * seq * ITEMSIZE[DTYPE]
    least = slower = moved / peaks.copy * 1e6
    issue = 0.0
    for case, times in calls(hidden, batch, fused):
        cost = case.cost(heads)
        report = Report(case, target, launch_tiles(case, target), machines[_compiled(case, target)])
        of_floor, of_issue = floor(cost, peaks, DTYPE).microseconds, report.issue_of(loops=True, heads=heads)
        moved += times * cost.bytes
        least += times * of_floor
        issue += times * of_issue
        slower += times * max(of_floor, of_issue)
    return Total(moved, least, issue, slower)


def _compiled(case: Case, target: str) -> Case:
    """A case of the same machine code: where its tiles are those of the usual batch, at that."""
    usual = dataclasses.replace(case, batch=BATCH)
    return usual if launch_tiles(case, target) == launch_tiles(usual, target) else case


def _is_fused(target: str, hidden: int, tokens: int) -> bool:
    start = feed_forward_start(target, hidden)
    return start is not None and tokens >= start


def _compile(targets: list[str], workers: int | None) -> dict[str, dict[Case, MachineCode]]:
    """Of every case that is launched, by target, its machine code."""
    jobs = []
    for target in targets:
        cases = dict.fromkeys(
            _compiled(call.case, target)
            for hidden, batch in itertools.product(MODELS.values(), BATCHES)
            for call in calls(hidden, batch, _is_fused(target, hidden, batch[0] * batch[1]))
        )
        jobs += [(case, target, launch_tiles(case, target)) for case in cases]
    machines: dict[str, dict[Case, MachineCode]] = {target: {} for target in targets}
    for number, machine in compile_all(jobs, workers):
        if not isinstance(machine, MachineCode):
            raise machine
        case, target, _ = jobs[number]
        machines[target][case] = machine
    return machines


def table(machines: dict[str, dict[Case, MachineCode]]) -> Table:
    """A row for each target, model and batch."""
    names = "target", "model", "batch", "products", "MB", "floor", "issue", "slower"
    out = Table(title="A layer in training", title_justify="left", header_style="bold")
    for name in names:
        out.add_column(name, justify="left" if name in names[:3] else "right", no_wrap=True)
    for target, known in machines.items():
        peaks = PEAKS[DEVICES[target]]
        for model, hidden in MODELS.items():
            for batch, seq in BATCHES:
                fused = _is_fused(target, hidden, batch * seq)
                products = sum(floor(c, peaks, DTYPE).microseconds for c in _products(hidden, batch * seq, fused))
                total = add_up(target, known, hidden, (batch, seq), peaks, fused)
                cells = products, total.bytes / 1e6, total.floor, total.issue, total.slower
                about = f"{batch:,} x {seq}" + (" fused" if fused else "")
                out.add_row(target, model, about, *(f"{cell:.1f}" for cell in cells))
        out.add_section()
    return out


def main(
    target: Annotated[list[str] | None, typer.Option(help="Instead of sm_80, sm_90, sm_100; may be repeated.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that compile; default one for every CPU.")] = None,
) -> None:
    """Print the sums."""
    known = [name for name in TARGETS if name.startswith("sm_")]
    targets = target or ["sm_80", "sm_90", "sm_100"]
    if unknown := [name for name in targets if name not in known]:
        raise typer.BadParameter(f"unknown target {', '.join(unknown)}: there are {', '.join(known)}")
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a line for each row, in a file or a pipe
    console.print(table(_compile(targets, workers)))
    console.print(LEGEND)


if __name__ == "__main__":
    typer.run(main)

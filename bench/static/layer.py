"""A whole layer in training: the least time of its work, and the time in which its kernels' instructions can be issued.

`python -m bench.static.layer` compiles the kernels with their shipped tiles and adds them up, for batches of short,
usual and long sequences and for one sequence alone, in BERT-base and BERT-large. Nothing is timed.
"""

from collections.abc import Iterator
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from fastbert_kernels.block_passes import sums_in_kernels
from fastbert_kernels.tiles import feed_forward_start

from .assembly import MachineCode, compile_all
from .cases import DEVICES, TARGETS, Case, launch_tiles
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
    "issue: the time in which the busiest multiprocessor can issue the kernels' instructions. "
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


def calls(hidden: int, fused: bool, summed: bool) -> list[Call]:
    """The kernels of a layer in training, with dropout, on packed sequences.

    Args:
        hidden: of the model.
        fused: whether the feed-forward block's products have the activation inside.
        summed: whether the backward kernels of attention sum the gradients of the projections' biases.
    """
    packed = ("CU_SEQLENS", "ORDER", "DROPOUT")
    backward = (*packed, "SUMS") if summed else packed
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
    return [
        Call(Case("attention_forward", DTYPE, HEAD_DIM, packed)),
        Call(Case("add_layer_norm_forward", DTYPE, hidden, ("BIAS", "RESIDUAL", "DROPOUT", "NORMED")), 2),
        *activation,
        Call(Case("add_layer_norm_backward", DTYPE, hidden, ("BIAS", "DROPOUT"))),
        Call(Case("add_layer_norm_backward", DTYPE, hidden, ("BIAS", "DROPOUT", "Y"))),
        Call(Case("attention_backward_dq", DTYPE, HEAD_DIM, backward)),
        Call(Case("attention_backward_dkv", DTYPE, HEAD_DIM, backward)),
        Call(Case("column_sums", DTYPE, hidden)),
    ]


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


def add_up(reports: dict[Case, Report], hidden: int, batch: tuple[int, int], peaks: Peaks, fused: bool) -> Total:
    """All kernels of a layer on `batch` sequences of so many tokens."""
    lengths, heads = [batch[1]] * batch[0], hidden // HEAD_DIM
    summed = sums_in_kernels(sum(lengths), len(lengths))
    moved = 0.0 if summed else 3.0 * hidden * sum(lengths) * ITEMSIZE[DTYPE]
    least = slower = moved / peaks.copy * 1e6
    issue = 0.0
    for case, times in calls(hidden, fused, summed):
        cost, report = case.cost(lengths, heads), reports[case]
        programs, issued = report.instructions(lengths, heads)
        # Of programs that are all alike the busiest multiprocessor has as many as any, rounded up.
        busiest = -(-programs // peaks.multiprocessors) * issued / programs
        of_floor, of_issue = floor(cost, peaks, DTYPE).microseconds, busiest / (4 * peaks.clock) * 1e6
        moved += times * cost.bytes
        least += times * of_floor
        issue += times * of_issue
        slower += times * max(of_floor, of_issue)
    return Total(moved, least, issue, slower)


def _is_fused(target: str, hidden: int, tokens: int) -> bool:
    start = feed_forward_start(target, hidden)
    return start is not None and tokens >= start


def _compile(targets: list[str], workers: int | None) -> dict[str, dict[Case, Report]]:
    """A report of every case that is launched, by target."""
    jobs = []
    for target in targets:
        ways = {
            (hidden, _is_fused(target, hidden, batch * seq), sums_in_kernels(batch * seq, batch))
            for hidden in MODELS.values()
            for batch, seq in BATCHES
        }
        cases = dict.fromkeys(call.case for way in sorted(ways) for call in calls(*way))
        jobs += [(case, target, launch_tiles(case, target)) for case in cases]
    reports: dict[str, dict[Case, Report]] = {target: {} for target in targets}
    for number, machine in compile_all(jobs, workers):
        if not isinstance(machine, MachineCode):
            raise machine
        case, target, tiles = jobs[number]
        reports[target][case] = Report(case, target, tiles, machine)
    return reports


def table(reports: dict[str, dict[Case, Report]]) -> Table:
    """A row for each target, model and batch."""
    names = "target", "model", "batch", "products", "MB", "floor", "issue", "slower"
    out = Table(title="A layer in training", title_justify="left", header_style="bold")
    for name in names:
        out.add_column(name, justify="left" if name in names[:3] else "right", no_wrap=True)
    for target, known in reports.items():
        peaks = PEAKS[DEVICES[target]]
        for model, hidden in MODELS.items():
            for batch, seq in BATCHES:
                fused = _is_fused(target, hidden, batch * seq)
                products = sum(floor(c, peaks, DTYPE).microseconds for c in _products(hidden, batch * seq, fused))
                total = add_up(known, hidden, (batch, seq), peaks, fused)
                cells = products, total.bytes / 1e6, total.floor, total.issue, total.slower
                about = f"{batch:,} x {seq}" + (" fused" if fused else "")
                out.add_row(target, model, about, *(f"{cell:.1f}" for cell in cells))
        out.add_section()
    return out


def main(
    target: Annotated[list[str] | None, typer.Option(help="Only this NVIDIA target; may be repeated.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that compile; default one for every CPU.")] = None,
) -> None:
    """Print the sums."""
    known = [name for name in TARGETS if name.startswith("sm_")]
    targets = target or known
    if unknown := [name for name in targets if name not in known]:
        raise typer.BadParameter(f"unknown target {', '.join(unknown)}: there are {', '.join(known)}")
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a line for each row, in a file or a pipe
    console.print(table(_compile(targets, workers)))
    console.print(LEGEND)


if __name__ == "__main__":
    typer.run(main)

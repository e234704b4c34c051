"""Small calls of an op on a device, forward and backward: are they right, and the same each time?

    python -m bench.gpu.calls "attention bfloat16" --device cuda:0

prints a line of JSON for each call. A process for each group, so that `compute-sanitizer` can watch one, and an illegal
access ends nothing else. Results are held against the definition in float64; their errors, relative to the largest
value, may be twice those of the definition in the working dtype and a few roundings. Each call runs twice and must give
the same bits: there is no atomic operation and no race. The last call of a group has the programs of a model's batch,
three runs and no definition.
"""

import dataclasses
import json
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from fastbert.tuning.neighbours import shipped_tiles
from fastbert.tuning.problems import Problem, Sizes, Switches, by_kernels, checked_problem, cotangents_of, timed_problem
from fastbert_kernels.backend import arch
from fastbert_kernels.catalogue import KERNELS, SHORT, Launch
from fastbert_kernels.tuned import Table, in_force

#: Group -> the launches that are called, the width of each, whether there are maps, and the switches of its calls.
_GROUPS: dict[str, tuple[tuple[str, ...], int, bool, tuple[Switches, ...]]] = {
    "attention": (
        ("attention_forward",),
        64,
        False,
        (
            ("CU_SEQLENS", "HEAD_MASK", "DROPOUT"),
            ("CU_SEQLENS",),
            ("KEY_SPANS", "DROPOUT"),
            ("CU_SEQLENS", "DROPOUT", "FLAT"),
        ),
    ),
    "attention with maps": (
        ("attention_forward",),
        64,
        True,
        (
            ("CU_SEQLENS", "PROBS", "DROPOUT"),
            ("BIAS", "HEAD_MASK"),
            ("CU_SEQLENS", "COLUMNS", "BIAS", "PROBS"),
            ("KEY_SPANS", "PROBS"),
        ),
    ),
    "add_layer_norm": (
        ("add_layer_norm_forward",),
        768,
        False,
        (("BIAS", "RESIDUAL", "DROPOUT"), ("BIAS", "RESIDUAL"), ()),
    ),
    "embed": (("embed_forward",), 768, False, (("WORD_TABLE", "DROPOUT"), ())),
    "bias_activation": (
        ("bias_activation_forward",),
        3072,
        False,
        (("BIAS", "gelu"), ("BIAS", "gelu_tanh"), ("silu",), ("BIAS", "relu")),
    ),
    "feed_forward": (("feed_forward_forward", "feed_forward_backward"), 768, False, (("gelu",), ("PRE", "gelu"))),
    "relation": (("relation_forward",), 64, False, (("CU_SEQLENS", "SOFTMAX"), ("CU_SEQLENS",))),
}
_DTYPES = (torch.bfloat16, torch.float32, torch.float16)

#: By name, "OP DTYPE": first the dtype that is timed.
GROUPS = tuple(f"{name} {str(dtype).removeprefix('torch.')}" for dtype in _DTYPES for name in _GROUPS)

#: Where every launch costs much: in a sanitizer, and in the interpreter.
SMALL = Sizes(lengths=(33,), tokens=132, heads=2, ragged=(1, 17, 65), even=(33, 33), rows=70, vocabulary=90)
#: Enough programs to fill a GPU a few times.
MANY = Sizes(lengths=(512,), tokens=16384)

#: What an error may be beside twice the definition's own: for outputs and gradients in float32, else in roundings.
_FLOAT32_SLACK, _ROUNDINGS = (1e-5, 1e-4), 4


@dataclasses.dataclass(frozen=True)
class CallRow:
    """One call.

    Attributes:
        group, call: what was called: the op and its dtype, and the switches.
        error, bound: the error that is largest beside its bound; None where nothing was compared.
        same: whether the runs gave the same bits.
        problem: what is wrong; None when nothing is.
    """

    group: str
    call: str
    error: float | None = None
    bound: float | None = None
    same: bool | None = None
    problem: str | None = None


def check(group: str, device: torch.device, sizes: Sizes, many: Sizes, definition: bool) -> list[CallRow]:
    """Make the calls of a group.

    Args:
        group: one of `GROUPS`.
        device: where.
        sizes: of the calls that are held against the definition.
        many: of the last call.
        definition: whether to compare at all: not under a sanitizer, which would watch that, too.
    """
    name, _, dtype = group.rpartition(" ")
    launches, width, maps, calls = _GROUPS[name]
    rows = []
    for kernel in launches:
        launch = Launch(kernel, getattr(torch, dtype), width, maps)
        fitting = [on for on in calls if not (kernel == "feed_forward_backward" and "PRE" in on)]
        with in_force(device, _tiles_of_long_sequences(launch, device)):
            for on in fitting:
                rows.append(_row(group, launch, on, checked_problem(launch, on, sizes, device), 2, definition))
        if launch.traits.op == "attention":
            short = _row(group, launch, fitting[0], checked_problem(launch, fitting[0], sizes, device), 2, definition)
            rows.append(dataclasses.replace(short, call=f"{short.call}, tiles of short sequences"))
        on = tuple(x for x in fitting[0] if x not in ("COLUMNS", "HEAD_MASK")) + ("FROZEN",) * (name == "embed")
        length = many.lengths[0]
        rows.append(_row(group, launch, on, timed_problem(launch, on, length, many, device), 3, definition=False))
    return rows


def _tiles_of_long_sequences(launch: Launch, device: torch.device) -> Table:
    """The shipped tiles of long sequences for short ones, too, whose own a small call would have."""
    if launch.traits.op != "attention":
        return {}
    names = [kernel.name for kernel in KERNELS.values() if kernel.op == "attention"]
    table: Table = {}
    for long in (launch._replace(kernel=name) for name in names):
        table |= {long._replace(up_to=up_to): shipped_tiles(long, arch(device)) for up_to in (*SHORT, None)}
    return table


def _row(group: str, launch: Launch, on: Switches, problem: Problem, runs: int, definition: bool) -> CallRow:
    direction = f"{launch.traits.step} " if launch.traits.op == "feed_forward" else ""
    row = CallRow(group, f"{direction}{'+'.join(on).lower() or 'no switch'}{'' if runs == 2 else ', many programs'}")
    try:
        first = _results(problem, problem.inputs[0].dtype, kernels=True)
        others = (_results(problem, problem.inputs[0].dtype, kernels=True) for _ in range(runs - 1))
        same = all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
        row = dataclasses.replace(row, same=same, problem=None if same else "two runs differ: a race")
        if not all(bool(x.isfinite().all()) for x in first):
            return dataclasses.replace(row, problem="not finite")
        return _compared(row, problem, first) if definition else row
    except Exception as failure:  # the calls after it still tell something, if the device can
        return dataclasses.replace(row, problem=f"{type(failure).__name__}: {failure}"[:300])


def _compared(row: CallRow, problem: Problem, got: list[Tensor]) -> CallRow:
    dtype = problem.inputs[0].dtype
    truth = _results(problem, torch.float64)
    plain = _results(problem, dtype)
    outputs = len(truth) - (len(problem.inputs) if problem.differentiable else 0)
    worst = 0.0
    for i, (mine, theirs, true) in enumerate(zip(got, plain, truth, strict=True)):
        slack = _FLOAT32_SLACK[i >= outputs] if dtype == torch.float32 else _ROUNDINGS * torch.finfo(dtype).eps
        error, bound = _error(mine, true), 2 * _error(theirs, true) + slack
        if not error <= bound:
            what = f"output {i}" if i < outputs else f"gradient {i - outputs}"
            return dataclasses.replace(row, error=error, bound=bound, problem=f"{what} is wrong")
        if error / bound >= worst:
            worst = error / bound
            row = dataclasses.replace(row, error=error, bound=bound)
    return row


def _results(problem: Problem, dtype: torch.dtype, kernels: bool = False) -> list[Tensor]:
    """Outputs and gradients: of the definition in some dtype, or of the kernels."""
    op = by_kernels(problem.op) if kernels else problem.definition
    leaves = [x.detach().to(dtype).requires_grad_(problem.differentiable) for x in problem.inputs]
    outputs = op(*leaves)
    if not problem.differentiable:
        return list(outputs)
    gradients: Any = torch.autograd.grad(outputs, leaves, cotangents_of(outputs))
    return [y.detach() for y in outputs] + list(gradients)


def _error(got: Tensor, truth: Tensor) -> float:
    """Largest difference over the truth's largest value."""
    largest = truth.abs().max() if truth.any() else 1.0
    return float(((got.double() - truth).abs().max() / largest).item())


def main(
    group: Annotated[list[str], typer.Argument(help="OP DTYPE in one word, such as 'attention bfloat16'.")],
    device: Annotated[str, typer.Option(help="Where: cuda:N, or cpu in Triton's interpreter.")] = "cuda:0",
    small: Annotated[bool, typer.Option("--small", help="As few programs as have every kind of edge.")] = False,
    definition: Annotated[bool, typer.Option(help="Compare with plain PyTorch.")] = True,
) -> None:
    """Print a line of JSON for each call. Exit code 1: something was wrong; 2: there is no such group."""
    if unknown := [name for name in group if name not in GROUPS]:
        typer.echo(f"error: unknown group {unknown[0]!r}: choose from {', '.join(GROUPS)}", err=True)
        raise typer.Exit(2)
    right = True
    sizes, many = (SMALL, SMALL) if small else (Sizes(), MANY)
    for name in group:
        for row in check(name, torch.device(device), sizes, many, definition):
            right &= row.problem is None
            print(json.dumps(dataclasses.asdict(row)), flush=True)
    raise typer.Exit(0 if right else 1)


if __name__ == "__main__":
    typer.run(main)

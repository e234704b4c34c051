"""The tiles of each launch timed beside its neighbours: kept are those that are right, and faster twice."""

import datetime
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastbert.benchmark.timing import Run, Times, interleaved
from fastbert_kernels.backend import arch
from fastbert_kernels.catalogue import SHORT, Launch, Tiles, dtype_name
from fastbert_kernels.tuned import Table, in_force

from .neighbours import neighbours, shipped_tiles
from .problems import (
    COMPILED,
    Problem,
    Sizes,
    Switches,
    all_switches,
    by_kernels,
    checked_problem,
    cotangents_of,
    lengths_of,
    timed_problem,
    timed_switches,
)

#: Times of runs by name, like `timing.interleaved`.
Timer = Callable[[Mapping[str, Run], torch.device], dict[str, Times]]

#: How much faster other tiles must be.
MARGIN = 0.03

#: What a bound adds to twice the shipped tiles' own error, relative to the largest value.
FLOOR = 1e-5

#: In units of the dtype's rounding: an error of the shipped tiles that is no rounding any more.
_ROUNDINGS = 16

#: The rounding of TF32.
_TF32_EPS = 2.0**-10

#: How many of those that led the first round are tried in the second.
_LEADERS = 3


@dataclass(frozen=True)
class Shape:
    """A timed call.

    Attributes:
        name: for people.
        between: what was timed, for people: as shipped, and the best other.
        shipped, best: the times of both, of one interleaved run.
        kept: whether the other takes the place of what is shipped.
    """

    name: str
    between: tuple[str, str]
    shipped: Times
    best: Times
    kept: bool = False

    def entry(self) -> dict[str, Any]:
        """The same in a file."""
        return {
            "shape": self.name,
            "between": list(self.between),
            "shipped_us": round(1e6 * self.shipped.median, 3),
            "tuned_us": round(1e6 * self.best.median, 3),
            "kept": self.kept,
        }


@dataclass
class Outcome:
    """What measuring a launch gave.

    Attributes:
        launch: the launch.
        shipped: the package's own tiles.
        best: the fastest of the other tiles that were right; None where there was none.
        kept: whether `best` takes the place of the shipped ones.
        shapes: the timed calls, none where nothing was timed.
        refused: other tiles that were not timed or not kept though fast, each with the reason.
        tried: how many other tiles there were.
    """

    launch: Launch
    shipped: Tiles
    best: Tiles | None = None
    kept: bool = False
    shapes: list[Shape] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    tried: int = 0

    @property
    def as_shipped(self) -> str:
        """The shipped tiles, for people."""
        return words(self.shipped)

    def entry(self) -> dict[str, Any]:
        """What `tuned.write` takes of kept tiles."""
        return {
            "kernel": self.launch.kernel,
            "dtype": dtype_name(self.launch.dtype),
            "width": self.launch.width,
            "maps": self.launch.maps,
            "up_to": self.launch.up_to,
            "tf32": self.launch.tf32,
            "tiles": self.best,
            "shipped": self.shipped,
            "date": now(),
            "shapes": [shape.entry() for shape in self.shapes],
        }


def now() -> str:
    """The time of an entry."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def words(tiles: Tiles) -> str:
    """Tiles for people, and for keys."""
    return "{BLOCK_M}x{BLOCK_N}, {num_warps} warps, {num_stages} stages".format(**tiles)


def flushed(runs: Mapping[str, Run], device: torch.device, seconds: float = 1.0) -> dict[str, Times]:
    """The GPU's own time of each run, with nothing of its own in the L2 cache."""
    return interleaved(runs, device, seconds=seconds, rounds=(7, 100), flush=True)


def tune(
    launches: Iterable[Launch],
    device: torch.device,
    *,
    sizes: Sizes | None = None,
    candidates: Callable[[Launch, str, Tiles], list[Tiles]] = neighbours,
    timer: Timer = flushed,
    margin: float = MARGIN,
    table: Table | None = None,
    tell: Callable[[str], object] = lambda message: None,
) -> Iterator[Outcome]:
    """Measure launches one after the other; what is kept of one is in force for the next.

    Other tiles are kept when they compile without spills, err at most twice as much as the shipped ones against
    float64, forward and backward, in every kind of call they serve, dropout masks included, and are faster in two
    separate rounds: by `margin` and by more than the 20-80% spread on the geometric mean of the shapes, and slower in
    none.

    Args:
        launches: what to measure.
        device: where, with an index.
        sizes: of the calls.
        candidates: the tiles to try, by launch, target and shipped tiles.
        timer: what times them.
        margin: how much faster other tiles must be, as a share.
        table: what is in force before, brought up to date as launches are done; default empty.
        tell: called with what is going on, for people.
    """
    table = {} if table is None else table
    spills: dict[Any, int] = {}
    for launch in launches:
        outcome = Subject(launch, device, table, spills, sizes or Sizes(), timer, margin, tell).measure(candidates)
        table.pop(launch, None)
        if outcome.kept and outcome.best is not None:
            table[launch] = outcome.best
        yield outcome


class Subject:
    """One launch under measurement."""

    def __init__(
        self,
        launch: Launch,
        device: torch.device,
        table: Table,
        spills: dict[Any, int],
        sizes: Sizes,
        timer: Timer,
        margin: float,
        tell: Callable[[str], object],
    ) -> None:
        self.launch, self.device, self.table, self.spills, self.sizes = launch, device, table, spills, sizes
        self.timer, self.margin, self.tell = timer, margin, tell
        self.target = arch(device)
        self.shipped = shipped_tiles(launch, self.target)
        self.backward = launch.traits.backward
        self._truths: dict[Switches, tuple[list[Tensor], list[float]]] = {}

    def measure(self, candidates: Callable[[Launch, str, Tiles], list[Tiles]]) -> Outcome:
        others = candidates(self.launch, self.target, self.shipped)
        outcome = Outcome(self.launch, self.shipped, tried=len(others))
        try:
            self._measure(others, outcome)
        except Exception as failure:  # one launch that cannot be measured is a line, not the end of the run
            outcome = Outcome(self.launch, self.shipped, tried=len(others))
            outcome.refused.append(f"the shipped {words(self.shipped)}: {reason_of(failure)}")
        return outcome

    def _measure(self, others: list[Tiles], outcome: Outcome) -> None:
        self.shipped_errors(self.first)
        right = []
        for number, tiles in enumerate(others, 1):
            self.tell(f"{self.launch}: checking {number} of {len(others)}")
            if (problem := self.problem(tiles, [self.first])) is None:
                right.append(tiles)
            else:
                outcome.refused.append(f"{words(tiles)}: {problem}")
        if not right:
            return
        self.tell(f"{self.launch}: timing {len(right)}")
        first = self.times(right, outcome)
        ranked = sorted((x for x in right if words(x) in first), key=lambda x: _ratio(first[words(x)]))
        for tiles in [x for x in ranked if faster(first[words(x)], self.margin)][:_LEADERS]:
            self.tell(f"{self.launch}: confirming {words(tiles)}")
            if problem := self.problem(tiles, all_switches(self.launch)):
                outcome.refused.append(f"{words(tiles)}: {problem}")
                continue
            second = self.times([tiles], outcome).get(words(tiles))
            if second is None or not faster(second, self.margin):
                outcome.refused.append(f"{words(tiles)}: faster in one round, not in another")
                continue
            outcome.best, outcome.kept = tiles, True
            outcome.shapes = [replace(shape, kept=True) for shape in second]
            return
        # What led and was refused must not be shown as if it could have been had.
        refused = {line.partition(": ")[0] for line in outcome.refused}
        for tiles in [x for x in ranked if words(x) not in refused][:1]:
            outcome.best, outcome.shapes = tiles, first[words(tiles)]

    @property
    def first(self) -> Switches:
        """The call that every candidate is checked by before it is timed: the last timed, which draws dropout."""
        return tuple(x for x in timed_switches(self.launch)[-1] if x != "FROZEN")

    def _under(self, tiles: Tiles) -> Any:
        """A block in which this launch has these tiles, the others what the table says, or else the shipped."""
        # A checked call is small: whatever class of lengths its grid is in, it has these tiles.
        classes = [self.launch._replace(up_to=up_to) for up_to in (*SHORT, None)]
        return in_force(self.device, self.table | dict.fromkeys(classes, tiles))

    def problem(self, tiles: Tiles, calls: list[Switches]) -> str | None:
        """Why tiles cannot be used, None when they can."""
        for on in calls:
            try:
                truth, bounds = self.shipped_errors(on)
                before = loaded(self.launch.kernel)
                with self._under(tiles):
                    got = results_of(checked_problem(self.launch, on, self.sizes, self.device), truth=False)
                if spills := self._spills(tiles, on, before):
                    return f"spills {spills} registers with {_named(on)}"
                for error, bound in zip(errors_of(got, truth), bounds, strict=True):
                    if not error <= bound:
                        return f"wrong with {_named(on)}: its error {error:.1e} is over {bound:.1e}"
            except Exception as failure:  # what does not fit the device fails in its own way
                return f"failed with {_named(on)}: {reason_of(failure)}"
        return None

    def _spills(self, tiles: Tiles, on: Switches, before: Mapping[int, Any]) -> int:
        """Registers that a call spilled, whose kernel was compiled since `before`, or for an earlier launch."""
        heads = self.launch.width if self.launch.traits.attends else None
        key = self.launch.kernel, self.launch.dtype, heads, words(tiles), on
        new = [x for name, x in loaded(self.launch.kernel).items() if name not in before]
        self.spills[key] = max([self.spills.get(key, 0), *(getattr(x, "n_spills", None) or 0 for x in new)])
        return self.spills[key]

    def shipped_errors(self, on: Switches) -> tuple[list[Tensor], list[float]]:
        """What float64 gives for a call, and how far other tiles may be from it.

        Raises:
            ValueError: when the shipped tiles themselves are wrong.
        """
        if on not in self._truths:
            problem = checked_problem(self.launch, on, self.sizes, self.device)
            truth = results_of(problem, truth=True)
            with self._under(self.shipped):
                errors = errors_of(results_of(problem, truth=False), truth)
            rounding = _TF32_EPS if self.launch.tf32 else torch.finfo(self.launch.dtype).eps
            limit = max(_ROUNDINGS * rounding, 1e-4)
            if not all(error <= limit for error in errors):
                raise ValueError(f"wrong with {_named(on)}: the error of the shipped tiles is {max(errors):.1e}")
            self._truths[on] = truth, [2 * error + FLOOR for error in errors]
        return self._truths[on]

    def times(self, others: list[Tiles], outcome: Outcome) -> dict[str, list[Shape]]:
        """Times of each of these tiles in every shape. One that fails is left out, and told in the outcome."""
        found: dict[str, list[Shape]] = {words(tiles): [] for tiles in others}
        lengths = lengths_of(self.launch, self.sizes.lengths)
        for on in timed_switches(self.launch):
            for length in lengths:
                problem = timed_problem(self.launch, on, length, self.sizes, self.device)
                with self._under(self.shipped):
                    run = run_of(problem, self.backward)
                runs: dict[str, Run] = {}
                runs[words(self.shipped)] = functools.partial(self._run_under, self.shipped, run)
                runs[words(self.shipped)]()
                for tiles in [x for x in others if words(x) in found]:
                    runs[words(tiles)] = functools.partial(self._run_under, tiles, run)
                    try:
                        runs[words(tiles)]()
                    except Exception as failure:
                        del runs[words(tiles)], found[words(tiles)]
                        outcome.refused.append(f"{words(tiles)}: failed with {_named(on)}: {reason_of(failure)}")
                times = self.timer(runs, self.device)
                name = _shape_name(self.launch, on, length, self.sizes)
                shipped = words(self.shipped)
                for key, shapes in found.items():
                    shapes.append(Shape(name, (shipped, key), times[shipped], times[key]))
        return found

    def _run_under(self, tiles: Tiles, run: Run) -> None:
        with self._under(tiles):
            run()


def faster(shapes: list[Shape], margin: float) -> bool:
    """Whether the other is, by the margin and more than the spread on the geometric mean, and slower in no shape."""
    slow_against_quick = _geometric_mean([x.best.q80 / x.shipped.q20 for x in shapes])
    return (
        _ratio(shapes) <= 1 - margin
        and slow_against_quick < 1
        and all(x.best.median <= x.shipped.median for x in shapes)
    )


def _ratio(shapes: list[Shape]) -> float:
    return _geometric_mean([x.best.median / x.shipped.median for x in shapes])


def _geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def results_of(problem: Problem, truth: bool) -> list[Tensor]:
    """Outputs of a call and gradients of its inputs: the definition's in float64, or the kernels'."""
    leaves = [x.detach().to(torch.float64 if truth else x.dtype) for x in problem.inputs]
    for leaf in leaves:
        leaf.requires_grad_(problem.differentiable)
    outputs = problem.definition(*leaves) if truth else by_kernels(problem.op)(*leaves)
    if not problem.differentiable:
        return list(outputs)
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, leaves, cotangents_of(outputs)))


def errors_of(got: list[Tensor], truth: list[Tensor]) -> list[float]:
    """The largest difference of each result, over the truth's largest value. NaN where there is one."""
    return [
        ((g.double() - t).abs().max() / (t.abs().max() if t.any() else 1.0)).item() if t.numel() else 0.0
        for g, t in zip(got, truth, strict=True)
    ]


def run_of(problem: Problem, backward: bool) -> Run:
    """What is timed of a call: its forward pass, or its backward pass alone."""
    op = by_kernels(problem.op)
    if not (backward and problem.differentiable):

        def forward() -> None:
            with torch.no_grad():
                op(*problem.inputs)

        return forward
    leaves = [x.detach().requires_grad_() for x in problem.inputs]
    outputs = op(*leaves)
    cotangents = cotangents_of(outputs)
    return lambda: torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)


def loaded(kernel: str) -> dict[int, Any]:
    """What Triton has compiled of a kernel in this process, by id; nothing in the interpreter."""
    return compiled_of(COMPILED[kernel])


def compiled_of(kernel: Any) -> dict[int, Any]:
    """`loaded`, of a kernel itself, which need not be one of the package's."""
    caches = getattr(kernel, "device_caches", {})
    return {id(compiled): compiled for cache in caches.values() for compiled in cache[0].values()}


def _shape_name(launch: Launch, on: Switches, length: int, sizes: Sizes) -> str:
    kind = ", dropout" if "DROPOUT" in on else ", training" if "PRE" in on else ""
    if launch.traits.attends:
        return f"{max(1, sizes.tokens // length)} x {length}, {sizes.heads} heads{kind}"
    return f"{sizes.tokens} rows{kind}"


def _named(on: Switches) -> str:
    return "+".join(on).lower() or "no switch"


def reason_of(failure: BaseException) -> str:
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0] if lines else ''}"[:200]

"""Both ways of the feed-forward block's products timed beside each other: from how many tokens on they are fused."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastbert.benchmark.timing import Run
from fastbert_kernels.backend import arch
from fastbert_kernels.catalogue import Product, dtype_name
from fastbert_kernels.tiles import feed_forward_start
from fastbert_kernels.tuned import Table, in_force

from .problems import Problem, Sizes, by_kernels, cotangents_of, feed_forward_problem
from .tuner import FLOOR, MARGIN, Shape, Timer, errors_of, faster, flushed, now, reason_of, results_of

#: How often the tokens of a timed call are halved, at most.
_HALVINGS = 5


@dataclass
class Choice:
    """What measuring a product gave.

    Attributes:
        launch: the product.
        shipped: the number of tokens from which on it is fused by the package's own table, None for never.
        start: the same by measurement, or as shipped where nothing else was better.
        kept: whether `start` takes the place of the shipped one.
        shapes: the timed calls, from most tokens on down to where cuBLAS's product is in force.
        refused: why nothing was measured, or what was faster once only.
    """

    launch: Product
    shipped: int | None
    start: int | None
    kept: bool = False
    shapes: list[Shape] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    @property
    def as_shipped(self) -> str:
        """The shipped choice, for people."""
        return start_words(self.shipped)

    def __str__(self) -> str:
        ours = f", shipped {start_words(self.shipped)}" if self.kept else " as shipped"
        return f"{self.launch}: {start_words(self.start)}{ours}"

    def entry(self) -> dict[str, Any]:
        """What `tuned.write` takes of a choice that is kept."""
        return {
            "kernel": self.launch.kernel,
            "dtype": dtype_name(self.launch.dtype),
            "width": self.launch.hidden,
            "activation": self.launch.activation,
            "fused_from": self.start,
            "shipped": self.shipped,
            "date": now(),
            "shapes": [shape.entry() for shape in self.shapes],
        }


def start_words(start: int | None) -> str:
    """A number of tokens from which on products are fused, for people."""
    return "never fused" if start is None else f"fused from {start} tokens on"


def choose(
    products: Iterable[Product],
    device: torch.device,
    *,
    sizes: Sizes | None = None,
    timer: Timer = flushed,
    margin: float = MARGIN,
    table: Table | None = None,
    tell: Callable[[str], object] = lambda message: None,
) -> Iterator[Choice]:
    """Time the products both ways: fused, and by cuBLAS with `bias_activation` after it.

    At `sizes.tokens`, at half of them and so on, in inference and in training, the way that is not the shipped one must
    be faster twice, as `tune` asks of tiles. Products are fused from the fewest tokens on at which they are at all
    larger ones too; what holds at `sizes.tokens` holds beyond. Fused ones must err at most twice as much as the others.

    Args:
        products: what to measure.
        device, sizes, timer, margin, table, tell: as of `tune`; the tiles in `table` are what both ways run with.
    """
    table = {} if table is None else table
    for product in products:
        shipped = feed_forward_start(arch(device), product.hidden)
        choice = Choice(product, shipped, shipped)
        try:
            with in_force(device, table):
                _measure(choice, device, sizes or Sizes(), timer, margin, tell)
        except Exception as failure:  # a way that cannot be measured is a line, not the end of the run
            choice = Choice(product, shipped, shipped, refused=[reason_of(failure)])
        table.pop(product, None)
        if choice.kept:
            table[product] = choice.start
        yield choice


def _measure(
    choice: Choice, device: torch.device, sizes: Sizes, timer: Timer, margin: float, tell: Callable[[str], object]
) -> None:
    tell(f"{choice.launch}: checking")
    if problem := _wrong(choice.launch, device, sizes):
        choice.refused.append(problem)
        return
    start = None
    for count in dict.fromkeys(sizes.tokens >> halvings for halvings in range(_HALVINGS + 1)):
        if count == 0:
            break
        tell(f"{choice.launch}: timing {count} tokens")
        ships_fused = choice.shipped is not None and count >= choice.shipped
        shapes = _times(choice.launch, count, ships_fused, device, timer)
        switched = False
        if faster(shapes, margin):
            shapes = _times(choice.launch, count, ships_fused, device, timer)
            switched = faster(shapes, margin)
            if not switched:
                choice.refused.append(f"{count} tokens: {shapes[0].between[1]} in one round, not in another")
        choice.shapes += [replace(shape, kept=switched) for shape in shapes]
        choice.kept |= switched
        if ships_fused == switched:  # cuBLAS
            break
        start = count
    if choice.kept:
        choice.start = start


def _wrong(product: Product, device: torch.device, sizes: Sizes) -> str | None:
    """Why the fused way cannot be had, None when it can."""
    problem, fused = (feed_forward_problem(product, way, sizes.rows, device) for way in (False, True))
    truth = results_of(problem, truth=True)
    bounds = [2 * error + FLOOR for error in errors_of(results_of(problem, truth=False), truth)]
    for error, bound in zip(errors_of(results_of(fused, truth=False), truth), bounds, strict=True):
        if not error <= bound:
            return f"fused products are wrong: their error {error:.1e} is over {bound:.1e}"
    return None


def _times(product: Product, count: int, ships_fused: bool, device: torch.device, timer: Timer) -> list[Shape]:
    """Times of both ways, in inference and in training."""
    shapes = []
    between = ("fused", "cuBLAS") if ships_fused else ("cuBLAS", "fused")
    for training in (False, True):
        runs = {way: _run(feed_forward_problem(product, way == "fused", count, device), training) for way in between}
        for run in runs.values():
            run()
        times = timer(runs, device)
        name = f"{count} rows{', training' if training else ''}"
        shapes.append(Shape(name, between, times[between[0]], times[between[1]]))
    return shapes


def _run(problem: Problem, training: bool) -> Run:
    """The forward pass, in training with the backward pass."""
    op = by_kernels(problem.op)
    leaves = [x.requires_grad_(training) for x in problem.inputs]
    if not training:
        return lambda: op(*leaves)
    cotangents = cotangents_of(op(*leaves))
    return lambda: torch.autograd.grad(op(*leaves), leaves, cotangents)

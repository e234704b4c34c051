"""What time and memory grow with, as pictures of committed results."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbert.benchmark.contenders import CONTENDERS
from fastbert.benchmark.measure import Row
from fastbert.benchmark.plots import COLOURS, FAINT, INK, tidy, write_heading
from fastbert.benchmark.results import Group
from fastbert.figures import new_figure, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
#: Inches of a character of the labels.
_CHARACTER = 0.055


@dataclass(frozen=True)
class Panel:
    """One diagram of a quantity, for one model, dtype and task.

    Attributes:
        title: which.
        points: contender -> (x, y, what it is a point of).
    """

    title: str
    points: dict[str, list[tuple[float, float, str]]]


def time_panels(groups: Iterable[Group]) -> list[Panel]:
    """Milliseconds against tokens, where a model, dtype and task has several numbers of tokens. With the floors."""
    return _panels(
        groups,
        lambda row: row.tokens,
        lambda row: None if row.times is None else 1e3 * row.times.median,
        with_floor=True,
    )


def memory_panels(groups: Iterable[Group]) -> list[Panel]:
    """KiB at the peak for each token against sequence length, where there are several lengths."""
    return _panels(groups, lambda row: row.seq, lambda row: row.peak_bytes and row.peak_bytes / row.tokens / 1024)


def _panels(
    groups: Iterable[Group],
    x: Callable[[Row], float],
    y: Callable[[Row], float | None],
    *,
    with_floor: bool = False,
) -> list[Panel]:
    kinds: dict[str, dict[str, list[tuple[float, float, str]]]] = {}
    for row in (row for group in groups for row in group.rows):
        maps = " with attention maps" if row.attentions else ""
        points = kinds.setdefault(f"{row.model}, {row.dtype}: {row.task}{maps}", {})
        value = y(row)
        if value:
            points.setdefault(row.contender, []).append((x(row), value, row.workload))
        if with_floor and row.floor and row.contender == "fastbert":
            points.setdefault("floor", []).append((x(row), 1e3 * row.floor, row.workload))
    panels = [Panel(title, {name: sorted(found) for name, found in points.items()}) for title, points in kinds.items()]
    return [panel for panel in panels if len({point[0] for found in panel.points.values() for point in found}) > 1]


def time_by_tokens(panels: Sequence[Panel], path: Path, note: str) -> Path:
    """Draw `time_panels`."""
    return _draw_panels(panels, path, "Time against tokens", note, "tokens in the batch, padding not counted", "ms")


def memory_by_length(panels: Sequence[Panel], path: Path, note: str) -> Path:
    """Draw `memory_panels`."""
    title = "Peak memory of one run, for each token"
    return _draw_panels(panels, path, title, note, "sequence length", "KiB a token, beyond weights and gradients")


def _draw_panels(panels: Sequence[Panel], path: Path, title: str, note: str, xlabel: str, ylabel: str) -> Path:
    columns, rows = min(2, len(panels)), math.ceil(len(panels) / 2)
    wide, tall, left, gap, above, below, head = 3.5, 2.5, 0.75, 0.75, 0.35, 1.15, 0.95
    width = left + columns * wide + (columns - 1) * gap + 0.3
    height = head + rows * (above + tall + below)
    figure = new_figure(max(width, 7.0), height, DPI)
    width = figure.get_figwidth()
    write_heading(figure, title, note)
    _legend(figure, [name for name in (*CONTENDERS, "floor") if any(name in panel.points for panel in panels)])
    for i, panel in enumerate(panels):
        bottom = height - head - (i // 2 + 1) * (above + tall + below) + below
        place = (left + i % 2 * (wide + gap), bottom, wide, tall)
        axes = figure.add_axes((place[0] / width, place[1] / height, place[2] / width, place[3] / height))
        _curves(axes, panel, wide)
        axes.set_xlabel(xlabel, fontsize=8, color=FAINT)
        axes.set_ylabel(ylabel, fontsize=8, color=FAINT)
    return save_png(figure, path)


def _style(name: str) -> dict[str, Any]:
    if name == "floor":
        return {"color": INK, "linestyle": "--", "marker": "_", "markersize": 7, "linewidth": 1.0}
    strong = name == "fastbert"
    return {
        "color": COLOURS[name],
        "marker": "o",
        "markersize": 5.5 if strong else 4.5,
        "linewidth": 1.8 if strong else 1.0,
        "zorder": 4 if strong else 3,
    }


def _legend(figure: "Figure", names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    width, height = figure.get_size_inches()
    figure.legend(
        [Line2D([], [], **_style(name)) for name in names],
        [CONTENDERS.get(name, "floor: the least time the work can take") for name in names],
        loc="upper left",
        bbox_to_anchor=(0.06 / width, 1 - 0.58 / height),
        ncols=4,
        fontsize=7.5,
        frameon=False,
        columnspacing=1.2,
        borderpad=0.2,
    )


def _curves(axes: "Axes", panel: Panel, inches: float) -> None:
    tidy(axes)
    axes.set_title(panel.title, fontsize=9, color=INK, loc="left", weight="bold", pad=6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(x=0.13, y=0.08)
    axes.grid(color="#eeeeee", linewidth=0.7)
    axes.set_axisbelow(True)
    places: dict[float, list[str]] = {}
    for x, workload in sorted({(x, workload) for points in panel.points.values() for x, _, workload in points}):
        places.setdefault(x, []).append(workload)
    aside = (max(places) / min(places)) ** 0.03  # workloads with the same x stand a little apart
    for name, points in panel.points.items():
        apart = sorted((x * aside ** places[x].index(workload), y) for x, y, workload in points)
        axes.plot([x for x, _ in apart], [y for _, y in apart], **_style(name))
    low, high = axes.get_xlim()
    at = [inches * math.log(x / low) / math.log(high / low) for x in places]
    axes.set_xticks(list(places), _staggered([f"{x:,.0f}\n" + "\n".join(places[x]) for x in places], at))
    axes.tick_params(axis="x", labelsize=6.5)
    axes.minorticks_off()
    low, high = axes.get_ylim()
    for mantissas in ((1, 2, 5), (1,)):
        ticks = [m * 10.0**e for e in range(-6, 9) for m in mantissas if low <= m * 10.0**e <= high]
        if len(ticks) <= 8:
            break
    axes.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])


def _staggered(labels: Sequence[str], inches: Sequence[float]) -> list[str]:
    """Labels under their places; one that would run into its neighbour begins below it."""
    shown: list[str] = []
    reach = -math.inf
    for label, middle in zip(labels, inches, strict=True):
        half = 0.5 * _CHARACTER * max(map(len, label.splitlines()))
        down = shown[-1].count("\n") + 1 if shown and middle - half < reach + _CHARACTER else 0
        shown.append("\n" * down + label)
        reach = middle + half
    return shown

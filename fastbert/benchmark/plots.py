"""Speed-up bars as a picture. Needs matplotlib, which the `plot` extra brings."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbert.figures import new_figure, save_png

from .contenders import CONTENDERS
from .results import Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: One colour for each contender in every picture.
COLOURS = {
    "fastbert": "#c2185b",
    "fastbert-auto": "#7b1fa2",
    "eager": "#7f8c8d",
    "sdpa": "#3b75af",
    "flash": "#39a0a0",
    "flex": "#2a7a5a",
    "compile": "#e0a12f",
    "compile-graphs": "#c77d0a",
    "compile-max": "#a3561a",
    "compile-freezing": "#c9a66b",
    "onnxruntime": "#7d5ba6",
    "openvino": "#5b6fa6",
    "fastbert-graphed": "#e57ba5",
}
INK, FAINT, LOSS = "#333333", "#777777", "#c62828"

#: Inches: a bar, a workload's heading, the names of the peers, a panel, what is between two panels.
_BAR, _HEADING, _NAMES, _PANEL, _GUTTER = 0.17, 0.33, 1.85, 3.25, 0.2
#: Room for the ratio after the longest bar, in inches.
_LABEL = 0.55
#: Characters of what is said in place of a bar.
_REASON = 52
_COLUMNS = 2


def write_heading(figure: "Figure", title: str, note: str) -> None:
    """Put a title and a line under it at the top left, within the first 0.6 inches."""
    width, height = figure.get_size_inches()
    figure.text(0.12 / width, 1 - 0.24 / height, title, fontsize=13, weight="bold", color=INK, va="center")
    figure.text(0.12 / width, 1 - 0.48 / height, note, fontsize=8, color=FAINT, va="center")


def tidy(axes: "Axes") -> None:
    """Leave of an axes' frame what a reader needs."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color="#bbbbbb", linewidth=0.8)
    axes.tick_params(which="both", labelsize=8, length=3, color="#bbbbbb", labelcolor=INK)


def cut(text: str, longest: int) -> str:
    """Text of at most so many characters."""
    return text if len(text) <= longest else f"{text[: longest - 1].rstrip()}\N{HORIZONTAL ELLIPSIS}"


def speedup_bars(
    groups: Iterable[Group],
    path: str | os.PathLike[str],
    *,
    title: str = "fastbert beside its peers",
    note: str = "",
    dpi: int = 110,
) -> Path:
    """Draw each peer's median time over fastbert's as a PNG: bars on a logarithmic axis that begin at 1.

    A panel for each model and dtype, a block of bars for each workload. A bar goes to the right where fastbert is
    faster, and hatched to the left, with its ratio in red, where it is slower. A peer that was not timed says why.

    Args:
        groups: the results.
        path: where to write; folders on the way are made.
        title, note: stand above the bars, such as: device, date, versions.
        dpi: pixels per inch.

    Returns:
        The path written.

    Raises:
        ImportError: without matplotlib.
        ValueError: without results.
    """
    panels: dict[tuple[str, str], dict[str, Group]] = {}
    for group in groups:
        row = group.rows[0]
        panels.setdefault((row.model, row.dtype), {})[row.workload] = group
    if not panels:
        raise ValueError("nothing to draw: no results")
    ratios = [r for panel in panels.values() for group in panel.values() for r in _ratios(group).values()]

    keys = list(panels)
    bands = [keys[i : i + _COLUMNS] for i in range(0, len(keys), _COLUMNS)]
    columns = min(len(keys), _COLUMNS)
    panel = _PANEL if columns > 1 else 1.6 * _PANEL
    peers = [_peers_by_workload([panels[key] for key in band]) for band in bands]
    tall = [sum(_HEADING + _BAR * len(names) for names in by_workload.values()) for by_workload in peers]
    above, below = 0.32, 0.62
    width = 0.12 + _NAMES + columns * (panel + _GUTTER)
    height = 0.62 + sum(tall) + len(bands) * (above + below)
    figure = new_figure(width, height, dpi)
    write_heading(figure, title, note)
    limits = _limits(ratios, panel)

    top = height - 0.62
    for band, by_workload, inches in zip(bands, peers, tall, strict=True):
        top -= above
        for i, key in enumerate(band):
            left = 0.12 + _NAMES + i * (panel + _GUTTER)
            axes = figure.add_axes((left / width, (top - inches) / height, panel / width, inches / height))
            axes.set_title(
                f"{cut(key[0], 36)}, {key[1]}",
                fontsize=10,
                color=INK,
                loc="left",
                weight="bold",
                pad=5,
                parse_math=False,
            )
            _frame(axes, limits, inches)
            _fill(axes, by_workload, panels[key])
            if i == 0:
                _name(axes, by_workload, [panels[key] for key in band], panel)
        top -= inches + below
    return save_png(figure, path)


def _ratios(group: Group) -> dict[str, float]:
    """Each timed peer's time over fastbert's."""
    found = {name: group.speedup(name) for name in group.timed if name != "fastbert"}
    return {name: ratio for name, ratio in found.items() if ratio is not None}


def _peers_by_workload(panels: Sequence[dict[str, Group]]) -> dict[str, list[str]]:
    """The bars of each workload, the same in every panel beside each other."""
    found: dict[str, set[str]] = {}
    for panel in panels:
        for workload, group in panel.items():
            found.setdefault(workload, set()).update(row.contender for row in group.rows)
    return {w: [name for name in CONTENDERS if name in names - {"fastbert"}] for w, names in found.items()}


def _limits(ratios: Sequence[float], inches: float) -> tuple[float, float]:
    """An axis on which the longest bar leaves room for its ratio."""
    low, high = min([0.8, *(ratio / 1.1 for ratio in ratios)]), max([1.25, *ratios])
    return low, low * (high / low) ** (inches / (inches - _LABEL))


def _frame(axes: "Axes", limits: tuple[float, float], inches: float) -> None:
    """A logarithmic axis of ratios below; downwards, inches."""
    tidy(axes)
    axes.spines["left"].set_visible(False)
    axes.set_xscale("log", base=2)
    axes.set_xlim(*limits)
    axes.set_ylim(inches, 0)
    axes.set_yticks([])
    steps = _steps(*limits)
    axes.set_xticks(steps, [f"{step:g}x" for step in steps])
    axes.minorticks_off()
    for text, side, align, colour in (
        ("fastbert faster \N{RIGHTWARDS ARROW}", 5, "left", FAINT),
        ("\N{LEFTWARDS ARROW} slower", -5, "right", LOSS),
    ):
        axes.annotate(
            text,
            (1.0, 0.0),
            (side, -19),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            fontsize=7.5,
            color=colour,
            ha=align,
            va="top",
            annotation_clip=False,
        )


def _steps(low: float, high: float) -> list[float]:
    """Where the axis is marked: powers of two, unless these are too few."""
    powers = [2.0**k for k in range(-10, 20)]
    for steps in (powers, [0.8, 1.0, 1.25, 1.5, 2.0]):
        inside = [step for step in steps if low <= step <= high]
        if len(inside) > 2:
            break
    return inside


def _fill(axes: "Axes", by_workload: dict[str, list[str]], panel: dict[str, Group]) -> None:
    """The bars of one panel. What lies behind them leaves the headings free."""
    y = 0.0
    for workload, names in by_workload.items():
        y += _HEADING
        end = y + _BAR * len(names)
        axes.fill_between((axes.get_xlim()[0], 1.0), y, end, color=LOSS, alpha=0.06, linewidth=0, zorder=0)
        axes.vlines(axes.get_xticks(), y, end, color="#e8e8e8", linewidth=0.7, zorder=0)
        axes.vlines(1.0, y, end, color=INK, linewidth=1.0, zorder=3)
        group = panel.get(workload)
        ratios = {} if group is None else _ratios(group)
        for name, middle in zip(names, _middles(y, names), strict=True):
            if name in ratios:
                _bar(axes, middle, ratios[name], COLOURS[name])
        missing = {} if group is None else _why_not(group, names)
        for name, middle in zip(names, _middles(y, names), strict=True):
            if name in missing:
                why = cut(missing[name], _REASON)
                axes.text(1.03, middle, why, fontsize=6.5, color=FAINT, style="italic", va="center")
        y = end


def _middles(y: float, names: Sequence[str]) -> list[float]:
    return [y + (i + 0.5) * _BAR for i in range(len(names))]


def _bar(axes: "Axes", middle: float, ratio: float, colour: str) -> None:
    lost = ratio < 1
    low, high = min(1.0, ratio), max(1.0, ratio)
    axes.barh(
        middle,
        high - low,
        left=low,
        height=0.8 * _BAR,
        facecolor="white" if lost else colour,
        edgecolor=colour,
        linewidth=0.8,
        hatch="//////" if lost else None,
    )
    axes.annotate(
        f"{ratio:.2f}x",
        (high, middle),
        (4, 0),
        textcoords="offset points",
        fontsize=7.5,
        va="center",
        color=LOSS if lost else INK,
        weight="bold" if lost else "normal",
    )


def _why_not(group: Group, names: Sequence[str]) -> dict[str, str]:
    """What to say in place of a bar: of each peer, or, once, of fastbert."""
    rows = {row.contender: row for row in group.rows}
    if group.ours is None:
        ours = rows.get("fastbert")
        why = "was not run" if ours is None else ours.problem or "was not timed"
        return {names[0]: f"fastbert: {why}"} if names else {}
    return {
        name: rows[name].problem or "was not timed" if name in rows else "was not run"
        for name in names
        if name not in group.timed
    }


def _name(axes: "Axes", by_workload: dict[str, list[str]], panels: Sequence[dict[str, Group]], inches: float) -> None:
    """Workloads and peers, at the left of the first panel."""
    x = -_NAMES / inches
    style: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "clip_on": False}
    y = 0.0
    for workload, names in by_workload.items():
        row = next(panel[workload] for panel in panels if workload in panel).rows[0]
        shape = f"{row.task}, {row.batch} x {row.seq}, {row.tokens:,} tokens"
        heading = axes.text(x, y + _HEADING - 0.1, cut(workload, 40), fontsize=8.5, weight="bold", color=INK, **style)
        axes.annotate(
            shape,
            (1, 0.5),
            (6, 0),
            xycoords=heading,
            textcoords="offset points",
            fontsize=7.5,
            color=FAINT,
            va="center",
            annotation_clip=False,
        )
        y += _HEADING
        for name in names:
            axes.text(x + 0.1 / inches, y + _BAR / 2, CONTENDERS[name], fontsize=7.5, color=INK, **style)
            y += _BAR

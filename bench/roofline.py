"""Every kernel under the measured ceilings of its device, as a picture."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.collect import KernelGroup, Kernels, median
from bench.kernels import KernelRow
from fastbert.benchmark.plots import FAINT, INK, cut, tidy, write_heading
from fastbert.figures import new_figure, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 110
#: Inches of a line of the key.
_LINE = 0.17
_COLOURS = ("#c2185b", "#3b75af", "#39a0a0", "#e0a12f", "#7d5ba6", "#5b8c3a", "#a3561a", "#7f8c8d")


def roofline(kernels: Kernels, path: Path, note: str) -> Path:
    """Draw every timed kernel under the measured ceilings of its device.

    Kernels with products are points of FLOP/s against FLOP/byte; those that only move data are bars of bytes/s. The
    best peer of each is drawn hollow; a call that fastbert leaves to a library is a square.

    Raises:
        ValueError: without a timed kernel or without ceilings.
    """
    groups = [group for group in kernels.groups() if group.timed]
    ceilings = kernels.facts.get("ceilings") or {}
    if not groups or "copy_bytes" not in ceilings:
        raise ValueError(f"nothing to draw: {len(groups)} timed kernels, ceilings {ceilings}")
    products = [group for group in groups if group.rows[0].flops > 0]
    movers = [group for group in groups if group.rows[0].flops == 0]
    tall = max(3.6, _LINE * len(products)) if products else 0.0
    low = 0.2 * len(movers) + 0.9 if movers else 0.0
    width, height = 9.4, 0.85 + tall + (0.65 if products else 0) + low
    figure = new_figure(width, height, DPI)
    write_heading(figure, "Kernels under the measured ceilings", note)
    if products:
        bottom = height - 0.8 - tall
        axes = figure.add_axes((0.75 / width, bottom / height, 4.7 / width, tall / height))
        _roof(axes, products, ceilings, tall)
    if movers:
        axes = figure.add_axes((3.3 / width, 0.55 / height, 5.1 / width, (low - 0.9) / height))
        _bandwidth(axes, movers, ceilings["copy_bytes"])
    return save_png(figure, path)


def _shown(group: KernelGroup) -> KernelRow:
    """fastbert's row, or where there is none that of a library."""
    shown = group.ours or group.best_peer
    assert shown is not None
    return shown


def _colours(groups: Sequence[KernelGroup]) -> dict[str, str]:
    names = dict.fromkeys(group.rows[0].kernel for group in groups)
    return dict(zip(names, itertools.cycle(_COLOURS), strict=False))


def _roof(axes: "Axes", groups: Sequence[KernelGroup], ceilings: dict[str, float], tall: float) -> None:
    tidy(axes)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(color="#eeeeee", linewidth=0.7)
    axes.set_axisbelow(True)
    copy = ceilings["copy_bytes"]
    flops = {f"flops_{row.dtype}": row.dtype for group in groups for row in group.rows}
    tops = {dtype: ceilings[name] for name, dtype in flops.items() if name in ceilings}
    intensities = [group.rows[0].flops / group.rows[0].bytes for group in groups]
    rates = [row.flops / median(row) for group in groups for row in group.timed]
    left, right = min(intensities) / 2.5, max([*intensities, *(top / copy for top in tops.values())]) * 2.5
    axes.set_xlim(left, right)
    axes.set_ylim(min([*rates, left * copy]) / 1.6, max([*rates, *tops.values()]) * 1.9)

    knee = max([top / copy for top in tops.values()], default=right)
    axes.plot([left, knee], [left * copy, knee * copy], color=INK, linewidth=1.2)
    text: dict[str, Any] = {"fontsize": 7.5, "color": INK, "textcoords": "offset points"}
    middle = math.sqrt(left * knee)
    axes.annotate(f"copy: {copy / 1e12:.3g} TB/s", (middle, middle * copy), (-6, 3), ha="right", **text)
    for dtype, top in tops.items():
        axes.plot([top / copy, right], [top, top], color=INK, linewidth=1.2)
        label = f"product in {dtype}: {top / 1e12:.3g} TFLOP/s"
        axes.annotate(label, (right, top), (-2, 4), ha="right", **text)

    colours = _colours(groups)
    dots, numbered = [], []
    for number, (group, x) in enumerate(zip(groups, intensities, strict=True), 1):
        shown, colour = _shown(group), colours[group.rows[0].kernel]
        y = shown.flops / median(shown)
        peer = group.best_peer
        if group.ours is not None and peer is not None:
            other = peer.flops / median(peer)
            axes.plot([x, x], [y, other], color=colour, linewidth=0.7, alpha=0.6)
            axes.plot(x, other, marker="o", markersize=5, markerfacecolor="white", markeredgecolor=colour)
            dots.append((x, other))
        axes.plot(x, y, marker="o" if group.ours else "s", markersize=6.5, color=colour, markeredgecolor="white")
        dots.append((x, y))
        numbered.append((str(number), (x, y), colour))
        line = f"{number:>2}  {shown.floor / median(shown):>4.0%}  {cut(f'{shown.kernel}, {shown.case}', 48)}"
        place = (1.03, 1 - (number - 1) * _LINE / tall)
        axes.text(*place, line, color=colour, transform=axes.transAxes, fontsize=7, va="top")
    _place_numbers(axes, numbered, dots)
    axes.set_xlabel("FLOP/byte", fontsize=8, color=FAINT)
    axes.set_ylabel("FLOP/s", fontsize=8, color=FAINT)
    hint = "Percent: of the ceiling. Hollow: the best peer. Square: a library's product, no kernel of ours."
    axes.text(0, -0.42 / tall, hint, transform=axes.transAxes, fontsize=7.5, color=FAINT, va="top")


def _place_numbers(
    axes: "Axes", numbered: Sequence[tuple[str, tuple[float, float], str]], dots: Sequence[tuple[float, float]]
) -> None:
    """Write each number beside its dot, where it covers no dot and no other number."""
    taken = [tuple(axes.transData.transform(dot)) for dot in dots]
    for text, dot, colour in numbered:
        x, y = axes.transData.transform(dot)
        spots = [
            (x + r * math.cos(a), y + r * math.sin(a)) for r in (13, 19, 26) for a in (0.0, 0.8, 1.6, 2.4, 3.1, 4.7)
        ]

        def clearance(spot: tuple[float, float]) -> float:
            return min(math.dist(spot, other) for other in taken)

        spot = next((spot for spot in spots if clearance(spot) >= 11.5), max(spots, key=clearance))
        taken.append(spot)
        left, bottom = axes.transData.inverted().transform(spot)
        axes.text(left, bottom, text, fontsize=7, color=colour, weight="bold", ha="center", va="center", zorder=5)


def _bandwidth(axes: "Axes", groups: Sequence[KernelGroup], copy: float) -> None:
    tidy(axes)
    colours = _colours(groups)
    for i, group in enumerate(groups):
        shown, peer = _shown(group), group.best_peer
        rate = shown.bytes / median(shown)
        axes.barh(i, rate / 1e12, height=0.7, color=colours[shown.kernel])
        axes.annotate(
            f"{rate / copy:.0%}", (rate / 1e12, i), (4, 0), textcoords="offset points", fontsize=7, va="center"
        )
        if group.ours is not None and peer is not None:
            other = peer.bytes / median(peer) / 1e12
            axes.plot(other, i, marker="o", markersize=5, markerfacecolor="white", markeredgecolor=INK)
    axes.set_yticks(range(len(groups)), [cut(f"{g.rows[0].kernel}, {g.rows[0].case}", 50) for g in groups])
    axes.tick_params(axis="y", labelsize=7, length=0)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.axvline(copy / 1e12, color=INK, linewidth=1.2)
    axes.set_xlim(0, max(copy, *(r.bytes / median(r) for g in groups for r in g.timed)) / 1e12 * 1.08)
    axes.set_title(
        f"Kernels that only move data, and the copy ({copy / 1e12:.3g} TB/s); hollow: the best peer",
        fontsize=9,
        color=INK,
        loc="left",
        weight="bold",
    )
    axes.set_xlabel("TB/s read and written", fontsize=8, color=FAINT)

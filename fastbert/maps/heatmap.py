"""Attention maps as a picture. Needs matplotlib, which the `plot` extra brings."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastbert.figures import new_figure, save_png

from .checked import checked_maps

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

_LABEL_POINTS = 6.0
#: Inches a panel has, at least, and where its tokens are not named.
_PANEL_INCHES = (1.15, 2.6)
#: Inches that all panels side by side, or below each other, may have for the sake of names.
_NAMED_INCHES = 40.0
_LINE_INCHES = 1.35 * _LABEL_POINTS / 72
_CHARACTER_INCHES = 0.62 * _LABEL_POINTS / 72  # monospaced
#: Inches right of the panels, above them, and between two.
_RIGHT, _TOP, _GAP = 0.95, 0.85, 0.09


def attention_heatmap(
    attentions: Sequence[Tensor | None],
    tokens: Sequence[str],
    path: str | os.PathLike[str],
    *,
    heads: Sequence[int] | None = None,
    sentence: int = 0,
    title: str = "Attention",
    dpi: int = 110,
) -> Path:
    """Draw one sentence's attention as a PNG: a row of panels per layer, a column per head, one colour scale.

    Each panel has a row per query token and a column per key token. Tokens are named at the left and the bottom of the
    grid where a panel can have a line of text for each: up to 29 tokens with 12 layers or heads, 350 in a single panel.

    Args:
        attentions: a tensor (batch, heads, seq, seq) per layer, as `output_attentions=True` returns them; None for a
            layer that was not selected, which is left out.
        tokens: the sentence's tokens; padding beyond them is not drawn.
        path: where to write; folders on the way are made.
        heads: those to draw. Default: all.
        sentence: its row in the batch.
        title: stands above the grid.
        dpi: pixels per inch.

    Returns:
        The path written.

    Raises:
        ImportError: without matplotlib.
        ValueError: with no maps, no tokens, more tokens than the maps have, a sentence outside the batch, or heads
            that a layer lacks.
    """
    maps = checked_maps(attentions, tokens, sentence, heads)
    grid = _Grid.of(maps, tokens)
    figure = new_figure(grid.width, grid.height, dpi)
    axes = figure.subplots(grid.rows, grid.columns, squeeze=False)
    figure.subplots_adjust(
        left=grid.left / grid.width,
        right=1 - _RIGHT / grid.width,
        bottom=grid.bottom / grid.height,
        top=1 - _TOP / grid.height,
        wspace=_GAP / grid.panel,
        hspace=_GAP / grid.panel,
    )
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colours = ScalarMappable(Normalize(0.0, 1.0), cmap="BuPu")
    for row, (layer, drawn) in zip(axes, maps.items(), strict=True):
        _draw_layer(row, drawn, colours)
        _name_layer(figure, row[0], layer, grid)
    named = range(next(iter(maps.values())).shape[0]) if heads is None else heads
    for head, axis in zip(named, axes[0], strict=False):
        axis.set_title(f"head {head}", fontsize=11, color="#333333", pad=5)
    if grid.labelled:
        _name_tokens(axes, tokens, list(maps.values())[-1].shape[0])
    _write_texts(figure, grid, title, len(tokens))
    _draw_scale(figure, grid, colours)
    return save_png(figure, path)


@dataclass(frozen=True)
class _Grid:
    """How the panels lie, in inches.

    Attributes:
        rows, columns: of panels.
        panel: the side of one.
        left, bottom: what is beside and below the panels.
        labelled: whether a panel has a line of text for each token.
    """

    rows: int
    columns: int
    panel: float
    left: float
    bottom: float
    labelled: bool

    @classmethod
    def of(cls, maps: dict[int, Tensor], tokens: Sequence[str]) -> "_Grid":
        """The grid for these maps, with space for the labels where they can be read."""
        wanted = len(tokens) * _LINE_INCHES
        columns = max(layer.shape[0] for layer in maps.values())
        labelled = wanted * max(columns, len(maps)) <= _NAMED_INCHES
        panel = max(_PANEL_INCHES[0], wanted) if labelled else _PANEL_INCHES[1]
        labels = _CHARACTER_INCHES * max(len(token) for token in tokens) if labelled else 0.0
        return cls(len(maps), columns, panel, 0.62 + labels, 0.45 + labels, labelled)

    @property
    def width(self) -> float:
        return self.left + self.columns * self.panel + (self.columns - 1) * _GAP + _RIGHT

    @property
    def height(self) -> float:
        return self.bottom + self.rows * self.panel + (self.rows - 1) * _GAP + _TOP


def _draw_layer(axes: "np.ndarray", heads: Tensor, colours: "ScalarMappable") -> None:
    """A layer's heads (heads, length, length) in a row of panels, of which more may be there."""
    values = heads.numpy()
    for axis in axes[len(values) :]:
        axis.set_axis_off()
    for axis, probabilities in zip(axes, values, strict=False):
        axis.imshow(probabilities, norm=colours.norm, cmap=colours.cmap, interpolation="nearest")
        _frame(axis)


def _frame(axis: "Axes") -> None:
    """A thin frame around a panel, without ticks."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.tick_params(length=0, pad=2, colors="#333333")
    for spine in axis.spines.values():
        spine.set(color="#bbbbbb", linewidth=0.6)


def _name_layer(figure: "Figure", first: "Axes", layer: int, grid: _Grid) -> None:
    """The layer's name, left of its first panel."""
    place = first.get_position()
    middle = (place.y0 + place.y1) / 2
    figure.text(0.16 / grid.width, middle, f"layer {layer}", fontsize=11, color="#333333", rotation=90, va="center")


def _name_tokens(axes: "np.ndarray", tokens: Sequence[str], heads: int) -> None:
    """The tokens, left of each first panel and below the panels of the last row, of which there are `heads`."""
    places = range(len(tokens))
    style: dict[str, Any] = {"fontsize": _LABEL_POINTS, "family": "monospace", "parse_math": False}  # $ is a token too
    for row in axes:
        row[0].set_yticks(places, tokens, **style)
    for axis in axes[-1][:heads]:
        axis.set_xticks(places, tokens, rotation=90, **style)


def _write_texts(figure: "Figure", grid: _Grid, title: str, length: int) -> None:
    """The title above the panels, and below them how to read one."""
    left = grid.left / grid.width
    figure.text(left, 1 - 0.32 / grid.height, title, fontsize=15, weight="bold", va="center", parse_math=False)
    hint = "each panel: a row per query token, a column per key token"
    hint += "" if grid.labelled else f" ({length} tokens, too many to name)"
    figure.text(left, 0.1 / grid.height, hint, fontsize=10, color="#666666", va="bottom")


def _draw_scale(figure: "Figure", grid: _Grid, colours: "ScalarMappable") -> None:
    """The bar at the right that says which colour is which probability."""
    height = min(grid.rows * grid.panel, 3.2) / grid.height
    place = (1 - 0.72 / grid.width, 1 - _TOP / grid.height - height, 0.13 / grid.width, height)
    scale = figure.colorbar(colours, cax=figure.add_axes(place))
    scale.ax.tick_params(labelsize=9, length=2, colors="#333333")
    scale.set_label("attention probability", fontsize=10, color="#333333")
    scale.outline.set(edgecolor="#bbbbbb", linewidth=0.6)

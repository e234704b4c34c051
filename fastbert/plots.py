"""Attention maps as a picture. Needs matplotlib, which the `plot` extra brings."""

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

_LABEL_POINTS = 6.0
#: Inches a panel may have. Tokens get labels where the panel leaves a line of text to each.
_PANEL_INCHES = (1.15, 2.6)
_LINE_INCHES = 1.35 * _LABEL_POINTS / 72
_CHARACTER_INCHES = 0.62 * _LABEL_POINTS / 72  # monospaced


def attention_heatmap(
    attentions: Sequence[Tensor | None],
    tokens: Sequence[str],
    path: str | os.PathLike[str],
    *,
    sentence: int = 0,
    title: str = "Attention",
    dpi: int = 110,
) -> Path:
    """Draw one sentence's attention as a PNG: a row of panels per layer, a column per head, one colour scale.

    Each panel has a row per query token and a column per key token. Token labels stand at the left and the bottom of
    the grid, unless the sentence is too long for them to be read.

    Args:
        attentions: a tensor (batch, heads, seq, seq) per layer, as `output_attentions=True` returns them; None for a
            layer that was not selected, which is left out.
        tokens: the sentence's tokens; padding beyond them is not drawn.
        path: where to write; folders on the way are made.
        sentence: its row in the batch.
        title: stands above the grid.
        dpi: pixels per inch.

    Returns:
        The path written.

    Raises:
        ImportError: without matplotlib.
        ValueError: with no maps, no tokens, more tokens than the maps have, or a sentence outside the batch.
    """
    try:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'fastbert[plot]'") from error

    maps = [(i, layer) for i, layer in enumerate(attentions) if layer is not None]
    length = len(tokens)
    if not maps or length == 0:
        raise ValueError(f"nothing to draw: {len(maps)} attention maps and {length} tokens")
    for i, layer in maps:
        if layer.dim() != 4 or not 0 <= sentence < layer.shape[0] or length > layer.shape[-1]:
            raise ValueError(
                f"attentions[{i}] has shape {tuple(layer.shape)}: drawing sentence {sentence} with {length} tokens "
                "needs (batch, heads, seq, seq) that holds it"
            )

    rows, columns = len(maps), max(layer.shape[1] for _, layer in maps)
    panel = min(max(_PANEL_INCHES[0], length * _LINE_INCHES), _PANEL_INCHES[1])
    labelled = length * _LINE_INCHES <= panel + 1e-6
    longest = max(len(token) for token in tokens) if labelled else 0
    margin = 0.62 + _CHARACTER_INCHES * longest  # layer names, then labels
    bottom = 0.45 + _CHARACTER_INCHES * longest
    right, top, gap = 0.95, 0.85, 0.09
    width = margin + columns * panel + (columns - 1) * gap + right
    height = bottom + rows * panel + (rows - 1) * gap + top
    # A figure of its own, not pyplot's: nothing global changes, and no display is needed.
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=margin / width,
        right=1 - right / width,
        bottom=bottom / height,
        top=1 - top / height,
        wspace=gap / panel,
        hspace=gap / panel,
    )

    colours = ScalarMappable(Normalize(0.0, 1.0), cmap="BuPu")
    for row, (i, layer) in zip(axes, maps, strict=True):
        values = layer[sentence, :, :length, :length].detach().float().cpu().numpy()
        for head, axis in enumerate(row):
            if head >= len(values):
                axis.set_axis_off()
                continue
            axis.imshow(values[head], norm=colours.norm, cmap=colours.cmap, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set(color="#bbbbbb", linewidth=0.6)
            if i == maps[0][0]:
                axis.set_title(f"head {head}", fontsize=11, color="#333333", pad=5)
            if labelled and head == 0:
                axis.set_yticks(range(length), tokens, fontsize=_LABEL_POINTS, family="monospace")
            if labelled and i == maps[-1][0]:
                axis.set_xticks(range(length), tokens, fontsize=_LABEL_POINTS, family="monospace", rotation=90)
            axis.tick_params(length=0, pad=2, colors="#333333")
        middle = row[0].get_position()
        where = (0.16 / width, (middle.y0 + middle.y1) / 2)
        figure.text(*where, f"layer {i}", fontsize=11, color="#333333", rotation=90, va="center")

    left, line = margin / width, 0.32 / height
    figure.text(left, 1 - line, title, fontsize=15, weight="bold", va="center")
    hint = "each panel: a row per query token, a column per key token"
    hint += "" if labelled else f" ({length} tokens, too many to name)"
    figure.text(left, 0.1 / height, hint, fontsize=10, color="#666666", va="bottom")
    bar_height = min(rows * panel, 3.2) / height
    bar = figure.add_axes((1 - 0.72 / width, 1 - top / height - bar_height, 0.13 / width, bar_height))
    scale = figure.colorbar(colours, cax=bar)
    scale.ax.tick_params(labelsize=9, length=2, colors="#333333")
    scale.set_label("attention probability", fontsize=10, color="#333333")
    scale.outline.set(edgecolor="#bbbbbb", linewidth=0.6)

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=dpi)
    return path

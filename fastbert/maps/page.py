"""Attention maps as a page to look around in. Needs bertviz, which the `viz` extra brings."""

import html
import json
import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

#: Name -> what bertviz calls it: lines from token to token in one layer, or a thumbnail of every head of every layer.
VIEWS = {"head": "head_view", "model": "model_view"}

#: Probabilities a page may hold: at seven characters each it has 35 MB, and a browser much more to do.
MOST_PROBABILITIES = 5_000_000

#: bertviz's scripts ask require.js for these two, from servers far away. They get them from the page.
_SCRIPTS = ("d3.min.js", "jquery.min.js")
#: What stands before the data in bertviz's script.
_DATA = "const params = "
_LOADER = "window.require = {config() {}}; window.requirejs = (names, start) => start(window.jQuery, window.d3);"


def attention_page(
    attentions: Sequence[Tensor | None],
    tokens: Sequence[str],
    path: str | os.PathLike[str],
    *,
    view: str = "head",
    title: str = "Attention",
) -> Path:
    """Write one sentence's attention as an HTML page that needs no network.

    Args:
        attentions: a tensor (1, heads, seq, seq) per layer, as `output_attentions=True` returns them; None for a layer
            that was not selected, which is left out.
        tokens: the sentence's tokens, seq of them.
        path: where to write; folders on the way are made.
        view: a key of `VIEWS`.
        title: of the page.

    Returns:
        The path written.

    Raises:
        ImportError: without bertviz.
        ValueError: for an unknown view, no maps, maps that do not fit the tokens, or more than a page can hold.
    """
    if view not in VIEWS:
        raise ValueError(f"unknown view {view!r}: choose from {', '.join(VIEWS)}")
    try:
        import bertviz
    except ImportError as error:
        raise ImportError("pages of attention need bertviz: pip install 'fastbert[viz]'") from error
    layers = [i for i, layer in enumerate(attentions) if layer is not None]
    if not layers:
        raise ValueError("nothing to show: no attention maps")
    # Rounded as float64, whose JSON is short.
    maps = [None if layer is None else layer.detach().cpu().double().round(decimals=4) for layer in attentions]
    for i in layers:
        shape = tuple(maps[i].shape)  # type: ignore[union-attr]
        if len(shape) != 4 or shape[0] != 1 or shape[2:] != (len(tokens), len(tokens)):
            raise ValueError(f"attentions[{i}] has shape {shape}: {len(tokens)} tokens need (1, heads, seq, seq)")
    count = sum(layer.numel() for layer in maps if layer is not None)
    if count > MOST_PROBABILITIES:
        raise ValueError(
            f"{count:,} probabilities are more than a page can hold ({MOST_PROBABILITIES:,}): show fewer layers or a "
            "shorter text"
        )
    # bertviz counts heads on the first layer, shown or not.
    filled = [maps[layers[0]] if layer is None else layer for layer in maps]
    made: Any = getattr(bertviz, VIEWS[view])(filled, list(tokens), include_layers=layers, html_action="return")
    body, loaders = re.subn(r"<script src=[^>]*require[^>]*></script>", "", _escape(made.data))
    if loaders != 1:
        raise ValueError(f"bertviz's page loads require.js {loaders} times, where once is known how to replace")
    scripts = [resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8") for name in _SCRIPTS]
    head = "\n".join(f"<script>{script}</script>" for script in (*scripts, _LOADER))
    page = f'<!doctype html>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n{head}\n{body}\n'
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _escape(page: str) -> str:
    """bertviz's page with its data as a script may hold it.

    bertviz puts tokens into its script as JSON, in which `</script>` would end the script, and puts them once more into
    the comment that follows, which is left out.
    """
    before, found, rest = page.partition(_DATA)
    if not found:
        raise ValueError(f"bertviz's page has no {_DATA!r}, after which its data is known to stand")
    _, end = json.JSONDecoder().raw_decode(rest)
    data, (_, line_end, after) = rest[:end], rest[end:].partition("\n")
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return f"{before}{_DATA}{data};{line_end}{after}"

"""Attention maps as a page to look around in, which needs no network and nothing installed."""

import base64
import html
import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from .checked import checked_maps
from .document import write_document

#: Probabilities that a page holds, at 5.3 bytes each. Of a longer text's queries it holds the strongest ones.
PROBABILITIES = 1_000_000
#: How many of a query it holds in any case.
FEWEST = 8
#: A text of more characters is folded.
_SHORT = 600

_HOW = (
    "On the left stand the queries: the tokens that look. On the right stand the keys: the tokens that are looked at. "
    "A line is as strong as the attention probability; the probabilities of one query add up to 1. Point at a token to "
    "see its lines alone, with numbers; click to keep them. The small pictures are the heads, a row for each query and "
    "a column for each key; click on one to choose it."
)


def attention_page(
    attentions: Sequence[Tensor | None],
    tokens: Sequence[str],
    path: str | os.PathLike[str],
    *,
    text: str = "",
    heads: Sequence[int] | None = None,
    sentence: int = 0,
    title: str = "Attention",
) -> Path:
    """Write one sentence's attention as an HTML page: every layer and head small, and the chosen one large.

    A page has 6 MB at most for up to 125,000 queries (heads of all layers times tokens), as 144 heads and 868 tokens
    have: of long texts it holds the strongest probabilities of each query, and says how many.

    Args:
        attentions: a tensor (batch, heads, seq, seq) per layer, as `output_attentions=True` returns them; None for a
            layer that was not selected, which is left out.
        tokens: the sentence's tokens; padding beyond them is not shown.
        path: where to write; folders on the way are made.
        text: the sentence, which stands above.
        heads: those to show. Default: all.
        sentence: its row in the batch.
        title: of the page.

    Returns:
        The path written.

    Raises:
        ValueError: with no maps, no tokens, more tokens than the maps have, a sentence outside the batch, or heads
            that a layer lacks; for layers of different numbers of heads.
    """
    maps = checked_maps(attentions, tokens, sentence, heads)
    queries = sum(len(shown) for shown in maps.values()) * len(tokens)
    kept = min(len(tokens), max(FEWEST, PROBABILITIES // queries))
    strongest = [layer.topk(kept, dim=-1) for layer in maps.values()]
    counts = {layer.shape[0] for layer in maps.values()}
    if len(counts) > 1:
        raise ValueError(f"a page shows layers of one number of heads, and these have {sorted(counts)}")
    data = {
        "tokens": list(tokens),
        "layers": list(maps),
        "heads": list(range(*counts)) if heads is None else list(heads),
        "kept": kept,
        "keys": _packed(torch.cat([top.indices for top in strongest])),
        "values": _packed(torch.cat([top.values for top in strongest]).clamp(0, 1) * 65535),
    }
    limits = "" if kept == len(tokens) else f" This text is long: of each query its {kept} strongest keys are shown."
    body = (
        f"{_shown_text(text)}\n"
        f'<p class="hint">{len(tokens)} tokens. {_HOW}{limits}</p>\n'
        '<p><label>Layer <select id="layer"></select></label> <label>Head <select id="head"></select></label>\n'
        '<span class="hint" id="least"></span></p>\n'
        '<div id="overview"></div>\n<svg id="lines"></svg>\n<noscript>This page needs JavaScript.</noscript>\n'
        f'<script type="application/json" id="data">{_as_script(data)}</script>\n'
        f"<script>{_asset('attention.js')}</script>"
    )
    return write_document(path, title, f"<style>{_asset('attention.css')}</style>", body)


def _packed(numbers: Tensor) -> str:
    """Whole numbers up to 65,535, two bytes each, as a page can hold them."""
    return base64.b64encode(numbers.round().numpy().astype("<u2").tobytes()).decode()


def _shown_text(text: str) -> str:
    if not text:
        return ""
    paragraph = f"<p><q>{html.escape(text)}</q></p>"
    return paragraph if len(text) <= _SHORT else f"<details><summary>The text</summary>{paragraph}</details>"


def _as_script(data: object) -> str:
    """JSON in which nothing can end the script that holds it, or begin another."""
    content = json.dumps(data)
    for character in "<>&":
        content = content.replace(character, f"\\u{ord(character):04x}")
    return content


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")

"""Relevance over a text: the text is whole, each token has its colour, and nothing in it is run."""

import html
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from fastbert.maps.text import Coloured, Piece, _lines, pieces_of, relevance_page, relevance_picture

TEXT = "Rain <b>falls</b>,\nagain & again."
OFFSETS = [(0, 0), (0, 4), (5, 8), (8, 13), (13, 17), (19, 24), (25, 26), (27, 32), (0, 0)]
RELEVANCE = [0.9, 0.1, 0.0, 0.4, 0.2, 0.0, 0.0, 0.3, 0.7]


def coloured(**changes: object) -> Coloured:
    settings = {"title": "A <title>", "about": ["about $x$"], "special": [("[CLS]", 0.9)]}
    pieces = pieces_of(TEXT, OFFSETS, RELEVANCE)
    return Coloured(**{**settings, "pieces": pieces, **changes})  # type: ignore[arg-type]


def test_pieces_are_the_text() -> None:
    pieces = pieces_of(TEXT, OFFSETS, RELEVANCE)
    assert "".join(piece.text for piece in pieces) == TEXT
    assert [(p.text, p.relevance) for p in pieces if p.relevance] == [
        ("Rain", 0.1), ("falls", 0.4), ("</b>", 0.2), ("again", 0.3),
    ]  # fmt: skip
    assert pieces[-1] == Piece(".")  # cut off, say
    assert [p.text for p in pieces_of("\N{GRINNING FACE}", [(0, 1), (0, 1)], [0.1, 0.2])] == ["\N{GRINNING FACE}"]


def test_a_page_has_the_text_and_its_colours(tmp_path: Path) -> None:
    page = relevance_page(coloured(), tmp_path / "new" / "a.html").read_text()
    assert "<title>A &lt;title&gt;</title>" in page
    (body,) = re.findall(r'<p class="text">(.*?)</p>', page, re.DOTALL)
    assert html.unescape(re.sub("<[^>]*>", "", body)) == TEXT
    strength = dict(re.findall(r'/ ([\d.]+)\)" title="[\d.]+">(.*?)</span>', body))
    assert strength == {"0.750": "falls", "0.188": "Rain", "0.375": "&lt;/b&gt;", "0.562": "again", "0.000": "&amp;"}
    assert "full colour is a relevance of 0.4, no colour is 0; beside the text: [CLS] 0.9" in page


def test_a_browser_runs_nothing_of_a_text(browser: Callable[[Path], str], tmp_path: Path) -> None:
    hostile = "<script>document.title='run'</script><img src=x onerror=document.title='run'>"
    pieces = [Piece(hostile, 1.0), Piece(hostile)]
    drawn = browser(relevance_page(coloured(pieces=pieces, title=hostile, about=[hostile]), tmp_path / "a.html"))
    assert re.findall("<title>(.*?)</title>", drawn) == [html.escape(hostile, quote=False)]
    assert "<img" not in drawn


def test_a_picture_has_lines_and_colours(tmp_path: Path) -> None:
    def pixels(pieces: list[Piece]) -> np.ndarray:
        return image.imread(relevance_picture(coloured(pieces=pieces), tmp_path / "a.png"))[..., :3]

    def red(drawn: np.ndarray) -> int:
        return int((drawn[..., 0] - drawn[..., 2] > 0.3).sum())

    pieces = pieces_of(TEXT, OFFSETS, RELEVANCE)
    assert red(pixels(pieces)) > 1000
    assert red(pixels([Piece(piece.text, 0.0) for piece in pieces])) == 0
    assert pixels([Piece("word ", 0.5)] * 100).shape[0] > pixels(pieces).shape[0] + 60


@pytest.mark.parametrize("text", ["word " * 50, "x" * 300, "\u6f22" * 120, "a\n\n\nb " * 9, "a"])
def test_lines_of_a_picture_fit_and_lose_nothing(text: str) -> None:
    lines = list(_lines([Piece(text[:7], 0.5), Piece(text[7:])]))
    assert "".join(piece.text for line in lines for piece in line) == text
    wide = 2 if text[0] > "\u1100" else 1
    assert max(sum(len(piece.text.rstrip("\n")) for piece in line) * wide for line in lines) <= 84

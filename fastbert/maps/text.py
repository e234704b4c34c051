"""Relevance of tokens drawn over their text: as a page (`relevance_page`) or as a picture (`relevance_picture`)."""

import html
import os
import re
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbert.figures import new_figure, save_png

from .document import write_document

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Characters in a line of a picture, and the inches of one: the font is monospaced.
_LINE = 84
_WIDTH, _HEIGHT, _POINTS = 0.1, 0.3, 11.9
#: The colour of the highest relevance.
_RED, _GREEN, _BLUE = 196, 60, 20


@dataclass(frozen=True)
class Piece:
    """A part of a text.

    Attributes:
        text: as it stands there.
        relevance: of its token; None between tokens.
    """

    text: str
    relevance: float | None = None


@dataclass(frozen=True)
class Coloured:
    """A text whose tokens have a relevance.

    Attributes:
        title: stands above it.
        about: lines below the title.
        pieces: the text.
        special: tokens that stand nowhere in it, as [CLS], with their relevance.
    """

    title: str
    about: Sequence[str]
    pieces: Sequence[Piece]
    special: Sequence[tuple[str, float]]

    @property
    def highest(self) -> float:
        """The relevance with the full colour: the highest in the text."""
        return max((piece.relevance for piece in self.pieces if piece.relevance is not None), default=0.0)

    def strength(self, relevance: float) -> float:
        """From 0 to 1, how strong the colour of a relevance is."""
        return min(max(relevance / self.highest, 0.0), 1.0) if self.highest > 0 else 0.0

    @property
    def hint(self) -> str:
        """How to read it."""
        special = ", ".join(f"{token} {relevance:.3g}" for token, relevance in self.special)
        beside = f"; beside the text: {special}" if special else ""
        return f"full colour is a relevance of {self.highest:.3g}, no colour is 0{beside}"


def pieces_of(text: str, offsets: Sequence[tuple[int, int]], relevance: Sequence[float]) -> list[Piece]:
    """A text in pieces.

    Args:
        text: what was tokenized.
        offsets: where each token begins and ends in it; tokens that stand nowhere in it have none of its characters.
        relevance: of each token.
    """
    pieces, end = [], 0
    for (start, stop), value in zip(offsets, relevance, strict=True):
        start = max(start, end)  # several tokens may share a character
        if stop <= start:
            continue
        if start > end:
            pieces.append(Piece(text[end:start]))
        pieces.append(Piece(text[start:stop], value))
        end = stop
    return [*pieces, Piece(text[end:])] if end < len(text) else pieces


def relevance_page(coloured: Coloured, path: str | os.PathLike[str]) -> Path:
    """Write the text as an HTML page that needs no network; pointing at a token shows its relevance."""
    spans = "".join(_span(coloured, piece) for piece in coloured.pieces)
    about = "".join(f"<p>{html.escape(line)}</p>\n" for line in coloured.about)
    return write_document(
        path,
        coloured.title,
        "<style>.text { font-size: 1.25rem; line-height: 1.9; white-space: pre-wrap; overflow-wrap: anywhere }\n"
        ".text span { padding: .15em 0; border-radius: .2em }</style>",
        f'{about}<p class="text">{spans}</p>\n<p class="hint">{html.escape(coloured.hint)}; point at a token for its '
        "relevance</p>",
    )


def _span(coloured: Coloured, piece: Piece) -> str:
    text = html.escape(piece.text)
    if piece.relevance is None:
        return text
    colour = f"rgb({_RED} {_GREEN} {_BLUE} / {0.75 * coloured.strength(piece.relevance):.3f})"
    return f'<span style="background: {colour}" title="{piece.relevance:.4g}">{text}</span>'


def relevance_picture(coloured: Coloured, path: str | os.PathLike[str], dpi: int = 110) -> Path:
    """Write the text as a PNG.

    Raises:
        ImportError: without matplotlib.
    """
    lines = list(_lines(coloured.pieces))
    notes = [line for note in (*coloured.about, "", coloured.hint) for line in _wrapped(note)]
    above, below = 0.62 + 0.24 * len(notes), 0.25
    height = above + _HEIGHT * len(lines) + below
    figure = new_figure(_LINE * _WIDTH + 0.6, height, dpi)
    _write(figure, 0.3, height - 0.3, coloured.title, fontsize=15, weight="bold")
    for i, note in enumerate(notes):
        _write(figure, 0.3, height - 0.66 - 0.24 * i, note, fontsize=10, color="#555555")
    for i, line in enumerate(lines):
        column, y = 0, height - above - _HEIGHT * (i + 0.5)
        for piece in line:
            width = _columns(piece.text)
            if piece.relevance is not None:
                _shade(figure, 0.3 + column * _WIDTH, y, width * _WIDTH, coloured.strength(piece.relevance))
            place = column
            for character in piece.text:  # one by one, so that each keeps to its columns whatever the font
                _write(figure, 0.3 + place * _WIDTH, y, character, fontsize=_POINTS, family="monospace")
                place += _columns(character)
            column += width
    return save_png(figure, path)


def _write(figure: "Figure", x: float, y: float, text: str, **style: Any) -> None:
    """A text whose left middle is at (x, y), in inches from the bottom left."""
    width, height = figure.get_size_inches()
    figure.text(x / width, y / height, text, va="center_baseline", parse_math=False, **style)


def _shade(figure: "Figure", x: float, y: float, width: float, strength: float) -> None:
    """The colour behind a piece whose left middle is at (x, y), in inches."""
    from matplotlib.patches import Rectangle

    whole_width, whole_height = figure.get_size_inches()
    corner = x / whole_width, (y - 0.42 * _HEIGHT) / whole_height
    colour = (_RED / 255, _GREEN / 255, _BLUE / 255, 0.75 * strength)
    box = Rectangle(corner, width / whole_width, 0.84 * _HEIGHT / whole_height, color=colour, linewidth=0)
    figure.add_artist(box)


def _wrapped(note: str) -> list[str]:
    """A note in lines that a picture is wide enough for."""
    return textwrap.wrap(note, 110) or [""]


def _lines(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """The pieces in lines of at most `_LINE` columns, which begin anew between words where they can."""
    line: list[Piece] = []
    width = 0
    for word in _words(pieces):
        wide = sum(_columns(piece.text) for piece in word)
        if line and width + wide > _LINE:
            yield line
            line, width = [], 0
        for piece in word:
            for cut in _cut(piece):
                if width + _columns(cut.text) > _LINE:
                    yield line
                    line, width = [], 0
                line.append(cut)
                width += _columns(cut.text)
        if word[-1].text.endswith("\n"):
            yield line
            line, width = [], 0
    if line:
        yield line


def _words(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """What must not be torn apart: pieces up to one that ends in white space."""
    word: list[Piece] = []
    for piece in pieces:
        for text in re.findall(r"\S*\s|\S+", piece.text):
            word.append(Piece(text, piece.relevance))
            if text[-1].isspace():
                yield word
                word = []
    if word:
        yield word


def _cut(piece: Piece) -> Iterator[Piece]:
    """A piece in parts that each fit into a line."""
    for start in range(0, len(piece.text), _LINE // 2):
        yield Piece(piece.text[start : start + _LINE // 2], piece.relevance)


def _columns(text: str) -> int:
    """How many columns of a monospaced font a text has."""
    wide = sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)
    return wide - sum(unicodedata.combining(character) > 0 for character in text) - text.count("\n")

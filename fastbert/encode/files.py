"""Files of any size to embeddings, a batch at a time: what is finished survives a kill, and the next run goes on.

Beside the output lies a folder until all is done, see `parts`. The output appears whole or not at all. Needs the
`encode` extra.
"""

import collections
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastbert.inputs import InputError

from .encoder import Encoder
from .parts import Parts
from .rows import Problem, Row, Texts, check_column

#: A chunk is what is sorted by length together, and a row group of the output. It ends at the first of the two.
CHUNK_ROWS = 8192
CHUNK_CHARACTERS = 2**24

#: How many bad rows are remembered by number.
REMEMBERED = 100


@dataclass
class Summary:
    """What a run did.

    Attributes:
        rows: how many the input has.
        resumed: how many of them an earlier run had finished.
        cut: how many texts lost their end to the length limit.
        reasons: what is wrong -> how many rows it is wrong with.
        bad: the first `REMEMBERED` bad rows, counted from 0, and what is wrong with each.
    """

    rows: int = 0
    resumed: int = 0
    cut: int = 0
    reasons: collections.Counter[str] = field(default_factory=collections.Counter)
    bad: list[tuple[int, str]] = field(default_factory=list)

    def note(self, row: int, problem: Problem) -> None:
        """Count a bad row."""
        self.reasons[problem.reason] += 1
        if len(self.bad) < REMEMBERED:
            self.bad.append((row, problem.reason))


def encode_file(
    encoder: Encoder,
    texts: Texts,
    out: str | os.PathLike[str],
    *,
    keep_text: bool = False,
    tell: Callable[[int, int], object] = lambda done, rows: None,
) -> Summary:
    """Embed every row of a file into a Parquet file, in the order of the input, with the columns `row` (int64, from 0),
    `text` (when kept), `embedding` (fixed-size list of float32) and `problem` (string, null where there is none). A bad
    row's embedding is all NaN. A row whose embedding is not finite, as in float16 it may be, is bad too.

    Args:
        encoder: embeds.
        texts: the input.
        out: the Parquet file. Beside it, `OUT.parts` holds what is finished until all is.
        keep_text: write the text too; null where there is none.
        tell: called with how many rows are done, and how many there are.

    Raises:
        InputError: when `OUT.parts` belongs to another input or other settings, to a run that still goes on or to
            nobody known, and when the input is changed while it is read.
        OSError: when the disk is full, for one. What is finished is kept.
    """
    out = Path(out)
    settings = {
        "input": texts.digest(),
        "kind": texts.kind,
        "column": texts.column,
        "chunk_rows": CHUNK_ROWS,
        "chunk_characters": CHUNK_CHARACTERS,
    } | encoder.settings()
    summary, total = Summary(), len(texts)
    with Parts(out.with_name(f"{out.name}.parts"), settings, encoder.hidden) as parts:
        start = 0
        for number, rows in enumerate(_chunks(texts)):
            if parts.has_chunk(number, start, len(rows)):
                summary.resumed += len(rows)
            else:
                summary.resumed += _embed_chunk(encoder, parts, number, start, rows, lambda done: tell(done, total))
            start += len(rows)
            tell(start, total)
        whole = parts.folder / "whole.parquet"
        about = {name: value for name, value in settings.items() if name != "input"}
        _write(whole, encoder, parts, texts, keep_text, about, summary)
        if texts.digest() != settings["input"]:
            raise InputError(f"{str(texts.path)!r} was changed while it was read: run on a file that stays as it is")
        whole.replace(out)
        parts.remove()
    return summary


def _embed_chunk(
    encoder: Encoder, parts: Parts, number: int, start: int, rows: Sequence[Row], tell: Callable[[int], object]
) -> int:
    """Embed what is not finished of a chunk, whose first row is `start`. Returns how many rows were finished before."""
    good = [i for i, row in enumerate(rows) if isinstance(row, str)]
    done, resumed = start + len(rows) - len(good), 0
    batches = encoder.batches([row for row in rows if isinstance(row, str)])
    for k, batch in enumerate(batches):
        places = [start + good[i] for i in batch.rows]
        if parts.has_batch(number, k, places):
            resumed += len(places)
        else:
            parts.add_batch(number, k, places, encoder.embed(batch))
        done += len(places)
        tell(done)
    parts.add_chunk(number, start, len(rows), sum(batch.cut for batch in batches))
    return resumed


def _write(
    path: Path,
    encoder: Encoder,
    parts: Parts,
    texts: Texts,
    keep_text: bool,
    about: dict[str, Any],
    summary: Summary,
) -> None:
    """Write what is finished as a Parquet file, and count rows and bad rows."""
    fields = {
        "row": pa.int64(),
        "text": pa.string(),
        "embedding": pa.list_(pa.float32(), encoder.hidden),
        "problem": pa.string(),
    }
    if not keep_text:
        del fields["text"]
    schema = pa.schema(fields, {"fastbert": json.dumps(about)})
    with path.open("wb") as file, pq.ParquetWriter(file, schema, use_dictionary=False) as writer:
        for number, rows in enumerate(_chunks(texts)):
            values = parts.embeddings(number, summary.rows, len(rows))
            problems = _problems(values, rows, encoder)
            columns = {
                "row": pa.array(range(summary.rows, summary.rows + len(rows)), pa.int64()),
                "text": pa.array([row if isinstance(row, str) else None for row in rows], pa.string()),
                **_columns(values, problems),
            }
            writer.write_table(pa.table([columns[name] for name in schema.names], schema=schema))
            for i, problem in enumerate(problems):
                if problem is not None:
                    summary.note(summary.rows + i, problem)
            summary.rows += len(rows)
            summary.cut += parts.cut(number)
    with path.open("rb+") as written:
        os.fsync(written.fileno())


def embed_column(encoder: Encoder, column: pa.ChunkedArray | pa.Array, name: str) -> dict[str, pa.Array]:
    """The columns `embedding` and `problem` for an Arrow column of text, as `encode_file` writes them.

    Raises:
        InputError: when it is not of text.
    """
    rows = list(check_column(column, name))
    values = np.empty((len(rows), encoder.hidden), np.float32)
    values[[isinstance(row, str) for row in rows]] = encoder([row for row in rows if isinstance(row, str)])
    return _columns(values, _problems(values, rows, encoder))


def _problems(values: np.ndarray, rows: Sequence[Row], encoder: Encoder) -> list[Problem | None]:
    """What is wrong with each row, its embedding, float32 (rows, hidden), included."""
    finite = np.isfinite(values).all(1)
    overflow = Problem(f"not finite in {str(encoder.dtype).removeprefix('torch.')}")
    return [
        row if isinstance(row, Problem) else None if good else overflow for row, good in zip(rows, finite, strict=True)
    ]


def _columns(values: np.ndarray, problems: Sequence[Problem | None]) -> dict[str, pa.Array]:
    # NaN, for before version 26 pyarrow neither writes nor reads a null among lists of fixed size.
    values[[problem is not None for problem in problems]] = np.nan
    return {
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1]),
        "problem": pa.array([None if problem is None else problem.reason for problem in problems], pa.string()),
    }


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += len(row) if isinstance(row, str) else 0
        if len(chunk) == CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk

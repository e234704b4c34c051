"""Files of any size to embeddings, a batch at a time: what is finished survives a kill, and the next run goes on.

Beside the output lies a folder until all is done: every finished batch's embeddings, each at its row's place, and a
journal that says how far the run is. The output appears whole or not at all. Needs the `encode` extra.
"""

import collections
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastbert.inputs import InputError

from .encoder import Encoder
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
        reasons: what is wrong -> how many rows it is wrong with.
        bad: the first `REMEMBERED` bad rows, counted from 0, and what is wrong with each.
    """

    rows: int = 0
    resumed: int = 0
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
    row's embedding is all NaN.

    Args:
        encoder: embeds.
        texts: the input.
        out: the Parquet file. Beside it, `OUT.parts` holds what is finished until all is.
        keep_text: write the text too; null for a bad row.
        tell: called with how many rows are done, and how many there are.

    Raises:
        InputError: when `OUT.parts` belongs to another input or other settings, or to a run that still goes on.
        OSError: when the disk is full, for one. What is finished is kept.
    """
    out = Path(out)
    with texts.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    settings = {"input": digest, "column": texts.column, "chunk_rows": CHUNK_ROWS} | encoder.settings()
    summary, total, done = Summary(), len(texts), 0
    with _Parts(out.with_name(f"{out.name}.parts"), settings, encoder.hidden) as parts:
        for number, rows in enumerate(_chunks(texts)):
            for i, row in enumerate(rows):
                if isinstance(row, Problem):
                    summary.note(summary.rows + i, row)
            good = [i for i, row in enumerate(rows) if isinstance(row, str)]
            if number < parts.chunk:
                batches = []
                summary.resumed += len(rows)
            else:
                batches = encoder.batches([row for row in rows if isinstance(row, str)])
            done += len(rows) - sum(len(batch.rows) for batch in batches)
            for k, batch in enumerate(batches):
                if number == parts.chunk and k < parts.batches:
                    summary.resumed += len(batch.rows)
                else:
                    parts.add([summary.rows + good[i] for i in batch.rows], encoder.embed(batch), number, k + 1)
                done += len(batch.rows)
                tell(done, total)
            summary.rows += len(rows)
            tell(done, total)
        parts.write(out, texts, keep_text, {name: value for name, value in settings.items() if name != "input"})
    return summary


def embed_column(encoder: Encoder, column: pa.ChunkedArray | pa.Array, name: str) -> dict[str, pa.Array]:
    """The columns `embedding` and `problem` for an Arrow column of text, as `encode_file` writes them.

    Raises:
        InputError: when it is not of text.
    """
    rows = list(check_column(column, name))
    values = np.empty((len(rows), encoder.hidden), np.float32)
    values[[isinstance(row, str) for row in rows]] = encoder([row for row in rows if isinstance(row, str)])
    return _columns(values, rows)


def _columns(values: np.ndarray, rows: Sequence[Row]) -> dict[str, pa.Array]:
    # NaN, for before version 26 pyarrow neither writes nor reads a null among lists of fixed size.
    values[[isinstance(row, Problem) for row in rows]] = np.nan
    return {
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1]),
        "problem": pa.array([row.reason if isinstance(row, Problem) else None for row in rows], pa.string()),
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


class _Parts:
    """The folder of what is finished.

    `settings.json` says of what run; `embeddings` holds float32 (rows, hidden) with each finished row at its place;
    `journal` has a line `chunk batches` for each finished batch: so many batches of that chunk are finished, and all
    of the chunks before it. A line is written after the embeddings it speaks of.

    Attributes:
        chunk, batches: how far an earlier run came.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], hidden: int) -> None:
        self.folder, self.hidden = folder, hidden
        folder.mkdir(parents=True, exist_ok=True)
        self._journal = (folder / "journal").open("a+b")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it, whatever ends us
        except OSError:
            self._journal.close()
            raise InputError(
                f"another run is writing to {str(folder)!r}: wait for it, or choose another --out"
            ) from None
        known = folder / "settings.json"
        if known.exists():
            _compare(folder, json.loads(known.read_text(encoding="utf-8")), settings)
        else:
            self._journal.truncate(0)
            written = folder / "settings.json.part"
            written.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
            written.replace(known)
        self._journal.seek(0)
        lines = self._journal.read().split(b"\n")
        self._journal.truncate(sum(len(line) + 1 for line in lines[:-1]))  # a line that was cut off says nothing
        self.chunk, self.batches = map(int, lines[-2].split()) if len(lines) > 1 else (0, 0)
        self._data = os.open(folder / "embeddings", os.O_RDWR | os.O_CREAT, 0o666)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._data)
        self._journal.close()

    def add(self, rows: Sequence[int], embeddings: np.ndarray, chunk: int, batches: int) -> None:
        """Keep a finished batch: its rows and their embeddings."""
        width = 4 * self.hidden
        for row, embedding in zip(rows, embeddings, strict=True):
            _all(os.pwrite(self._data, embedding.tobytes(), row * width), width)
        line = b"%d %d\n" % (chunk, batches)
        _all(os.write(self._journal.fileno(), line), len(line))

    def write(self, out: Path, texts: Texts, keep_text: bool, about: dict[str, Any]) -> None:
        """Write the output, whole or not at all, and remove the folder."""
        kind = pa.list_(pa.float32(), self.hidden)
        fields = {"row": pa.int64(), "text": pa.string(), "embedding": kind, "problem": pa.string()}
        if not keep_text:
            del fields["text"]
        schema = pa.schema(fields, {"fastbert": json.dumps(about)})
        whole = self.folder / "whole.parquet"
        start, width = 0, 4 * self.hidden
        with pq.ParquetWriter(whole, schema, use_dictionary=False) as writer:
            for rows in _chunks(texts):
                held = os.pread(self._data, len(rows) * width, start * width).ljust(len(rows) * width, b"\0")
                columns = {
                    "row": pa.array(range(start, start + len(rows)), pa.int64()),
                    "text": pa.array([row if isinstance(row, str) else None for row in rows], pa.string()),
                    **_columns(np.frombuffer(held, np.float32).reshape(-1, self.hidden).copy(), rows),
                }
                writer.write_table(pa.table([columns[name] for name in schema.names], schema=schema))
                start += len(rows)
        with whole.open("rb") as file:
            os.fsync(file.fileno())
        whole.replace(out)
        shutil.rmtree(self.folder)


def _all(written: int, wanted: int) -> None:
    """A full disk may take a part without an error."""
    if written != wanted:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _compare(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise InputError unless the settings are the same."""
    changed = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if changed:
        long = {"input", "model", "vocabulary"}  # digests
        named = [f"another {n}" if n in long else f"{n} {there.get(n)!r}, now {here.get(n)!r}" for n in changed]
        raise InputError(
            f"{str(folder)!r} holds an unfinished run with {'; '.join(named)}: give it what it had, delete the folder, "
            "or choose another --out"
        )

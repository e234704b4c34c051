"""Rows of text in files and in Arrow columns, and what is wrong with the bad ones. Needs the `encode` extra."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastbert.inputs import InputError

#: The longest cell of a CSV file, in characters; Python's own limit is 131,072.
_LONGEST_CELL = 2**31 - 1


@dataclass(frozen=True)
class Problem:
    """A row that cannot be embedded, and why."""

    reason: str


#: What a row of input is.
Row = str | Problem


def check(value: str | bytes | None) -> Row:
    """A value as text, or what is wrong with it. Lone surrogates stand for bytes that are not UTF-8."""
    if value is None:
        return Problem("null")
    try:
        text = value.decode() if isinstance(value, bytes) else value
        text.encode()
    except UnicodeError:
        return Problem("not UTF-8")
    return text if text.strip() else Problem("empty")


def check_column(column: pa.ChunkedArray | pa.Array, name: str) -> Iterator[Row]:
    """The rows of an Arrow column.

    Raises:
        InputError: when it is not of text.
    """
    if not _is_text(column.type):
        raise InputError(f"column {name!r} is {column.type}, not text: name a column of strings")
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    # As bytes, for Arrow strings may hold bytes that are not UTF-8, on which reading them as strings stops.
    return (check(value.as_py()) for value in column.cast(pa.large_binary()))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(test(kind) for test in (*tests, pa.types.is_null))


class Texts:
    """The rows of a file, in its order: text lines, or a column of a `.csv` or `.parquet` file.

    Bytes that are not UTF-8 make a row bad, not the file. Blank lines are rows of a text file, and none of a CSV file.

    Args:
        path: the file; what it is follows from the end of its name.
        column: of a CSV or Parquet file. Default: its only column of text.

    Attributes:
        column: the column's name; empty for lines.

    Raises:
        InputError: for a file that cannot be read, and a column that is not there, which lists those that are.
    """

    def __init__(self, path: Path, column: str | None = None) -> None:
        self.path = path
        self.kind = path.suffix.lower() if path.suffix.lower() in (".csv", ".parquet") else ".txt"
        try:
            if self.kind == ".parquet":
                schema = pq.read_schema(path)
                self.column = _choose(path, column, schema.names, [f.name for f in schema if _is_text(f.type)])
                check_column(pa.nulls(0, schema.field(self.column).type), self.column)
            elif self.kind == ".csv":
                with self._open() as file:
                    header = next(csv.reader(file), [])
                self.column = _choose(path, column, header, header)
            else:
                self._open().close()
                self.column = ""
                if column is not None:
                    raise InputError(f"{str(path)!r} is read as lines of text, which have no column {column!r}")
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"cannot read {str(path)!r}: {_reason(error)}") from error

    def __len__(self) -> int:
        """How many rows; reads the file unless it says so."""
        return pq.read_metadata(self.path).num_rows if self.kind == ".parquet" else sum(1 for _ in self)

    def __iter__(self) -> Iterator[Row]:
        return {".parquet": self._parquet, ".csv": self._csv, ".txt": self._lines}[self.kind]()

    def _open(self) -> Any:
        newline = "" if self.kind == ".csv" else "\n"
        return self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)

    def _lines(self) -> Iterator[Row]:
        with self._open() as file:
            for line in file:
                yield check(line.rstrip("\r\n"))

    def _csv(self) -> Iterator[Row]:
        csv.field_size_limit(_LONGEST_CELL)
        with self._open() as file:
            records = csv.reader(file)
            place = next(records).index(self.column)
            for record in records:
                if record:
                    yield check(record[place]) if place < len(record) else Problem("fewer cells than the heading")

    def _parquet(self) -> Iterator[Row]:
        try:
            with pq.ParquetFile(self.path) as file:
                for part in file.iter_batches(1024, columns=[self.column]):
                    yield from check_column(part.column(0), self.column)
        except pa.ArrowException as error:
            raise InputError(f"cannot read {str(self.path)!r} to its end: {_reason(error)}") from error


def _choose(path: Path, column: str | None, known: list[str], text: list[str]) -> str:
    listed = ", ".join(known) or "none"
    if column is None and len(text) == 1:
        return text[0]
    if column is None:
        raise InputError(f"{str(path)!r} has {len(text)} columns of text: name the column to embed (it has {listed})")
    if column not in known:
        raise InputError(f"{str(path)!r} has no column {column!r}: choose from {listed}")
    return column


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]

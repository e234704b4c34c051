"""Rows of text in files and in Arrow columns, and what is wrong with the bad ones. Needs the `encode` extra."""

import csv
import hashlib
import json
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastbert.inputs import InputError

#: The longest cell of a CSV file, in characters; Python's own limit is 131,072.
_LONGEST_CELL = 2**31 - 1

#: Files with columns, by the end of their name; any other is of lines.
_TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
#: What stands between the cells of a line.
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_SPOKEN = {",": "commas", "\t": "tabs", ";": "semicolons"}
#: What a file that is no text begins with, whatever its name says -> what it is, and the way out.
_NOT_TEXT = {
    b"PK\3\4": "a ZIP archive, as .xlsx and .docx are: save its text as .csv or .txt",
    b"\x1f\x8b": "packed by gzip: unpack it",
    b"%PDF": "a PDF: save its text as .txt",
    b"PAR1": "Parquet: let its name end in .parquet",
}


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
    if "\0" in text:  # which tokenizers drop
        return Problem("has NUL characters, as UTF-16 read as UTF-8 has")
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
    """The rows of a file, in its order: text lines, or a column of a `.csv`, `.tsv`, `.jsonl` or `.parquet` file.

    Bytes that are not UTF-8, NUL characters, fewer or more cells than the heading, a line that is no JSON object or
    lacks the column make a row bad, not the file. Blank lines are rows of a text file, and none of the others.

    Args:
        path: the file; what it is follows from the end of its name. Cells of a `.tsv` file are quoted as in a `.csv`
            file. Each line of a `.jsonl` file is a JSON object, and the first one says which columns there are.
        column: of a file with columns. Default: its only column of text.

    Attributes:
        column: the column's name; empty for lines.

    Raises:
        InputError: for a file that cannot be read, UTF-16 and what is no text among them, a heading with other
            separators, and a column that is not there, which lists those that are, or there twice. While rows are
            read, for a CSV file whose quotes do not close.
    """

    def __init__(self, path: Path, column: str | None = None) -> None:
        self.path = path
        self.kind = path.suffix.lower() if path.suffix.lower() in _TABLES else ".txt"
        try:
            if self.kind == ".parquet":
                with path.open("rb") as file:  # pyarrow itself opens names in UTF-8 only
                    schema = pq.read_schema(file)
                self.column = _choose(path, column, schema.names, [f.name for f in schema if _is_text(f.type)])
                check_column(pa.nulls(0, schema.field(self.column).type), self.column)
            elif self.kind in _SEPARATORS:
                with self._open() as file:
                    header = next(self._records(file), [])
                if column not in header:
                    self._check_separator(header)
                self.column = _choose(path, column, header, header)
            elif self.kind == ".jsonl":
                first = next(self._objects(), {})
                if isinstance(first, Problem):
                    raise InputError(f"cannot read {str(path)!r}: its first line is {first.reason}")
                self.column = _choose(path, column, list(first), [k for k, v in first.items() if isinstance(v, str)])
            elif path.suffix.lower() == ".json":  # whose lines are no texts
                raise InputError(
                    f"{str(path)!r} is JSON: write one object a line, into a file whose name ends in .jsonl"
                )
            else:
                with self._open() as file:
                    file.read(0)
                self.column = ""
                if column is not None:
                    raise InputError(f"{str(path)!r} is read as lines of text, which have no column {column!r}")
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"cannot read {str(path)!r}: {_reason(error)}") from error

    def __len__(self) -> int:
        """How many rows; reads the file unless it says so."""
        if self.kind != ".parquet":
            return sum(1 for _ in self)
        with self.path.open("rb") as file:
            return pq.read_metadata(file).num_rows

    def digest(self) -> str:
        """SHA-256 of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def __iter__(self) -> Iterator[Row]:
        if self.kind in _SEPARATORS:
            return self._cells()
        return {".parquet": self._parquet, ".jsonl": self._values, ".txt": self._lines}[self.kind]()

    def _open(self) -> Any:
        with self.path.open("rb") as file:
            start = file.read(4)
        if start[:2] in (BOM_UTF16_LE, BOM_UTF16_BE):
            raise InputError(f"{str(self.path)!r} is UTF-16: save it as UTF-8, such as by iconv -f UTF-16 -t UTF-8")
        for begin, what in _NOT_TEXT.items():
            if start.startswith(begin):
                raise InputError(f"{str(self.path)!r} is {what}")
        newline = "" if self.kind in _SEPARATORS else "\n"
        return self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)

    def _lines(self) -> Iterator[Row]:
        with self._open() as file:
            for line in file:
                yield check(line.rstrip("\r\n"))

    def _cells(self) -> Iterator[Row]:
        with self._open() as file:
            records = self._records(file)
            header = next(records)
            place = header.index(self.column)
            for record in records:
                if place >= len(record):
                    yield Problem("fewer cells than the heading")
                elif any(record[len(header) :]):  # a comma outside quotes cuts a text
                    yield Problem("more cells than the heading")
                else:
                    yield check(record[place])

    def _check_separator(self, header: list[str]) -> None:
        """InputError for a heading that is one cell by this file's separator, and several by another."""
        own = _SEPARATORS[self.kind]
        other = next((mark for mark in _SPOKEN if mark != own and mark in "".join(header)), None)
        if len(header) == 1 and other is not None:
            raise InputError(
                f"{str(self.path)!r} has one column, {header[0]!r}: cells of a {self.kind} file stand between "
                f"{_SPOKEN[own]}, these between {_SPOKEN[other]}; save it so, or name that column"
            )

    def _records(self, file: Any) -> Iterator[list[str]]:
        """The records of a CSV or TSV file that are not blank lines."""
        csv.field_size_limit(_LONGEST_CELL)
        reader = csv.reader(file, strict=True, delimiter=_SEPARATORS[self.kind])
        line = 1
        try:
            for record in reader:
                if record:
                    yield record
                line = reader.line_num + 1
        except csv.Error as error:
            raise InputError(
                f"cannot read {str(self.path)!r}, the record in line {line}: {error}; a quoted cell has to end in a "
                "quote, and quotes inside it are doubled"
            ) from error

    def _values(self) -> Iterator[Row]:
        for found in self._objects():
            if isinstance(found, Problem):
                yield found
                continue
            value = found.get(self.column)
            if value is None or isinstance(value, str):
                yield check(value) if self.column in found else Problem(f"no {self.column!r}")
            else:
                yield Problem(f"{type(value).__name__}, not text")

    def _objects(self) -> Iterator[dict[str, Any] | Problem]:
        """The objects of a JSON Lines file, one a line that is not blank."""
        with self._open() as file:
            for line in file:
                if not line.strip():
                    continue
                try:
                    found = json.loads(line)
                except (ValueError, RecursionError):
                    found = None
                yield found if isinstance(found, dict) else Problem("no JSON object")

    def _parquet(self) -> Iterator[Row]:
        try:
            with self.path.open("rb") as file:
                for part in pq.ParquetFile(file).iter_batches(1024, columns=[self.column]):
                    yield from check_column(part.column(0), self.column)
        except pa.ArrowException as error:
            raise InputError(f"cannot read {str(self.path)!r} to its end: {_reason(error)}") from error


def _choose(path: Path, column: str | None, known: list[str], text: list[str]) -> str:
    listed = ", ".join(known) or "none"
    if column is None and len(text) == 1:
        column = text[0]
    if column is None:
        raise InputError(f"{str(path)!r} has {len(text)} columns of text: name the column to embed (it has {listed})")
    if column not in known:
        raise InputError(f"{str(path)!r} has no column {column!r}: choose from {listed}")
    if known.count(column) > 1:
        raise InputError(f"{str(path)!r} has {known.count(column)} columns {column!r}: give each a name of its own")
    return column


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]

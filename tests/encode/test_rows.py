"""Rows of every kind of file: each is read, or says what is wrong with it."""

from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="pip install 'fastbert[encode]'")

import pyarrow as pa
import pyarrow.parquet as pq

from fastbert.encode.rows import Problem, Texts, check
from fastbert.inputs import InputError


def test_rows_of_every_kind_of_file(tmp_path: Path) -> None:
    rows = ["one", Problem("empty"), "drei, vier", Problem("not UTF-8"), "fünf"]
    lines = tmp_path / "a.txt"
    lines.write_bytes(b"\xef\xbb\xbfone\r\n  \ndrei, vier\nsi\xffx\nf\xc3\xbcnf")
    assert list(Texts(lines)) == rows
    table = tmp_path / "a.csv"
    table.write_bytes(b'id,text\n1,one\n2,""\n3,"drei, vier"\n\n4,si\xffx\n5,f\xc3\xbcnf\n')
    assert list(Texts(table, "text")) == rows
    assert list(Texts(table, "id")) == list("12345")
    raw = pa.array([b"one", b"", b"drei, vier", b"si\xffx", "fünf".encode(), None])
    unchecked = pa.StringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])
    for column in (raw, unchecked, raw.cast(pa.large_binary()), raw.dictionary_encode()):
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"n": range(6), "text": column}), path)
        assert list(Texts(path)) == [*rows, Problem("null")]
        assert len(Texts(path)) == 6
    assert check("\udcff") == Problem("not UTF-8")
    table.write_text("text,more\nlong " + "x" * 200_000 + ",1\n")
    assert [len(str(row)) for row in Texts(table, "text")] == [200_005]


def test_files_and_columns_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\n1,one\n")
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "bad.parquet").write_text("no parquet")
    pq.write_table(pa.table({"n": [1], "text": ["one"]}), tmp_path / "a.parquet")
    for name, column, message in (
        ("a.csv", "body", "no column 'body': choose from id, text"),
        ("a.csv", None, "2 columns of text: name the column to embed"),
        ("a.parquet", "body", "no column 'body': choose from n, text"),
        ("a.parquet", "n", "column 'n' is int64, not text"),
        ("a.txt", "body", "lines of text"),
        ("bad.parquet", None, "cannot read .*bad.parquet"),
        ("none.txt", None, "No such file"),
    ):
        with pytest.raises(InputError, match=message):
            Texts(tmp_path / name, column)

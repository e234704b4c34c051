"""Rows of every kind of file: each is read, or says what is wrong with it."""

from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="pip install pyarrow")

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


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.xlsx", "a.gz", "noname"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\3\4\x14\0", "is a ZIP archive, as .xlsx and .docx are: save its text as .csv or .txt"),
        (b"\x1f\x8b\x08\0", "is packed by gzip: unpack it"),
        (b"%PDF-1.7\n", "is a PDF: save its text as .txt"),
        (b"PAR1\x15\4", "is Parquet: let its name end in .parquet"),
    ],
)
def test_files_that_are_no_text_whatever_their_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}' {message}"):
        Texts(tmp_path / name)


def test_lines_of_json_are_no_texts(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n{"text": "one"}\n]\n')
    with pytest.raises(InputError, match=r"a\.json' is JSON: write one object a line, into .* ends in \.jsonl"):
        Texts(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "heading", "message"),
    [
        ("a.csv", "id;text", "cells of a .csv file stand between commas, these between semicolons"),
        ("a.csv", "id\ttext", "cells of a .csv file stand between commas, these between tabs"),
        ("a.tsv", "id,text", "cells of a .tsv file stand between tabs, these between commas"),
    ],
)
def test_other_separators_are_told(tmp_path: Path, name: str, heading: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(f"{heading}\n1one\n")
    for column in (None, "text"):
        with pytest.raises(InputError, match=f"has one column, .*: {message}; save it so, or name that column"):
            Texts(path, column)
    assert list(Texts(path, heading)) == ["1one"]


def test_a_tsv_file_is_a_csv_file_with_tabs(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('id\ttext\n1\tone, two\n\n2\t"three\tfour"\n3\n', encoding="utf-8")
    assert list(Texts(path, "text")) == ["one, two", "three\tfour", Problem("fewer cells than the heading")]
    with pytest.raises(InputError, match="no column 'body': choose from id, text"):
        Texts(path, "body")


def test_a_jsonl_file_has_an_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        '{"id": 1, "text": "one"}', "", '{"text": "zwei\\n\\u00fc", "more": [1]}', '{"id": 3}', '{"text": null}',
        '{"text": 5}', '{"text": " "}', '{"text": "\\ud800"}', '["text"]', '{"text": "x"', "[" * 100_000,
    ]  # fmt: skip
    path.write_text("\r\n".join(lines), encoding="utf-8")
    bad = ["no 'text'", "null", "int, not text", "empty", "not UTF-8", *["no JSON object"] * 3]
    for column in ("text", None):
        assert list(Texts(path, column)) == ["one", "zwei\n\u00fc", *map(Problem, bad)]
    assert len(Texts(path)) == 10
    for content, column, message in (
        ('{"a": "x", "b": "y"}', None, r"2 columns of text: name the column to embed \(it has a, b\)"),
        ('{"a": "x"}', "b", "no column 'b': choose from a"),
        ("[1]", None, "its first line is no JSON object"),
        ("", None, "0 columns of text"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            Texts(path, column)


def read(path: Path, content: bytes | str, column: str | None = None) -> list[object]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    texts = Texts(path, column)
    rows = list(texts)
    assert len(texts) == len(rows)
    return rows


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('id,text\n1,one\n2,"two\n3,three\n4,four\n', 3),
        ('id,text\n1,one\n\n2,two\n3,"three, \n', 5),
        ('id,text\n1,"one\nand more"\n2,"two "2" two"\n', 4),
        ('id,"text\n1,one\n', 1),
    ],
)
def test_a_quote_that_does_not_close_is_told_with_its_line(tmp_path: Path, content: str, line: int) -> None:
    with pytest.raises(InputError, match=rf"a\.csv', the record in line {line}: .*quotes inside it are doubled"):
        read(tmp_path / "a.csv", content, "text")


def test_columns_of_one_name_are_told(tmp_path: Path) -> None:
    for column in ("text", None):
        with pytest.raises(InputError, match=r"2 columns 'text': give each a name|2 columns of text: name the column"):
            read(tmp_path / "a.csv", "text,text\none,two\n", column)
    assert read(tmp_path / "a.csv", "n,text,n\n1,one,2\n", "text") == ["one"]
    table = pa.table([pa.array(["one"]), pa.array(["two"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match="2 columns 'text'"):
        Texts(tmp_path / "a.parquet", "text")


def test_rows_of_another_width_than_the_heading(tmp_path: Path) -> None:
    more, fewer = Problem("more cells than the heading"), Problem("fewer cells than the heading")
    rows = read(tmp_path / "a.csv", "id,text\n1,one\n2,two, three\n3\n4,four,,\n", "text")
    assert rows == ["one", more, fewer, "four"]


@pytest.mark.parametrize("name", ["a.txt", "a.csv"])
@pytest.mark.parametrize("kind", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_told(tmp_path: Path, name: str, kind: str) -> None:
    content = "text\nrain\nwind".encode(kind)
    if kind == "utf-16":
        with pytest.raises(InputError, match=rf"{name}' is UTF-16: save it as UTF-8"):
            read(tmp_path / name, content)
    else:  # without a mark at its begin
        rows = read(tmp_path / name, content)
        assert all(isinstance(row, Problem) and "NUL" in row.reason for row in rows)


def test_nul_characters_make_a_row_bad(tmp_path: Path) -> None:
    bad = Problem("has NUL characters, as UTF-16 read as UTF-8 has")
    assert read(tmp_path / "a.txt", "one\nt\0wo\n\0\n") == ["one", bad, bad]
    assert read(tmp_path / "a.csv", "text\none\nt\0wo\n") == ["one", bad]
    pq.write_table(pa.table({"text": ["one", "t\0wo"]}), tmp_path / "a.parquet")
    assert list(Texts(tmp_path / "a.parquet")) == ["one", bad]


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "\udcff.parquet"
    with path.open("wb") as file:
        pq.write_table(pa.table({"text": ["one"]}), file)
    assert list(Texts(path)) == ["one"]
    assert len(Texts(path)) == 1

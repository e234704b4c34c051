"""Embeddings in bulk: right, in order, whatever the lengths, and wherever a run was stopped."""

import errno
import fcntl
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

from fastbert.cli import app
from fastbert.encode import Batch, Encoder
from fastbert.inputs import SENTENCES, InputError

pytest.importorskip("pyarrow", reason="pip install 'fastbert[encode]'")

import pyarrow as pa
import pyarrow.parquet as pq

from fastbert import bulk
from fastbert.rows import Problem, Texts, check

TEXTS = [" ".join(SENTENCES)[i * 13 : i * 13 + 5 + 29 * i % 310] + " end" for i in range(40)]


def plain_embeddings(folder: Path, texts: list[str], pooling: str = "mean", max_length: int = 128) -> np.ndarray:
    """By Hugging Face's model, a text at a time."""
    model = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in texts:
        encoded = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**encoded).last_hidden_state[0]
        rows.append((hidden.mean(0) if pooling == "mean" else hidden[0]).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("tokens", [1, 150, 100_000])
def test_embeddings_are_hugging_faces(tiny: Path, pooling: str, tokens: int) -> None:
    encoder = Encoder(tiny, pooling=pooling, tokens=tokens, device="cpu")
    ours = encoder(TEXTS)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, plain_embeddings(tiny, TEXTS, pooling), atol=2e-6)
    unit = Encoder(tiny, pooling=pooling, normalize=True, device="cpu")(TEXTS)
    np.testing.assert_allclose(unit, ours / np.linalg.norm(ours, axis=1, keepdims=True), atol=2e-6)


def test_batches_keep_to_the_tokens_and_hold_each_text_once(tiny: Path) -> None:
    encoder = Encoder(tiny, tokens=100, device="cpu")
    batches = encoder.batches(TEXTS)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(TEXTS)))
    lengths = [len(ids) for batch in batches for ids in batch.ids]
    assert lengths == sorted(lengths, reverse=True)
    assert all(sum(map(len, batch.ids)) <= 100 or len(batch.ids) == 1 for batch in batches)
    assert len(batches) < 0.6 * len(TEXTS)
    assert encoder([]).shape == (0, 32)
    assert encoder.batches([]) == []


def test_a_model_at_hand_and_half_precision(tiny: Path) -> None:
    model, tokenizer = transformers.BertModel.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    half = Encoder(model, tokenizer, dtype="bf16", max_length=9, device="cpu")(TEXTS)
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, plain_embeddings(tiny, TEXTS, max_length=9), atol=0.05)


def test_what_no_encoder_is_made_of(tiny: Path) -> None:
    for wrong, message in (
        ({"pooling": "max"}, "unknown pooling 'max': choose from mean, cls"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"device": "tpu"}, "unknown device"),
        ({"max_length": 500}, "takes 3 to 128"),
        ({"tokens": 0}, "at least 1"),
        ({"tokenizer": object()}, "its own tokenizer"),
    ):
        with pytest.raises(InputError, match=message):
            Encoder(tiny, **wrong)  # type: ignore[arg-type]
    model = transformers.BertModel.from_pretrained(tiny)
    with pytest.raises(InputError, match="without a tokenizer"):
        Encoder(model)
    with pytest.raises(InputError, match="decoder"):
        Encoder(transformers.BertModel(transformers.BertConfig(is_decoder=True)), AutoTokenizer.from_pretrained(tiny))
    with pytest.raises(TypeError, match=r"texts\[1\] is NoneType"):
        Encoder(tiny, device="cpu")(["a", None])  # type: ignore[list-item]


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


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "CHUNK_ROWS", 12)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join([*TEXTS[:20], "", *TEXTS[20:]]), encoding="utf-8")
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["encode", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.mark.usefixtures("small_chunks")
def test_the_command_writes_every_row_in_order(tiny: Path, lines: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.parquet"
    result = run(tiny, lines, "--out", out, "--tokens", "200", "--keep-text", "--device", "cpu")
    assert result.exit_code == 1
    assert "row 20: empty" in result.stderr
    assert "1 of 41 rows are bad: 1 empty" in result.stderr
    table = pq.read_table(out)
    assert table.schema.names == ["row", "text", "embedding", "problem"]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 32)
    assert table["row"].to_pylist() == list(range(41))
    assert table["text"].to_pylist() == [*TEXTS[:20], None, *TEXTS[20:]]
    assert table["problem"].to_pylist() == [*[None] * 20, "empty", *[None] * 20]
    embeddings = table["embedding"].to_pylist()
    assert np.isnan(embeddings.pop(20)).all()
    np.testing.assert_allclose(np.array(embeddings), plain_embeddings(tiny, TEXTS), atol=2e-6)
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.parquet"]


def test_good_rows_end_with_0_and_bad_input_with_2(tiny: Path, lines: Path, tmp_path: Path) -> None:
    good, out = tmp_path / "good.csv", tmp_path / "out.parquet"
    good.write_text("text\nrain\n")
    assert run(tiny, good, "--out", out, "--device", "cpu").exit_code == 0
    before = out.read_bytes()
    for arguments, message in (
        ([tmp_path / "none.txt", "--out", out], "no file"),
        ([lines, "--out", tmp_path / "out.npy"], "let its name end in .parquet"),
        ([out, "--out", out], "is the input"),
        ([good, "--out", out, "--column", "body"], "no column 'body': choose from text"),
        ([good, "--out", out, "--pooling", "max"], "unknown pooling 'max': choose from mean, cls"),
        ([good, "--out", good / "x.parquet"], "cannot be written"),
    ):
        result = run(tiny, *arguments)
        assert result.exit_code == 2, result.output
        assert message in result.stderr
    assert out.read_bytes() == before


def encode(tiny: Path, lines: Path, out: Path, **settings: Any) -> bulk.Summary:
    return bulk.encode_file(Encoder(tiny, tokens=100, device="cpu", **settings), Texts(lines), out)


def same(one: Path, other: Path) -> bool:
    """Whether two files hold the same, bit for bit."""
    tables = [pq.read_table(path) for path in (one, other)]
    bits = [np.array(table["embedding"].to_pylist(), np.float32).tobytes() for table in tables]
    return bits[0] == bits[1] and tables[0].drop("embedding").equals(tables[1].drop("embedding"))


class Stop(Exception):  # noqa: N818
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
    """Make the encoder fail after so many batches; the list tells how many it did."""
    done = [0]
    right = Encoder.embed

    def embed(self: Encoder, batch: Batch) -> np.ndarray:
        if done[0] == count:
            raise Stop
        done[0] += 1
        return right(self, batch)

    monkeypatch.setattr(Encoder, "embed", embed)
    return done


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_second_run_does_only_what_is_left(
    tiny: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    whole, out = tmp_path / "whole.parquet", tmp_path / "out.parquet"
    batches = stop_after(monkeypatch, -1)
    encode(tiny, lines, whole)
    first = batches[0]
    with monkeypatch.context() as patch:
        stop_after(patch, count)
        with pytest.raises(Stop):
            encode(tiny, lines, out)
    assert not out.exists()
    with (tmp_path / "out.parquet.parts" / "journal").open("ab") as journal:
        journal.write(b"9")  # cut off by a kill
    before = batches[0]
    summary = encode(tiny, lines, out)
    assert batches[0] - before == first - count
    assert summary.rows == 41
    assert (summary.resumed > 0) == (count > 0)
    assert summary.bad == [(20, "empty")]
    assert same(out, whole)


@pytest.mark.usefixtures("small_chunks")
def test_a_full_disk_loses_no_finished_batch(tiny: Path, lines: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.parquet", tmp_path / "out.parquet"
    encode(tiny, lines, whole)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15 * 32 * 4 + 50, hard))  # 15 rows, and a part of the next
    try:
        result = run(tiny, lines, "--out", out, "--tokens", "100", "--device", "cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.exit_code == 2
    assert os.strerror(errno.EFBIG) in result.stderr or os.strerror(errno.ENOSPC) in result.stderr
    assert "the same command goes on from there" in result.stderr
    assert not out.exists()
    summary = encode(tiny, lines, out)
    assert summary.resumed >= 12
    assert same(out, whole)


@pytest.mark.usefixtures("small_chunks")
def test_another_run_does_not_mix_with_an_unfinished_one(
    tiny: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.parquet"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stop):
            encode(tiny, lines, out)
    with pytest.raises(InputError, match=r"pooling 'mean', now 'cls'; normalize False, now True"):
        encode(tiny, lines, out, pooling="cls", normalize=True)
    encoder = Encoder(tiny, tokens=100, device="cpu")
    with torch.no_grad():
        encoder.bert.encoder.layer[1].output.dense.bias[3] += 1
    with pytest.raises(InputError, match=r"unfinished run with another model: "):
        bulk.encode_file(encoder, Texts(lines), out)
    text = lines.read_text()
    lines.write_text(text + "\nmore")
    with pytest.raises(InputError, match="another input"):
        encode(tiny, lines, out)
    lines.write_text(text)
    with (tmp_path / "out.parquet.parts" / "journal").open() as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run is writing"):
            encode(tiny, lines, out)
    assert encode(tiny, lines, out).resumed > 0


def test_killed_half_way(tiny: Path, lines: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.parquet", tmp_path / "out.parquet"
    encode(tiny, lines, whole)
    batches = len(Encoder(tiny, tokens=100, device="cpu").batches(TEXTS))
    program = f"""
        import os, signal, sys
        from fastbert.cli import app
        from fastbert.encode import Encoder

        embed, done = Encoder.embed, 0

        def killed(self, batch):
            global done
            done += 1
            if done > {batches // 2}:
                os.kill(os.getpid(), signal.SIGKILL)
            return embed(self, batch)

        Encoder.embed = killed
        app()
    """
    command = ["encode", str(tiny), str(lines), "--out", str(out), "--tokens", "100", "--device", "cpu"]
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program), *command], capture_output=True)
    assert killed.returncode == -9, killed.stderr
    assert not out.exists()
    summary = encode(tiny, lines, out)
    assert 0 < summary.resumed < 41
    assert same(out, whole)

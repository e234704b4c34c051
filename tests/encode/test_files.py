"""Files of text to files of embeddings: whole, in order, and wherever a run was stopped."""

import errno
import fcntl
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from embedded import TEXTS, Stop, encode, plain_embeddings, same, stop_after
from typer.testing import CliRunner, Result

from fastbert.cli import app
from fastbert.encode import Encoder
from fastbert.encode.encoder import PackedTexts
from fastbert.inputs import InputError

pytest.importorskip("pyarrow", reason="pip install pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq

from fastbert.encode import files
from fastbert.encode.rows import Texts


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
        ([tmp_path, "--out", out], "is a folder: name the model first, then a file of text"),
        ([lines, "--out", tmp_path / "out.npy"], "let its name end in .parquet"),
        ([out, "--out", out], "is the input"),
        ([good, "--out", out, "--column", "body"], "no column 'body': choose from text"),
        ([good, "--out", out, "--pooling", "sum"], "unknown pooling 'sum': choose from mean, cls"),
        ([good, "--out", good / "x.parquet"], "cannot be written"),
    ):
        result = run(tiny, *arguments)
        assert result.exit_code == 2, result.output
        assert message in result.stderr
    assert out.read_bytes() == before


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
        files.encode_file(encoder, Texts(lines), out)
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


@pytest.mark.usefixtures("small_chunks")
def test_an_interruption_says_what_is_kept(
    tiny: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, right = tmp_path / "out.parquet", Encoder.embed
    arguments = (tiny, lines, "--out", out, "--tokens", "100000", "--device", "cpu")

    def interrupt_at(count: int) -> None:
        done = iter(range(count))

        def embed(self: Encoder, batch: PackedTexts) -> np.ndarray:
            if next(done, None) is None:
                raise KeyboardInterrupt
            return right(self, batch)

        monkeypatch.setattr(Encoder, "embed", embed)

    for count, message in (
        (0, "; nothing was finished"),
        (2, f"; 24 of 41 rows are finished and kept in {out}.parts, the same command goes on from there"),
    ):
        interrupt_at(count)
        result = run(*arguments)
        assert result.exit_code == 130
        assert result.stderr.replace("\n", "").endswith(f"stopped: interrupted{message}")
    with monkeypatch.context() as patch:
        patch.setattr(files, "encode_file", lambda *args, **kwargs: interrupt())
        assert f"what an earlier run finished is kept in {out}.parts" in run(*arguments).stderr
    monkeypatch.setattr(Encoder, "embed", right)
    result = run(*arguments)
    assert result.exit_code == 1
    assert "rows were finished before" in result.stderr


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("small_chunks")
def test_texts_that_are_cut_are_counted(
    tiny: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [len(ids) for ids in Encoder(tiny, device="cpu").tokenizer(TEXTS)["input_ids"]]
    limit = sorted(lengths)[20]  # of one text at least this is the length, which is not cut
    wanted = sum(length > limit for length in lengths)
    out = tmp_path / "out.parquet"
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Stop):
            encode(tiny, lines, out, max_length=limit)
    assert encode(tiny, lines, out, max_length=limit).cut == wanted
    result = run(tiny, lines, "--out", out, "--max-length", str(limit), "--device", "cpu")
    assert f"{wanted} texts are longer than {limit} tokens: their ends were cut off" in result.stderr

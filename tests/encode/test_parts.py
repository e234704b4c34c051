"""What an unfinished run leaves: the next one believes only what is there, and deletes only what is its own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embedded import Stop, encode, same, stop_after
from transformers import AutoTokenizer, BertModel
from typer.testing import CliRunner

pytest.importorskip("pyarrow", reason="pip install pyarrow")

import pyarrow.parquet as pq

from fastbert.cli import app
from fastbert.encode import Encoder, files
from fastbert.encode.parts import FILES
from fastbert.encode.rows import Texts
from fastbert.inputs import InputError

pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.parquet"


@pytest.fixture
def parts(tiny: Path, lines: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that stopped in its second chunk, after 7 batches."""
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Stop):
            encode(tiny, lines, out)
    folder = out.with_name("out.parquet.parts")
    assert (folder / "journal").read_text().split()[1::4].count("-1") >= 1
    return folder


def truncate(count: int) -> Callable[[Path], None]:
    def cut(embeddings: Path) -> None:
        embeddings.write_bytes(embeddings.read_bytes()[:count])

    return cut


def blank(start: int, count: int) -> Callable[[Path], None]:
    """Zeros, as a file system leaves that wrote the journal and lost the data."""

    def write(embeddings: Path) -> None:
        held = embeddings.read_bytes()
        assert any(held[start : start + count])
        embeddings.write_bytes(held[:start] + bytes(count) + held[start + count :])

    return write


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (Path.unlink, False),
        (truncate(0), False),
        (truncate(5 * 128 + 3), False),
        (truncate(13 * 128), True),
        (blank(3 * 128, 128), True),
        (blank(0, 12 * 128), True),
    ],
)
def test_embeddings_that_are_not_there_are_made_again(
    tiny: Path, lines: Path, tmp_path: Path, out: Path, parts: Path, damage: Callable[[Path], None], kept: bool
) -> None:
    whole = tmp_path / "whole.parquet"
    encode(tiny, lines, whole)
    damage(parts / "embeddings")
    summary = encode(tiny, lines, out)
    assert same(out, whole)
    assert (summary.resumed > 0) == kept


def test_a_line_of_the_journal_that_was_cut_off_does_not_spoil_the_next(
    tiny: Path, lines: Path, out: Path, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = parts / "journal"
    before = journal.read_bytes()
    journal.write_bytes(before + b"1")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stop):
            encode(tiny, lines, out)
    after = journal.read_bytes()
    assert after.startswith(before)
    added = after.removeprefix(before).splitlines()
    assert added
    assert all(int(line.split()[0]) < 4 for line in added)
    encode(tiny, lines, out)


@pytest.mark.parametrize("name", FILES[:3])
def test_files_without_settings_belong_to_no_run(tiny: Path, lines: Path, out: Path, parts: Path, name: str) -> None:
    kept = b"0 0 1 0\n0 -1 1 0\n1 -1 1 0\n2 -1 1 0\n3 -1 1 0\n"
    shutil.rmtree(parts)
    parts.mkdir()
    (parts / name).write_bytes(kept)
    message = f"parts' holds '{name}' without .*: delete the folder, or choose"
    with pytest.raises(InputError, match=message):
        encode(tiny, lines, out)
    assert [path.name for path in parts.iterdir()] == [name]
    assert (parts / name).read_bytes() == kept


def test_a_start_that_was_cut_off_hinders_nobody(tiny: Path, lines: Path, out: Path) -> None:
    folder = out.with_name("out.parquet.parts")
    folder.mkdir()
    (folder / "journal").touch()
    (folder / "settings.json.part").write_text("{")
    assert encode(tiny, lines, out).resumed == 0
    assert not folder.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("settings.json", b"garbage", "settings.json in .* is not of a run that can go on"),
        ("settings.json", b"[1]", "settings.json in .* is not of a run"),
        ("settings.json", b'{"format": 2}', "settings.json in .* is not of a run"),
        ("settings.json", b"\xff\x00", "settings.json in .* is not of a run"),
        ("journal", b"garbage\n", r"journal in .* is damaged \(b'garbage' is no line"),
        ("journal", b"0 1 2\n", "journal in .* is damaged"),
        ("journal", b"\x00\xff\n0 1 2 0\n", "journal in .* is damaged"),
    ],
)
def test_garbage_names_the_folder_to_delete(
    tiny: Path, lines: Path, out: Path, parts: Path, name: str, content: bytes, message: str
) -> None:
    (parts / name).write_bytes(content)
    command = ["encode", tiny, lines, "--out", out, "--tokens", "100", "--device", "cpu"]
    result = CliRunner().invoke(app, [str(word) for word in command])
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    with pytest.raises(InputError, match=f"{message}.*: delete the folder, or choose another --out$"):
        encode(tiny, lines, out)
    assert str(parts) in line
    assert (parts / name).read_bytes() == content
    assert not out.exists()


def test_only_what_the_run_made_is_deleted(tiny: Path, lines: Path, out: Path, parts: Path) -> None:
    (parts / "notes.txt").write_text("mine")
    (parts / "more").mkdir()
    encode(tiny, lines, out)
    assert out.exists()
    assert sorted(path.name for path in parts.iterdir()) == ["more", "notes.txt"]
    encode(tiny, lines, out)
    assert (parts / "notes.txt").read_text() == "mine"


def test_a_file_in_the_folders_place_is_one_line(tiny: Path, lines: Path, out: Path) -> None:
    out.with_name("out.parquet.parts").write_text("mine")
    with pytest.raises(InputError, match=r"out.parquet.parts' cannot be written \(File exists\)"):
        encode(tiny, lines, out)
    assert out.with_name("out.parquet.parts").read_text() == "mine"


def copy_of(tiny: Path, folder: Path, name: str, change: Callable[[Any], Any]) -> Path:
    """The checkpoint with one of its files changed."""
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return folder


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", lambda config: config | {"num_attention_heads": 4}, "another config"),
        ("config.json", lambda config: config | {"hidden_act": "relu"}, "another model; another config"),
        ("config.json", lambda config: config | {"layer_norm_eps": 1e-5}, "another config"),
        ("tokenizer_config.json", lambda config: config | {"do_lower_case": False}, "another tokenizer"),
        ("tokenizer_config.json", lambda config: config | {"truncation_side": "left"}, "another tokenizer"),
    ],
)
def test_models_that_differ_beside_their_weights_are_not_mixed(
    tiny: Path,
    lines: Path,
    tmp_path: Path,
    out: Path,
    parts: Path,
    name: str,
    change: Callable[[Any], Any],
    message: str,
) -> None:
    assert parts.exists()
    other = copy_of(tiny, tmp_path / "other", name, change)
    with pytest.raises(InputError, match=f"holds an unfinished run with {message}: give it what it had"):
        encode(other, lines, out)
    assert encode(copy_of(tiny, tmp_path / "moved", name, lambda same: same), lines, out).resumed > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 20}, "max_length 128, now 20"),
        ({"tokens": 150}, "tokens 100, now 150"),
        ({"dtype": "bfloat16"}, "another model; dtype 'float32', now 'bfloat16'"),
    ],
)
def test_settings_that_decide_a_row_are_not_mixed(
    tiny: Path, lines: Path, out: Path, parts: Path, settings: dict[str, Any], message: str
) -> None:
    assert parts.exists()
    encoder = Encoder(tiny, **{"tokens": 100, "device": "cpu", **settings})
    with pytest.raises(InputError, match=message):
        files.encode_file(encoder, Texts(lines), out)


def test_a_rule_or_a_buffer_changed_at_hand_is_another_model(tiny: Path) -> None:
    model, tokenizer = BertModel.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    encoder = Encoder(model, tokenizer, device="cpu")
    before = encoder.settings()
    encoder(["rain", "rain is falling"])
    assert encoder.settings() == before
    model.embeddings.token_type_ids += 1
    assert encoder.settings()["model"] != before["model"]
    tokenizer.add_tokens(["falling"])
    assert encoder.settings()["tokenizer"] != before["tokenizer"]


@pytest.mark.parametrize("change", ["more rows\n", "changed"])
def test_an_input_that_changes_under_the_run_is_told(
    tiny: Path, lines: Path, out: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    right, text = Encoder.embed, lines.read_text()

    def embed(self: Encoder, batch: Any) -> np.ndarray:
        lines.write_text(text + "\n" + change if change.endswith("\n") else change + text[len(change) :])
        return right(self, batch)

    monkeypatch.setattr(Encoder, "embed", embed)
    with pytest.raises(InputError, match="was changed while"):
        encode(tiny, lines, out)
    assert not out.exists()


def test_embeddings_that_change_under_the_run_are_told(
    tiny: Path, lines: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Encoder.batches

    def batches(self: Encoder, texts: Any) -> Any:
        embeddings = out.with_name("out.parquet.parts") / "embeddings"
        if embeddings.stat().st_size > 24 * 128:
            truncate(24 * 128)(embeddings)
        return right(self, texts)

    monkeypatch.setattr(Encoder, "batches", batches)
    with pytest.raises(InputError, match="was changed while the run went on: start it again"):
        encode(tiny, lines, out)
    assert not out.exists()


def test_a_row_that_overflows_is_bad_and_nothing_else(
    tiny: Path, lines: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, encoder = Encoder.embed, Encoder(tiny, tokens=100, device="cpu", dtype="float16")
    end = encoder.tokenizer.convert_tokens_to_ids("end")

    def embed(self: Encoder, batch: Any) -> np.ndarray:
        embeddings = right(self, batch)
        embeddings[[end in ids for ids in batch.ids], 7] = np.inf
        return embeddings

    monkeypatch.setattr(Encoder, "embed", embed)
    lines.write_text("rain\nend\n\nrain end\na\n")
    summary = files.encode_file(encoder, Texts(lines), out, keep_text=True)
    problems = pq.read_table(out)["problem"].to_pylist()
    overflow = "not finite in float16"
    assert problems == [None, overflow, "empty", overflow, None]
    assert summary.reasons == {overflow: 2, "empty": 1}
    assert pq.read_table(out)["text"].to_pylist() == ["rain", "end", None, "rain end", "a"]
    values = np.array(pq.read_table(out)["embedding"].to_pylist())
    assert np.isnan(values[[1, 2, 3]]).all()
    assert np.isfinite(values[[0, 4]]).all()

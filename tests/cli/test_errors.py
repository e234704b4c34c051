"""What cannot be used ends every command with one line and exit code 2, before any work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from fastbert.cli import app

CPU = ("--device", "cpu")


def run(*arguments: str | Path, **env: str) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", **env})


def one_line(result: Result) -> str:
    """The error, which is all that is said."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.output
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ")
    return line


def commands(model: Path, tmp_path: Path) -> dict[str, Callable[[Path], list[str | Path]]]:
    """Command -> its arguments, given the file to write."""
    texts = tmp_path / "texts.txt"
    texts.write_text("rain\n")
    return {
        "encode": lambda out: ["encode", model, texts, "--out", out, *CPU],
        "attend": lambda out: ["attend", "rain", "--model", model, "--out", out, *CPU],
        "verify": lambda out: ["verify", model, "--text", "rain", "--repeats", "0", "--json", out, *CPU],
        "bench": lambda out: ["bench", model, "--workload", "one", "--seconds", "0", "--json", out, *CPU],
    }


SUFFIXES = {"encode": ".parquet", "attend": ".png", "verify": ".json", "bench": ".json"}


@pytest.mark.parametrize("command", SUFFIXES)
@pytest.mark.parametrize(
    ("name", "value", "known"),
    [
        ("FASTBERT_BACKEND", "fast", "use auto, torch or triton"),
        ("FASTBERT_BACKEND", "", "use auto, torch or triton"),
        ("FASTBERT_CHECK", "yes", "use 0 or 1"),
        ("FASTBERT_TUNED", "off", "use 0 or 1"),
    ],
)
def test_variables_of_nonsense(tiny: Path, tmp_path: Path, command: str, name: str, value: str, known: str) -> None:
    out = tmp_path / f"out{SUFFIXES[command]}"
    result = run(*commands(tiny, tmp_path)[command](out), **{name: value})
    assert one_line(result) == f"error: the environment has {name}={value!r}: {known}, or unset it"
    assert not out.exists()


@pytest.mark.parametrize("command", ["encode", "attend", "bench"])
def test_a_backend_that_cannot_run_here(
    tiny: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastbert_kernels import backend

    module = __import__("fastbert_kernels.backend", fromlist=["INTERPRETED"])
    monkeypatch.setattr(module, "INTERPRETED", False)
    with backend("triton"):
        line = one_line(run(*commands(tiny, tmp_path)[command](tmp_path / f"out{SUFFIXES[command]}")))
    assert "without Triton's interpreter: set TRITON_INTERPRET=1" in line


@pytest.mark.parametrize("command", SUFFIXES)
@pytest.mark.parametrize("place", ["/proc/out", "/sys/new/out", "{tmp}/texts.txt/out", "{tmp}/" + "a" * 260])
def test_places_that_cannot_be_written(tiny: Path, tmp_path: Path, command: str, place: str) -> None:
    out = Path(place.format(tmp=tmp_path) + SUFFIXES[command])
    line = one_line(run(*commands(tiny, tmp_path)[command](out)))
    assert str(out) in line
    assert "cannot be written: choose another place" in line


def test_the_folder_of_unfinished_work_has_a_longer_name(tiny: Path, tmp_path: Path) -> None:
    assert run(*commands(tiny, tmp_path)["encode"](tmp_path / ("a" * 241 + ".parquet"))).exit_code == 0
    line = one_line(run(*commands(tiny, tmp_path)["encode"](tmp_path / ("a" * 242 + ".parquet"))))
    assert ".parquet.parts/journal' cannot be written: choose another place (File name too long)" in line


@pytest.mark.parametrize("command", SUFFIXES)
def test_names_that_are_not_utf_8_can_be_written(tiny: Path, tmp_path: Path, command: str) -> None:
    out = tmp_path / f"\udcff{SUFFIXES[command]}"
    arguments = commands(tiny, tmp_path)[command](out)
    result = run(*arguments, *(["--peer", "eager"] if command == "bench" else []))
    assert result.exit_code == 0, result.output
    assert out.exists()


def test_texts_that_are_not_utf_8(tiny: Path, tmp_path: Path) -> None:
    assert "--text 'a\\udcff' is not UTF-8" in one_line(run("verify", tiny, "--text", "a\udcff", *CPU))
    out = tmp_path / "a.png"
    assert "the text 'a\\udcff' is not UTF-8" in one_line(run("attend", "a\udcff", "--model", tiny, "--out", out))
    file = tmp_path / "a.txt"
    for content, message in (
        ("rain\n".encode("utf-16"), "it is not UTF-8"),
        ("rain\n".encode("utf-16-le"), "has NUL characters, as UTF-16 has"),
    ):
        file.write_bytes(content)
        for command in ("verify", "bench"):
            assert message in one_line(run(command, tiny, "--file", file, *CPU))


def test_a_mark_at_the_begin_of_a_file_is_no_text(tmp_path: Path) -> None:
    from fastbert.cli.common import read_sentences

    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfrain\n")
    assert read_sentences(None, file) == ["rain"]


def test_a_models_name_is_no_markup(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "[" / "red]"
    folder.parent.mkdir()
    folder.symlink_to(tiny)
    result = run("verify", folder, "--text", "rain", "--repeats", "0", *CPU)
    assert result.exit_code == 0, result.output
    assert str(folder) in result.stdout
    arguments = ["bench", folder, "--workload", "one", "--peer", "eager", "--seconds", "0"]
    assert run(*arguments, *CPU).exit_code == 0


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "stopped: interrupted; nothing was finished"),
        (torch.OutOfMemoryError("CUDA"), 2, "stopped: out of memory: give fewer --tokens to a batch; nothing was"),
        (OSError(28, "No space left on device"), 2, "stopped: No space left on device; nothing was finished"),
    ],
)
def test_what_stops_a_run_is_told_apart_from_bad_rows(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    from fastbert.encode import Encoder

    def stop(*args: Any) -> None:
        raise error

    monkeypatch.setattr(Encoder, "embed", stop)
    result = run(*commands(tiny, tmp_path)["encode"](tmp_path / "out.parquet"))
    assert result.exit_code == code
    assert message in result.stderr


def test_a_full_disk_at_the_end_is_one_line(tiny: Path, tmp_path: Path) -> None:
    line = one_line(run("verify", tiny, "--text", "rain", "--repeats", "0", "--json", "/dev/full", *CPU))
    assert "--json '/dev/full' cannot be written: choose another place (No space left on device)" in line

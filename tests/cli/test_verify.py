"""`fastbert verify` as a user meets it: what it prints, what it writes, and how it ends."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertModel
from typer.testing import CliRunner, Result

from fastbert.cli import app

TEXT = ["--text", "Rain is falling.", "--text", "Who left the window open?", "--device", "cpu"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "100"})


def test_verify_prints_tables_and_shapes(tiny: Path) -> None:
    result = run("verify", tiny, *TEXT, "--train", "--repeats", "1")
    assert result.exit_code == 0, result.output
    for piece in (
        "hidden_states[2]",
        "(2, 2, 8, 8)",
        "layer 1 attention",
        "within their bounds",
        "HF eager",
        "forward+backward",
        "hidden_states      3 x (2, 8, 32)",
        "attentions         2 x (2, 2, 8, 8)",
    ):
        assert piece in result.stdout
    assert "Loading weights" not in result.output


def test_broken_model_ends_with_1_and_names_the_tensor(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastbert import fusing

    right = fusing.fuse

    def wrong(model: BertModel, packing: bool = True) -> BertModel:
        fused = right(model, packing=packing)
        with torch.no_grad():
            fused.encoder.layer[1].intermediate.dense.weight *= 1.01
        return fused

    monkeypatch.setattr(fusing, "fuse", wrong)
    result = run("verify", tiny, *TEXT)
    assert result.exit_code == 1
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("hidden_states[2]")]
    assert "✗" in row
    assert "tensors are out of bounds" in result.stdout
    assert "Not timed: a result is out of bounds" in result.stdout


@pytest.mark.parametrize(("rms", "chance"), [(0.5, True), (1.5, False)])
def test_a_bound_broken_by_chance_is_told_from_one_broken_by_error(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, rms: float, chance: bool
) -> None:
    from fastbert.verify import compare as module
    from fastbert.verify.report import Report

    right = module.compare

    def compare(*args: Any, **kwargs: Any) -> Report:
        report = right(*args, **kwargs)
        check = report.outputs[3]
        report.outputs[3] = dataclasses.replace(check, error=1.1 * check.bound, rms=rms * check.hf_rms)
        return report

    monkeypatch.setattr(module, "compare", compare)
    result = run("verify", tiny, *TEXT, "--dtype", "bf16", "--repeats", "0")
    assert result.exit_code == 1
    assert "1 of 7 tensors are out of bounds" in result.stdout
    assert "Root mean square errors are " in result.stdout
    assert ("the largest error of few elements is chance" in result.stdout) == chance


def test_json_on_stdout_is_nothing_but_json(tiny: Path) -> None:
    result = run("verify", tiny, *TEXT, "--repeats", "0", "--json", "-")
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    assert content["ok"] is True
    assert content["provenance"]["sentences"] == 2
    assert content["timing_skipped"] == "no repeats asked for"
    assert "last_hidden_state" in result.stderr


def test_json_and_heatmap_files_in_new_folders(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One sentence a line.\n\nBlank lines are left out.\n", encoding="utf-8")
    json_file, png = tmp_path / "a" / "result.json", tmp_path / "b" / "maps.png"
    result = run(
        "verify", tiny, "--file", text, "--device", "cpu", "--repeats", "0", "--json", json_file, "--heatmap", png
    )
    assert result.exit_code == 0, result.output
    assert json.loads(json_file.read_text())["provenance"]["sentences"] == 2
    assert png.read_bytes().startswith(b"\x89PNG")


def test_interpreted_kernels_are_checked_and_not_timed(tiny: Path) -> None:
    result = run("verify", tiny, "--text", "Rain.", "--device", "cpu", "--backend", "triton")
    assert result.exit_code == 0, result.output
    assert "triton, interpreted" in result.stdout
    assert "Not timed: Triton's interpreter" in result.stdout


def test_model_defaults_to_the_environment(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTBERT_CHECKPOINT", str(tiny))
    result = run("verify", *TEXT, "--repeats", "0")
    assert result.exit_code == 0, result.output
    assert "2 layers, 2 heads of 16" in result.stdout


def test_no_model_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTBERT_CHECKPOINT", raising=False)
    monkeypatch.chdir(tmp_path)
    result = run("verify")
    assert result.exit_code == 2
    assert "no model given" in result.stderr
    assert "make demo" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", " "], "--text ' ' is empty"),
        (["--file", "no/such.txt"], "cannot read --file 'no/such.txt' (No such file or directory)"),
        (["--dtype", "int4"], "unknown dtype 'int4': use float32, float16 or bfloat16"),
        (["--device", "abacus"], "unknown device 'abacus': use cpu"),
        (["--backend", "numpy"], "unknown backend 'numpy': use auto, torch or triton"),
        (["--max-length", "1000"], "max length 1000 is out of range: this model takes 3 to 128"),
        (["--heatmap", "maps.svg"], "--heatmap 'maps.svg' is not a PNG"),
        (["--json", "."], "--json '.' is a folder"),
    ],
)
def test_bad_input_ends_with_2_and_one_line(tiny: Path, arguments: list[str], message: str) -> None:
    result = run("verify", tiny, *arguments)
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if "error:" in line]
    assert message in line
    assert "Traceback" not in result.output


@pytest.mark.parametrize("model", ["no/such/folder", "nosuchmodel"])
def test_model_not_found(model: str) -> None:
    result = run("verify", model, "--device", "cpu")
    assert result.exit_code == 2
    assert f"model '{model}' not found: name a folder" in result.stderr


def test_folder_without_checkpoint(tmp_path: Path) -> None:
    result = run("verify", tmp_path)
    assert result.exit_code == 2
    assert "it has no config.json" in result.stderr
    file = tmp_path / "config.json"
    file.write_text("{}")
    result = run("verify", file)
    assert result.exit_code == 2
    assert f"{str(file)!r} is a file: name the folder that it is in" in result.stderr


def test_empty_file(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" \n\n")
    result = run("verify", tiny, "--file", text)
    assert result.exit_code == 2
    assert "has no text" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_that_is_not_there(tiny: Path) -> None:
    result = run("verify", tiny, "--device", "cuda")
    assert result.exit_code == 2
    assert "torch sees no GPU here: use cpu" in result.stderr


def test_heatmap_without_matplotlib_names_the_extra(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("verify", tiny, "--heatmap", "maps.png")
    assert result.exit_code == 2
    assert "pip install matplotlib" in result.stderr


def test_help_does_not_import_torch() -> None:
    code = "import sys, fastbert.cli\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

"""The checkpoint that travels to a GPU."""

from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from bench import checkpoint
from fastbert.verify.compare import compare


def test_a_checkpoint_in_float16_is_half_as_large_and_verifies(tiny: Path, tmp_path: Path) -> None:
    size = checkpoint.shrink(tiny, tmp_path / "small")
    weights = {path: (path / checkpoint.WEIGHTS).stat().st_size for path in (tiny, tmp_path / "small")}
    assert weights[tmp_path / "small"] < 0.52 * weights[tiny] < size
    assert compare(str(tmp_path / "small"), dtype=torch.float32, repeats=0).ok


def test_a_checkpoint_that_is_too_large_is_refused_and_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has [\d.]+ MB in float16, over 0\.1 MB"):
        checkpoint.shrink(tiny, tmp_path / "small", most=100_000)
    assert not (tmp_path / "small").exists()


def test_the_command_says_the_size_or_what_is_missing(tiny: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(checkpoint.main)
    result = CliRunner().invoke(app, [str(tmp_path / "small"), "--source", str(tiny)])
    assert result.exit_code == 0
    assert " MB" in result.output
    again = CliRunner().invoke(app, [str(tmp_path / "small"), "--source", str(tiny)])
    assert (again.exit_code, "is there already" in again.output) == (2, True)
    missing = CliRunner().invoke(app, [str(tmp_path / "other"), "--source", str(tmp_path)])
    assert (missing.exit_code, "`make demo` fetches a checkpoint" in missing.output) == (2, True)

"""`fastbert env`, `fastbert --version` and `python -m fastbert`; help whose lines are whole."""

import importlib.util
import re
import subprocess
import sys

import pytest
import tokenizers
import torch
from typer.testing import CliRunner

import fastbert
from fastbert.cli import app

COMMANDS = ("verify", "bench", "encode", "attend", "tune", "env")


def test_env_has_what_a_bug_report_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTBERT_CHECK", "1")
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0, result.output
    found = dict(re.findall(r"^(.+?)  +(.*)$", result.stdout, re.MULTILINE))
    assert found["fastbert"] == fastbert.__version__
    assert found["torch"] == torch.__version__
    assert found["FASTBERT_CHECK"] == "1"
    assert found["tokenizers"] == tokenizers.__version__
    assert ("peft" in found) == (importlib.util.find_spec("peft") is not None)
    assert {"python", "transformers", "system", "device", "commit", "runs as", "installed in"} <= found.keys()


def test_version_and_the_module_as_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "fastbert", "--version"], capture_output=True, text=True)
    assert done.stdout == f"fastbert {fastbert.__version__}\n", done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_no_line_of_help_is_cut(command: str) -> None:
    for columns in ("80", "200"):
        result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": columns, "TERMINAL_WIDTH": columns})
        assert result.exit_code == 0
        assert "..." not in result.output.replace(" ...", "")
        assert "\N{HORIZONTAL ELLIPSIS}" not in result.output


def test_every_command_is_listed_with_its_whole_line() -> None:
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    listed = re.findall(r"^  (\w+)  +(.*)$", result.stdout.partition("Commands:")[2], re.MULTILINE)
    assert [name for name, _ in listed] == ["verify", "bench", "encode", "attend", "tune", "env"]
    assert not any(line.endswith("...") for _, line in listed)

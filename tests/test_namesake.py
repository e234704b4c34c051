"""The other project of the same import name is told of where it is installed too, and nothing else is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported(folder: Path, program: str = "import fastbert") -> str:
    """What an import says, with another folder of installed packages."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(folder)])
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], env={"PYTHONPATH": path, "PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "summary", "told"),
    [
        ("fastbert-0.2.2.dist-info", "The pipy version of FastBERT", True),
        ("fastbert-0.2.2.egg-info", None, True),
        ("fastbert-0.1.0.dist-info", "A drop-in Hugging Face BertModel on fused Triton kernels", False),
        ("fastbert_triton-0.1.0.dist-info", "A drop-in Hugging Face BertModel on fused Triton kernels", False),
        ("fastbert-data", None, False),
    ],
)
def test_the_namesake_is_told(tmp_path: Path, name: str, summary: str | None, told: bool) -> None:
    folder = tmp_path / "site-packages" / name
    folder.mkdir(parents=True)
    if summary is not None:
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fastbert\nSummary: {summary}\n")
    said = imported(folder.parent)
    assert ("another project, fastbert-0.2.2, is installed in" in said) == told, said
    assert told or said == ""


def test_the_import_stays_light(tmp_path: Path) -> None:
    loaded = imported(
        tmp_path, "import sys; before = set(sys.modules); import fastbert; print(set(sys.modules) - before)"
    )
    assert not {"torch", "transformers", "importlib.metadata", "email"} & set(eval(loaded))


def test_the_command_tells_of_files_that_the_namesake_has_replaced(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "fastbert", tmp_path / "fastbert", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "fastbert" / "__init__.py").write_text("from .fastbert import FastBERT\n")
    (tmp_path / "fastbert" / "fastbert.py").write_text("class FastBERT: pass\n")
    done = subprocess.run([sys.executable, "-m", "fastbert", "env"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: another project has replaced files of this one, fastbert-triton")

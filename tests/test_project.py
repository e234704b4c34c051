"""Files about the project agree with it."""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ids, pair

import fastbert
import fastbert_kernels

ROOT = Path(__file__).parents[1]


def test_the_citation_has_the_version() -> None:
    (found,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert found == fastbert.__version__


def test_extras_name_this_project_by_its_own_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "fastbert-triton"
    asked = [
        line for extra in project["optional-dependencies"].values() for line in extra if line.startswith("fastbert")
    ]
    assert all(line.startswith("fastbert-triton[") for line in asked)


def test_nothing_tells_to_install_the_other_project() -> None:
    """`pip install fastbert` fetches a stranger's code."""
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*"), *ROOT.glob("fastbert/**/*.py")]
    told = [
        (path.name, line)
        for path in texts
        if path.is_file()
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"pip install (-\S+ )*['\"]?fastbert\b(?!-)", line) and "another project" not in line
    ]
    assert told == []


def test_the_way_from_a_call_to_the_kernel_is_the_one_shown(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = [Path(package.__file__).parent for package in (fastbert, fastbert_kernels)]
    passed: list[tuple[str, str]] = []
    op: Any = sys.modules["fastbert_kernels.attention"]
    wrap_triton = op.wrap_triton

    def noted(kernel: Any) -> Any:
        passed.clear()
        frame: Any = sys._getframe(1)
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            passed[:0] = [
                (file.relative_to(p).as_posix(), frame.f_code.co_qualname) for p in packages if p in file.parents
            ]
            frame = frame.f_back
        return wrap_triton(kernel)

    monkeypatch.setattr(op, "wrap_triton", noted)
    with fastbert_kernels.backend("triton"), torch.no_grad():
        pair(device)[1](ids(device=device))
    _, section = (ROOT / "docs/source.md").read_text(encoding="utf-8").split("## From a call to the kernel")
    assert passed == re.findall(r"^(\S+\.py) +(\S+)  ", section, re.MULTILINE)

"""Files about the project agree with it."""

import re
import tomllib
from pathlib import Path

import fastbert

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

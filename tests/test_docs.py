"""What README and docs show runs, and what they link to is there."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

from fastbert.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])
SHOWN = [page for page in PAGES if page.name != "CONTRIBUTING.md"]

#: What follows the three marks of a block: what runs here, and what cannot.
RUN = ("python", "sh", "sh slow")
NOT_RUN = ("text", "python gpu", "sh gpu", "python hub", "sh setup")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[tuple[str, str]]:
    """The code blocks of a page: what kind each is, and what is in it."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def here(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages name: a checkpoint, a classifier and a file of texts."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    shutil.copytree(tiny, tmp_path / "path/to/checkpoint")
    labels = {0: "negative", 1: "neutral", 2: "positive"}
    config = transformers.BertConfig.from_pretrained(tiny, num_labels=3, id2label=labels)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "path/to/classifier")
    tokenizer.save_pretrained(tmp_path / "path/to/classifier")
    (tmp_path / "texts.csv").write_text("id,body\n1,Rain is falling.\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTBERT_CHECKPOINT", "path/to/checkpoint")
    return tmp_path


def run_line(line: str) -> None:
    """A line of a shell, of our own command."""
    words = shlex.split(line, comments=True)
    if not words:
        return
    assert words[0] == "fastbert", f"only `fastbert` runs here: {line}"
    result = CliRunner().invoke(app, words[1:], env={"COLUMNS": "120"})
    assert result.exit_code == 0, (line, result.output, result.exception)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("page", SHOWN, ids=name)
def test_what_is_shown_runs(page: Path) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    above = ""
    for kind, code in blocks(page):
        assert kind in RUN + NOT_RUN, f"{name(page)} has a block of kind {kind!r}"
        if kind == "python":
            exec(compile(code, name(page), "exec"), names)  # each block goes on where the last one ended
        if kind == "sh":
            for line in code.splitlines():
                run_line(line)
        if kind.startswith("python"):
            compile(code, name(page), "exec")
            above += code
            assert not re.search(r"(?<!from )fastbert\.", code) or "import fastbert\n" in above, (
                f"{name(page)} does not import fastbert"
            )


@pytest.mark.slow
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("page", SHOWN, ids=name)
def test_what_is_shown_and_takes_long_runs(page: Path) -> None:
    for kind, code in blocks(page):
        if kind == "sh slow":
            for line in code.splitlines():
                run_line(f"{line.partition('#')[0]} --workload one --seconds 0")


def anchors(page: Path) -> set[str]:
    """What links may name in a page: its headings, as a page of a repository has them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), f"{name(page)} links to {link}, which is not there"
        assert not anchor or anchor in anchors(target), f"{name(page)} links to {link}, and there is no such heading"


def test_readme_is_short_and_begins_with_its_two_commands() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 170
    assert lines[3].startswith("make demo ")
    assert lines[4].startswith("make test ")


def test_every_page_is_named_in_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name(page) for page in SHOWN if name(page) not in readme.replace("# fastbert", "README.md")] == []

"""`fastbert attend`: pages and pictures of a text, and one line for what cannot be shown."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner, Result

from fastbert.cli import app

TEXT = "The keeper of the clocks would not be paid."


@pytest.fixture(scope="module")
def classifier(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random classifier of the tiny checkpoint's size."""
    path = tmp_path_factory.mktemp("classifier")
    config = transformers.BertConfig.from_pretrained(tiny, num_labels=3, id2label={0: "good", 1: "bad", 2: "2"})
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(path)
    return path


def attend(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["attend", TEXT, "--device", "cpu", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.mark.parametrize("end", ["html", "png"])
@pytest.mark.parametrize(
    "options", [[], ["--layer", "1", "--head", "0"], ["--rollout"], ["--attribute", "bad"]], ids=lambda o: "".join(o)
)
def test_pages_and_pictures(classifier: Path, tmp_path: Path, options: list[str], end: str) -> None:
    out = tmp_path / f"a.{end}"
    result = attend("--model", classifier, "--out", out, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"12 tokens: {out}\n"
    if end == "png":
        assert out.read_bytes().startswith(b"\x89PNG")
        return
    page = out.read_text()
    if "--layer" in options:
        assert '"layers": [1], "heads": [0]' in page
    if "--rollout" in options:
        assert "reaches [CLS]" in page
    if "--attribute" in options:
        assert "<h1>What speaks for bad</h1>" in page
        assert re.search(r"gives bad 0\.\d{3}", page)
        assert page.count("<span style=") == 10


def test_a_class_goes_by_its_label_before_its_number(classifier: Path, tmp_path: Path) -> None:
    for wanted, name in (("good", "good"), ("1", "bad"), ("2", "2")):
        assert attend("--model", classifier, "--out", tmp_path / "a.html", "--attribute", wanted).exit_code == 0
        assert f"<h1>What speaks for {name}</h1>" in (tmp_path / "a.html").read_text()


def test_what_cannot_be_shown(tiny: Path, classifier: Path, tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    for arguments, message in (
        (["--out", tmp_path / "a.svg"], "let its name end in .html or .png"),
        (["--out", page, "--layer", "0", "--layer", "2"], "no layer 2: this model has 0 to 1"),
        (["--out", page, "--head", "2"], "no head 2: layer 0 has 0 to 1"),
        (["--out", page, "--device", "tpu"], "unknown device 'tpu'"),
        (["--out", page, "--attribute", "bad"], "is no classifier of sequences: 2 weights miss, as classifier.bias"),
        (["--out", page, "--attribute", "worst", "--model", classifier], "no class 'worst': choose from 0 (good), 1"),
        (["--out", page, "--attribute", "bad", "--rollout"], "give one of them"),
        (["--out", page, "--rollout", "--head", "0"], "leave --layer and --head out"),
    ):
        result = attend("--model", tiny, *arguments)
        assert result.exit_code == 2, result.output
        assert message in result.stderr
    assert not page.exists()
    result = CliRunner().invoke(app, ["attend", " ", "--out", str(page)])
    assert result.exit_code == 2
    assert "is empty" in result.stderr

"""The short examples, as their readers run them: each trains, tests, and says what came of it."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import AutoTokenizer
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("same_verbosity")

SHORT = ("--steps", "2", "--batch-size", "4")


def run(name: str, *arguments: str | Path) -> str:
    app = typer.Typer()
    app.command()(importlib.import_module(name).main)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("token_classification", (), r"\d+ of \d+ people and places of the test are found: \d+\.\d%"),
        ("question_answering", (), r"\d+ of 100 answers of the test are exact: \d+\.\d%"),
        ("rerank", ("--texts", "6"), r"mean average precision [01]\.\d{3}"),
        ("lora", (), r"merged: every part is fused(.|\n)*test accuracy \d+\.\d%"),
        ("attribution", ("--texts", "3", "--output", "{tmp}"), r"2\.html: \w+, from \S+, \S+, \S+"),
    ],
)
def test_it_trains_and_tests(tiny: Path, tmp_path: Path, name: str, arguments: Any, said: str) -> None:
    output = run(name, tiny, *SHORT, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert re.search(said, output), output
    if name == "attribution":
        assert sorted(path.name for path in tmp_path.iterdir()) == ["0.html", "1.html", "2.html"]
        assert "the classifier answers" in (tmp_path / "0.html").read_text()


def test_labels_are_where_the_words_are(tiny: Path) -> None:
    import question_answering
    import token_classification

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = token_classification.make_rows("train", 20, 0)
    batch = token_classification.collate(rows, tokenizer)
    for i, (words, labels) in enumerate(rows):
        found = batch["labels"][i][batch["labels"][i] != token_classification.IGNORED]
        assert found.tolist() == labels
        assert len(words) == len(labels)
        assert (batch["labels"][i][batch["attention_mask"][i] == 0] == token_classification.IGNORED).all()
    asked = question_answering.make_rows("test", 20, 0)
    batch = question_answering.collate(asked, tokenizer)
    for ids, start, end, (_, _, answer) in zip(
        batch["input_ids"], batch["start_positions"], batch["end_positions"], asked, strict=True
    ):
        assert tokenizer.decode(ids[start : end + 1]) == answer.lower()


def test_what_is_tested_on_was_not_trained_on() -> None:
    import rerank
    import steps

    assert not set(steps.NAMES["train"]) & set(steps.NAMES["test"])
    assert not set(steps.PLACES["train"]) & set(steps.PLACES["test"])
    train, test = rerank.read_texts("train"), rerank.read_texts("test")
    assert not {text for text, _ in train} & {text for text, _ in test}
    rows = rerank.make_rows(train, 0)
    assert [row[2] for row in rows[:4]] == [1.0, 0.0, 1.0, 0.0]
    assert all(own[0] != other[0] and own[1] == other[1] for own, other in zip(rows[::2], rows[1::2], strict=True))


def test_average_precision() -> None:
    from rerank import average_precision

    assert average_precision([3.0, 2.0, 1.0, 0.0], [True, False, True, False]) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision([0.0, 1.0], [True, False]) == 0.5
    assert average_precision([1.0, 0.0], [True, False]) == 1.0

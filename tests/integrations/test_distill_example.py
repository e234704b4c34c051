"""examples/distill.py, as its reader runs it."""

from collections import Counter
from pathlib import Path
from typing import Any

import distill
import finetune
import matplotlib.image
import pytest
import torch
import typer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, GPT2Config
from typer.testing import CliRunner, Result

import fastbert

pytestmark = pytest.mark.usefixtures("same_verbosity")


def run(*arguments: str | Path) -> Result:
    app = typer.Typer()
    app.command()(distill.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_it_distils_tests_saves_and_draws(tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    result = run(tiny, "--output", output, "--layers", "1", "--seeds", "2", "--steps", "3", "--batch-size", "4")
    assert result.exit_code == 0, result.output
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines() if "│" in line]
    assert [line[0] for line in lines] == ["seed 0", "seed 1", "mean", "seconds"]
    for column in (1, 2):
        first, second, mean = (float(line[column].removesuffix("%")) for line in lines[:3])
        assert mean == pytest.approx((first + second) / 2, abs=0.11)
    picture = matplotlib.image.imread(output / "loss.png")
    assert picture.shape[:2] == (540, 1200)
    assert picture.std() > 0.01
    student = AutoModelForSequenceClassification.from_pretrained(output / "student").eval()
    assert student.config.num_hidden_layers == 1
    tokenizer = AutoTokenizer.from_pretrained(output / "student")
    _, _, test_set = finetune.load_task(tokenizer)
    batch = tokenizer.pad(test_set, return_tensors="pt")
    with torch.no_grad():
        right = student(**batch).logits.argmax(-1) == batch["labels"]
    assert lines[1][2] == f"{right.float().mean():.1%}"


def some_rows(of_each: int = 10) -> list[dict[str, Any]]:
    return [{"text": f"{label} {i}", "labels": label} for label in range(3) for i in range(of_each)]


def test_half_of_a_batch_has_labels_and_few_texts_ever_do() -> None:
    rows = some_rows()
    batches = list(distill.draw_batches(rows, labelled=2, batch_size=7, steps=200, seed=0))
    assert [sum(row["labels"] != distill.HIDDEN for row in batch) for batch in batches] == [4] * 200
    assert {len(batch) for batch in batches} == {7}
    drawn = {(row["text"], row["labels"]) for batch in batches for row in batch}
    assert Counter(label for _, label in drawn) == {0: 2, 1: 2, 2: 2, distill.HIDDEN: 24}
    assert len({text for text, _ in drawn}) == 30
    assert all(text.startswith(str(label)) for text, label in drawn if label != distill.HIDDEN)
    assert rows == some_rows()


def test_batches_follow_the_seed_and_not_the_student() -> None:
    first, again, other = (list(distill.draw_batches(some_rows(), 2, 8, 5, seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_every_text_may_have_its_label() -> None:
    (batch,) = distill.draw_batches(some_rows(), labelled=10, batch_size=8, steps=1, seed=0)
    assert all(row["labels"] != distill.HIDDEN for row in batch)


@pytest.mark.parametrize(("layers", "sources"), [(1, [4]), (2, [0, 4]), (3, [0, 2, 4]), (5, [0, 1, 2, 3, 4])])
def test_a_student_is_layers_of_its_teacher(layers: int, sources: list[int], tiny: Path, tmp_path: Path) -> None:
    config = BertConfig.from_pretrained(tiny, num_hidden_layers=5)
    fastbert.BertModel(config).save_pretrained(tmp_path)
    teacher = fastbert.BertModel.from_pretrained(tmp_path)
    student = distill.make_student(str(tmp_path), layers, 6, teacher)
    assert student.config.num_labels == 6
    assert len(student.bert.encoder.layer) == layers
    parts = [(student.bert.embeddings, teacher.embeddings), (student.bert.pooler, teacher.pooler)]
    parts += [(student.bert.encoder.layer[i], teacher.encoder.layer[source]) for i, source in enumerate(sources)]
    for ours, theirs in parts:
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name
    frozen = [name for name, p in student.named_parameters() if not p.requires_grad]
    assert frozen
    assert all(name.startswith("bert.embeddings.") for name in frozen)


def test_attention_loss_brings_the_student_to_its_teacher(tiny: Path) -> None:
    """On texts without a label too, and beside the task's loss, not in its place."""
    teacher = fastbert.BertModel.from_pretrained(tiny).eval()
    with torch.no_grad():  # scores large enough to have a shape
        for layer in teacher.encoder.layer:
            for linear in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
                linear.weight.mul_(20)
    batch = {
        "input_ids": torch.randint(1000, 2000, (6, 9)),
        "attention_mask": torch.ones(6, 9, dtype=torch.long),
        "labels": torch.tensor([0, 1, 2, distill.HIDDEN, distill.HIDDEN, distill.HIDDEN]),
    }
    runs = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        student = distill.make_student(str(tiny), 2, 6, teacher)
        with torch.no_grad():
            for p in student.bert.encoder.layer.parameters():
                p.add_(0.1 * torch.randn_like(p))
        shown: list[float] = []
        runs.append(distill.train(student, teacher, iter([batch] * 30), 30, 1e-2, weight, shown.append))
        assert shown == runs[-1].task
    alone, taught = runs
    assert alone.attention == []
    assert alone.task[0] == pytest.approx(taught.task[0])
    assert taught.attention[-1] < 0.7 * taught.attention[0]
    for one in runs:
        assert one.task[-1] < 0.5 * one.task[0]
        assert one.seconds > 0
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "no BERT checkpoint in 'nowhere'"),
        (("{tiny}", "--layers", "3"), "--layers 3 is more than the 2 of the teacher"),
        (("{tiny}", "--layers", "0"), "--layers"),
        (("{tiny}", "--weight", "0"), "--weight must be above 0"),
        (("{tiny}", "--weight", "nan"), "--weight"),
        (("{tiny}", "--batch-size", "1"), "--batch-size"),
        (("{tiny}", "--output", "{file}"), "cannot be a folder"),
        (("{gpt}",), "is of type 'gpt2', not 'bert'"),
        (("{short}",), "takes 40 tokens, and the texts have up to 128"),
    ],
)
def test_what_cannot_be_used_is_named(
    arguments: tuple[str, ...], message: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {name: tmp_path / name for name in ("file", "gpt", "short")} | {"tiny": tiny}
    places["file"].write_text("")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for name, config in {"gpt": GPT2Config(), "short": BertConfig(max_position_embeddings=40)}.items():
        config.save_pretrained(places[name])
        tokenizer.save_pretrained(places[name])
    result = run(*(argument.format_map(places) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr.replace("\n", " ")
    assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run("--output", tmp_path)
    assert result.exit_code == 2
    assert "matplotlib not installed: pip install matplotlib" in result.stderr

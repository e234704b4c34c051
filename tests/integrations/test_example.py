"""examples/finetune.py, as its reader runs it."""

from pathlib import Path

import finetune
import matplotlib.image
import pytest
import transformers
import typer
from typer.testing import CliRunner, Result

pytestmark = pytest.mark.usefixtures("same_verbosity")


def run(*arguments: str | Path) -> Result:
    app = typer.Typer()
    app.command()(finetune.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_it_trains_tests_compares_saves_and_draws(tiny: Path, tmp_path: Path) -> None:
    arguments = ("--steps", "4", "--batch-size", "8", "--dropout", "0")
    result = run(tiny, "--output", tmp_path / "new" / "out", "--compare", "eager", "--compare", "sdpa", *arguments)
    assert result.exit_code == 0, result.output
    assert "every part is fused: embeddings and 2 layers" in result.output
    for name in ("fastbert", "HF eager", "HF sdpa"):
        assert f"│ {name}" in result.output
    difference = result.output.partition("fastbert and HF eager: at no step are the losses further apart than ")[2]
    assert float(difference.split()[0]) < 1e-5
    picture = matplotlib.image.imread(tmp_path / "new" / "out" / "loss.png")
    assert picture.shape[:2] == (540, 960)
    assert picture.std() > 0.01
    saved = tmp_path / "new" / "out" / "model"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(saved)
    assert model.config.id2label[5] == "widgets"
    assert transformers.AutoTokenizer.from_pretrained(saved)("hello")["input_ids"][0] == 101


def test_the_task_is_balanced_and_its_halves_are_apart() -> None:
    class Words:
        def __call__(self, text: str, **kwargs: object) -> dict[str, str]:
            return {"input_ids": text}

    labels, train_set, test_set = finetune.load_task(Words())
    assert labels == ["concurrency", "files", "mail", "numbers", "web", "widgets"]
    for rows, share in ((train_set, 160), (test_set, 40)):
        assert [sum(row["labels"] == i for row in rows) for i in range(6)] == [share] * 6
    assert not {row["input_ids"] for row in train_set} & {row["input_ids"] for row in test_set}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "no BERT checkpoint in 'nowhere'"),
        (("{tiny}", "--precision", "fp16"), "--precision fp16 needs a GPU"),
        (("{tiny}", "--output", "{file}"), "cannot be a folder"),
        (("{tiny}", "--steps", "0"), "--steps"),
        (("{gpt}",), "is of type 'gpt2', not 'bert'"),
        (("{short}",), "takes 40 tokens, and the texts have up to 128"),
    ],
)
def test_what_cannot_be_used_is_named(
    arguments: tuple[str, ...], message: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    places = {name: tmp_path / name for name in ("file", "gpt", "short")} | {"tiny": tiny}
    places["file"].write_text("")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    configs = {"gpt": transformers.GPT2Config(), "short": transformers.BertConfig(max_position_embeddings=40)}
    for name, config in configs.items():
        config.save_pretrained(places[name])
        tokenizer.save_pretrained(places[name])
    result = run(*(argument.format_map(places) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr.replace("\n", " ")
    assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit)


def test_a_missing_demo_checkpoint_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "DEMO_CHECKPOINT", tmp_path / "minilm")
    result = run(tmp_path / "minilm", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "run `make demo`, which fetches one" in result.stderr


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run("--output", tmp_path)
    assert result.exit_code == 2
    assert "accelerate and matplotlib not installed: pip install accelerate matplotlib" in result.stderr

"""Find people and places in sentences: a head for token classification, in a loop of one's own.

The sentences are made; the names and places of the test are none of those that were trained on.

    python examples/token_classification.py
"""

import random
from typing import Annotated, Any

import typer
from steps import DEMO_CHECKPOINT, JOBS, NAMES, PLACES, load, predict, train

LABELS = ("other", "person", "place")
IGNORED = -100

PATTERNS = (
    "{person} moved to {place} last spring .",
    "In {place} , {person} met {person} at the market .",
    "The {job} from {place} wrote to {person} .",
    "{person} and {person} never saw {place} again .",
    "Nobody in {place} knew the {job} .",
    "The {job} told {person} that the train to {place} was late .",
)

Row = tuple[list[str], list[int]]


def make_rows(split: str, count: int, seed: int) -> list[Row]:
    """Sentences as words, each with its label's number."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        words, labels = [], []
        for word in draw.choice(PATTERNS).split():
            kind = word.strip("{}") if word.startswith("{") else ""
            choices = {"person": NAMES[split], "place": PLACES[split], "job": JOBS}.get(kind, [word])
            words.append(draw.choice(choices))
            labels.append(LABELS.index(kind) if kind in LABELS else 0)
        rows.append((words, labels))
    return rows


def collate(rows: list[Row], tokenizer: Any) -> Any:
    """A batch in which a word's first token has its label, and every other position, padding too, is ignored."""
    import torch

    batch = tokenizer([words for words, _ in rows], is_split_into_words=True, padding=True, return_tensors="pt")
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for i, (_, known) in enumerate(rows):
        words = batch.word_ids(i)
        for place, word in enumerate(words):
            if word is not None and word != words[place - 1]:
                labels[i, place] = known[word]
    batch["labels"] = labels
    return batch


def main(
    model: Annotated[str, typer.Argument(help="Folder of a BERT checkpoint.")] = str(DEMO_CHECKPOINT),
    steps: Annotated[int, typer.Option(min=1)] = 60,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 3e-4,
    seed: int = 0,
) -> None:
    """Train a tagger of people and places, and test it on names that it has not seen."""
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    network, tokenizer = load(model, "AutoModelForTokenClassification", seed, **labels)

    def to_batch(rows: list[Row]) -> Any:
        return collate(rows, tokenizer)

    train(network, make_rows("train", 400, seed), to_batch, steps, batch_size, learning_rate)
    right = total = 0
    for batch, output in predict(network, make_rows("test", 100, seed + 1), to_batch):
        named = batch["labels"] > 0  # people and places
        right += int((output.logits.argmax(-1) == batch["labels"])[named].sum())
        total += int(named.sum())
    typer.echo(f"{right} of {total} people and places of the test are found: {right / total:.1%}")


if __name__ == "__main__":
    typer.run(main)

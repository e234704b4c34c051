"""Rank texts for a query: a cross-encoder, which reads query and text together and gives one number.

The texts are the docstrings of `data/docstrings.jsonl`, the queries are words for their six subjects. It trains on each
docstring with its own query and with another's, and is tested on how far up a query's own texts come among others.

    python examples/rerank.py
"""

import json
import random
from typing import Annotated, Any

import typer
from finetune import DATA
from steps import DEMO_CHECKPOINT, load, predict, train

QUERIES = {
    "concurrency": "wait for another thread or task",
    "files": "read and write files and folders",
    "mail": "send and parse e-mail messages",
    "numbers": "calculate with numbers",
    "web": "fetch and parse pages of the web",
    "widgets": "draw windows and buttons",
}
MAX_LENGTH = 64

Row = tuple[str, str, float]  # query, text, 1 where they belong together


def read_texts(split: str) -> list[tuple[str, str]]:
    """The docstrings of a split, each with its subject."""
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    return [(row["text"], row["label"]) for row in rows if row["split"] == split]


def make_rows(texts: list[tuple[str, str]], seed: int) -> list[Row]:
    """Each text with its own query, and with another's."""
    draw = random.Random(seed)
    rows: list[Row] = []
    for text, subject in texts:
        other = draw.choice([each for each in QUERIES if each != subject])
        rows += [(QUERIES[subject], text, 1.0), (QUERIES[other], text, 0.0)]
    return rows


def average_precision(scores: list[float], right: list[bool]) -> float:
    """The mean, over the right texts, of the share of right ones among those that come no later."""
    ranked = [is_right for _, is_right in sorted(zip(scores, right, strict=True), key=lambda pair: -pair[0])]
    found = [place for place, is_right in enumerate(ranked, 1) if is_right]
    return sum(count / place for count, place in enumerate(found, 1)) / len(found)


def collate(rows: list[Row], tokenizer: Any) -> Any:
    """A batch of pairs with their labels (batch, 1), as one logit with `multi_label_classification` takes them."""
    import torch

    queries, texts, labels = (list(column) for column in zip(*rows, strict=True))
    batch = tokenizer(queries, texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
    batch["labels"] = torch.tensor(labels)[:, None]
    return batch


def main(
    model: Annotated[str, typer.Argument(help="Folder of a BERT checkpoint.")] = str(DEMO_CHECKPOINT),
    steps: Annotated[int, typer.Option(min=1)] = 200,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 1.5e-4,
    texts: Annotated[int, typer.Option(min=6, max=240, help="Texts to rank for each query.")] = 24,
    seed: int = 0,
) -> None:
    """Train a cross-encoder, and rank texts for each query."""
    settings = {"num_labels": 1, "problem_type": "multi_label_classification"}
    network, tokenizer = load(model, "AutoModelForSequenceClassification", seed, **settings)

    def to_batch(rows: list[Row]) -> Any:
        return collate(rows, tokenizer)

    train(network, make_rows(read_texts("train"), seed), to_batch, steps, batch_size, learning_rate)
    tests = read_texts("test")
    tests = tests[:: len(tests) // texts][:texts]  # they stand by subject: some of each
    precisions = []
    for subject, query in QUERIES.items():
        right = [each == subject for _, each in tests]
        rows = [(query, text, float(is_right)) for (text, _), is_right in zip(tests, right, strict=True)]
        scores = [score for _, output in predict(network, rows, to_batch) for score in output.logits[:, 0].tolist()]
        precisions.append(average_precision(scores, right))
        typer.echo(f"{query}: average precision {precisions[-1]:.3f}, by chance about {sum(right) / len(right):.3f}")
    typer.echo(f"mean average precision {sum(precisions) / len(precisions):.3f}")


if __name__ == "__main__":
    typer.run(main)

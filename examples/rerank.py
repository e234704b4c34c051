"""Rank texts for a query: a cross-encoder, which reads query and text together and gives one number.

The task: which docstring goes on as this one begins? `data/docstrings.jsonl` has the docstrings; a query is the first
sentence of one, the texts are what follows in it and in others.

    python examples/rerank.py
"""

import json
import random
from typing import Annotated, Any

import typer
from finetune import DATA
from steps import DEMO_CHECKPOINT, load, predict, train

Row = tuple[str, str, float]  # query, text, 1 where they belong together
MAX_LENGTH = 96


def read_pairs() -> dict[str, list[tuple[str, str]]]:
    """The first sentence and the rest of each docstring that has both, by split."""
    pairs: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for line in DATA.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        first, _, rest = row["text"].partition(". ")
        if len(rest) > 20:
            pairs[row["split"]].append((first, rest))
    return pairs


def make_rows(pairs: list[tuple[str, str]], seed: int) -> list[Row]:
    """Each query with its own text, and with another's."""
    draw = random.Random(seed)
    rows: list[Row] = []
    for query, text in pairs:
        rows += [(query, text, 1.0), (query, draw.choice(pairs)[1], 0.0)]
    return rows


def make_lists(pairs: list[tuple[str, str]], count: int, seed: int) -> list[list[Row]]:
    """Each query with its own text first, and `count` - 1 of others."""
    draw = random.Random(seed)
    lists = []
    for i, (query, text) in enumerate(pairs):
        others = [pair[1] for j, pair in enumerate(pairs) if j != i]
        lists.append([(query, text, 1.0), *((query, other, 0.0) for other in draw.sample(others, count - 1))])
    return lists


def collate(rows: list[Row], tokenizer: Any) -> Any:
    """A batch of pairs with their labels, (batch, 1) as one logit with `multi_label_classification` takes them."""
    import torch

    queries, texts, labels = (list(column) for column in zip(*rows, strict=True))
    batch = tokenizer(queries, texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
    batch["labels"] = torch.tensor(labels)[:, None]
    return batch


def main(
    model: Annotated[str, typer.Argument(help="Folder of a BERT checkpoint.")] = str(DEMO_CHECKPOINT),
    steps: Annotated[int, typer.Option(min=1)] = 80,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 2e-4,
    queries: Annotated[int, typer.Option(min=1, help="Queries to test on, with eight texts each.")] = 40,
    seed: int = 0,
) -> None:
    """Train a cross-encoder, and test where it ranks the right one of eight texts."""
    settings = {"num_labels": 1, "problem_type": "multi_label_classification"}
    network, tokenizer = load(model, "AutoModelForSequenceClassification", seed, **settings)
    pairs = read_pairs()

    def to_batch(rows: list[Row]) -> Any:
        return collate(rows, tokenizer)

    train(network, make_rows(pairs["train"], seed), to_batch, steps, batch_size, learning_rate)
    lists = make_lists(pairs["test"], 8, seed)[:queries]
    ranks = []
    for _, output in predict(network, [row for each in lists for row in each], to_batch, batch_size=8):
        scores = output.logits[:, 0]
        ranks.append(1 + int((scores[1:] >= scores[0]).sum()))
    first = sum(rank == 1 for rank in ranks) / len(ranks)
    typer.echo(f"the right text of eight comes first for {first:.1%}, mean reciprocal rank {_mrr(ranks):.3f}")


def _mrr(ranks: list[int]) -> float:
    return sum(1 / rank for rank in ranks) / len(ranks)


if __name__ == "__main__":
    typer.run(main)

"""Train a classifier of docstrings, and draw what its answers come from over some texts.

The task is that of `finetune.py`: the subject of a docstring. One pass forward and one backward give the relevance of
every token of a whole batch.

    python examples/attribution.py
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from finetune import load_task, make_folder
from steps import DEMO_CHECKPOINT, load, train


def main(
    model: Annotated[str, typer.Argument(help="Folder of a BERT checkpoint.")] = str(DEMO_CHECKPOINT),
    output: Annotated[Path, typer.Option(help="Folder for the pages.")] = Path("attribution-output"),
    texts: Annotated[int, typer.Option(min=1, help="Texts of the test to draw.")] = 6,
    steps: Annotated[int, typer.Option(min=1)] = 60,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 2e-4,
    seed: int = 0,
) -> None:
    """Train a classifier, and write a page for each of some texts."""
    from fastbert.attribution import attribute
    from fastbert.maps.text import Coloured, pieces_of, relevance_page

    make_folder(output)
    network, tokenizer = load(model, "AutoModelForSequenceClassification", seed, num_labels=6)
    labels, train_set, test_set = load_task(tokenizer)

    def to_batch(rows: list[Any]) -> Any:
        return tokenizer.pad(rows, return_tensors="pt")

    train(network, train_set, to_batch, steps, batch_size, learning_rate)
    rows = test_set[:: max(1, len(test_set) // texts)][:texts]
    batch = to_batch([{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows])
    found = attribute(network.eval(), batch.to(network.device))  # the whole batch at once

    for i, row in enumerate(rows):
        text = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        encoded = tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=len(row["input_ids"]))
        answer, right = labels[int(found.classes[i])], labels[row["labels"]]
        about = [f"the classifier answers {answer}, and the text is about {right}"]
        offsets = encoded["offset_mapping"]
        relevance = found.relevance[i, : len(offsets)].tolist()
        path = output / f"{i}.html"
        relevance_page(Coloured(f"What speaks for {answer}", about, pieces_of(text, offsets, relevance), []), path)
        strongest = sorted(zip(relevance, encoded.tokens(), strict=True), reverse=True)[:3]
        typer.echo(f"{path}: {answer}, from {', '.join(token for _, token in strongest)}")


if __name__ == "__main__":
    typer.run(main)

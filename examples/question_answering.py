"""Find the answer to a question in a text: a head for question answering, in a loop of one's own.

The texts are made; the names and places of the test are none of those that were trained on. Padding of such a batch is
kept inside by default, for the softmax of the loss runs over it, as Hugging Face's does.

    python examples/question_answering.py
"""

import random
from typing import Annotated, Any

import typer
from steps import DEMO_CHECKPOINT, JOBS, NAMES, PLACES, load, predict, train

Row = tuple[str, str, str]  # question, text, answer


def make_rows(split: str, count: int, seed: int) -> list[Row]:
    """Questions about one of three people in a text."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        people, places, jobs = draw.sample(NAMES[split], 3), draw.sample(PLACES[split], 3), draw.sample(JOBS, 3)
        text = " ".join(
            f"{name} works as a {job} in {place}." for name, job, place in zip(people, jobs, places, strict=True)
        )
        who = draw.randrange(3)
        asked = (f"Where does {people[who]} work?", places[who]), (f"What is the job of {people[who]}?", jobs[who])
        question, answer = draw.choice(asked)
        rows.append((question, text, answer))
    return rows


def collate(rows: list[Row], tokenizer: Any) -> Any:
    """A batch with the first and the last token of each answer."""
    import torch

    questions, texts, answers = (list(column) for column in zip(*rows, strict=True))
    batch = tokenizer(questions, texts, padding=True, return_tensors="pt")
    ends = []
    for i, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        start = text.index(answer)
        last = start + len(answer) - 1
        ends.append((batch.char_to_token(i, start, 1), batch.char_to_token(i, last, 1)))
    batch["start_positions"], batch["end_positions"] = torch.tensor(ends).unbind(1)
    return batch


def main(
    model: Annotated[str, typer.Argument(help="Folder of a BERT checkpoint.")] = str(DEMO_CHECKPOINT),
    steps: Annotated[int, typer.Option(min=1)] = 150,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 3e-4,
    seed: int = 0,
) -> None:
    """Train a reader, and test it on people and places that it has not seen."""
    network, tokenizer = load(model, "AutoModelForQuestionAnswering", seed)

    def to_batch(rows: list[Row]) -> Any:
        return collate(rows, tokenizer)

    train(network, make_rows("train", 800, seed), to_batch, steps, batch_size, learning_rate)
    right, tests = 0, make_rows("test", 100, seed + 1)
    for batch, output in predict(network, tests, to_batch):
        found = [output.start_logits.argmax(1) == batch["start_positions"]]
        found.append(output.end_logits.argmax(1) == batch["end_positions"])
        right += int((found[0] & found[1]).sum())
    typer.echo(f"{right} of {len(tests)} answers of the test are exact: {right / len(tests):.1%}")


if __name__ == "__main__":
    typer.run(main)

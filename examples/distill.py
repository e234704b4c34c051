"""Distil a BERT checkpoint into a student of few layers by its attention, with no attention map in memory.

The task is that of `finetune.py`, the subject of a docstring, but with few labels: half of each batch are texts whose
label is hidden. Two students begin as the same layers of the teacher and see the same batches. One minimises the task's
loss alone; the other adds how far its last layer's attention and values are from the teacher's, as MiniLM does
(arXiv:2002.10957), which every text can teach.

    python examples/distill.py --seeds 3
"""

import importlib.util
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from finetune import DEMO_CHECKPOINT, fail, load_task, make_folder, read_checkpoint

Rows = list[dict[str, Any]]

HIDDEN = -100  # the label that cross entropy skips
NAMES = ("task loss alone", "with attention loss")


@dataclass
class Run:
    """One student: the losses of each step, the share of test texts it gets right, and how long it trained."""

    task: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)
    accuracy: float = 0.0
    seconds: float = 0.0


def draw_batches(rows: Rows, labelled: int, batch_size: int, steps: int, seed: int) -> Iterator[Rows]:
    """Batches of texts, half of them among `labelled` of each label, half of them others with their label hidden."""
    draw = random.Random(seed)
    seen: Counter[int] = Counter()
    known: Rows = []
    others: Rows = []
    for row in draw.sample(rows, len(rows)):
        seen[row["labels"]] += 1
        if seen[row["labels"]] <= labelled:
            known.append(row)
        else:
            others.append({**row, "labels": HIDDEN})
    for _ in range(steps):
        yield draw.choices(known, k=batch_size - batch_size // 2) + draw.choices(others or known, k=batch_size // 2)


def make_student(model: str, layers: int, labels: int, teacher: Any) -> Any:
    """A classifier of `layers` of the teacher's layers, evenly spread from its first to its last.

    Its embeddings stay the teacher's: few texts have few of the words. It drops nothing out, as the teacher does not:
    what dropout makes of the last layer's input no student could take back.
    """
    import fastbert

    student = fastbert.BertForSequenceClassification.from_pretrained(
        model,
        num_hidden_layers=layers,
        num_labels=labels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    last = len(teacher.encoder.layer) - 1
    for i, layer in enumerate(student.bert.encoder.layer):
        source = round(i * last / (layers - 1)) if layers > 1 else last
        layer.load_state_dict(teacher.encoder.layer[source].state_dict())
    student.bert.embeddings.requires_grad_(False)
    return student


def train(
    student: Any,
    teacher: Any,
    batches: Iterator[dict[str, Any]],
    steps: int,
    learning_rate: float,
    weight: float,
    show: Callable[[float], None],
) -> Run:
    """Train the student; `show` is given each step's task loss. With a weight of 0 the teacher is not asked.

    The learning rate and the weight both fall to 0 in a line: first the student takes after its teacher, then it
    settles into the task.
    """
    import torch

    from fastbert.distill import attention_loss, capture

    run = Run()
    start = time.perf_counter()
    optimizer = torch.optim.AdamW((p for p in student.parameters() if p.requires_grad), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    student.train()
    for step, batch in enumerate(batches):
        with capture(student) as ours:
            loss = student(**batch).loss
        run.task.append(loss.item())
        if weight > 0:
            with capture(teacher) as theirs, torch.no_grad():
                teacher(batch["input_ids"], batch["attention_mask"])
            apart = attention_loss(ours[0], theirs[0]) + attention_loss(ours[0], theirs[0], "value_relation")
            run.attention.append(apart.item())
            loss = loss + weight * (1 - step / steps) * apart
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        show(run.task[-1])
    run.seconds = time.perf_counter() - start
    return run


def plot_losses(runs: dict[str, list[Run]], path: Path) -> None:
    """Draw the task's loss of both students and the attention loss as a PNG: each seed faint, their mean bold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, name in zip(("C0", "C1"), NAMES, strict=True):
        for axis, curves in ((left, [run.task for run in runs[name]]), (right, [run.attention for run in runs[name]])):
            if not curves[0]:
                continue
            steps = range(1, len(curves[0]) + 1)
            for curve in curves:
                axis.plot(steps, curve, color=color, linewidth=0.7, alpha=0.3)
            mean = [sum(losses) / len(curves) for losses in zip(*curves, strict=True)]
            axis.plot(steps, mean, color=color, linewidth=1.5, label=name)
    left.set(title="The subject of a docstring", ylabel="task loss")
    right.set(title="The last layer and the teacher's", ylabel="attention loss, nats")
    for axis in (left, right):
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path)


def main(
    model: Annotated[
        str, typer.Argument(help="Folder of the teacher. Default: what `make demo` fetched.", show_default=False)
    ] = str(DEMO_CHECKPOINT),
    output: Annotated[Path, typer.Option(help="Folder for the last student and the plot.")] = Path("distill-output"),
    layers: Annotated[int, typer.Option(min=1, help="Layers of the student.")] = 2,
    labelled: Annotated[int, typer.Option(min=1, help="Texts of each subject that keep their label.")] = 4,
    seeds: Annotated[int, typer.Option(min=1, help="How often both students are trained, each time anew.")] = 1,
    steps: Annotated[int, typer.Option(min=1)] = 100,
    batch_size: Annotated[int, typer.Option(min=2, help="Texts in a batch, half of them without a label.")] = 16,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 5e-4,
    weight: Annotated[float, typer.Option(min=0.0, help="Of the attention loss at the first step; falls to 0.")] = 10.0,
) -> None:
    """Train a small student with and without its teacher's attention, test both and draw their losses."""
    if importlib.util.find_spec("matplotlib") is None:
        fail("matplotlib not installed: pip install matplotlib")
    if weight == 0:
        fail("--weight must be above 0: at 0 the two students are one")
    make_folder(output)

    import torch
    import transformers
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    import fastbert

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config, tokenizer = read_checkpoint(model)
    if layers > config.num_hidden_layers:
        fail(f"--layers {layers} is more than the {config.num_hidden_layers} of the teacher {model!r}")
    labels, train_set, test_set = load_task(tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = fastbert.BertModel.from_pretrained(model).to(device).eval()

    def tensors(rows: Rows) -> dict[str, Any]:
        return tokenizer.pad(rows, return_tensors="pt").to(device)

    def accuracy(student: Any) -> float:
        student.eval()
        right = 0
        with torch.no_grad():
            for i in range(0, len(test_set), 48):
                batch = tensors(test_set[i : i + 48])
                right += int((student(**batch).logits.argmax(-1) == batch["labels"]).sum())
        return right / len(test_set)

    console = Console(highlight=False)
    runs: dict[str, list[Run]] = {name: [] for name in NAMES}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("task loss {task.fields[loss]}"), console=console) as progress:
        for seed in range(seeds):
            for name in NAMES:
                bar = progress.add_task(f"seed {seed}, {name}", total=steps, loss="-")
                transformers.set_seed(seed)
                student = make_student(model, layers, len(labels), teacher).to(device)
                batches = map(tensors, draw_batches(train_set, labelled, batch_size, steps, seed))
                ours = weight if name == NAMES[1] else 0.0

                def show(loss: float, bar: Any = bar) -> None:
                    progress.update(bar, advance=1, loss=f"{loss:.3f}")

                runs[name].append(train(student, teacher, batches, steps, learning_rate, ours, show))
                runs[name][-1].accuracy = accuracy(student)

    table = Table("", *NAMES, title=f"test accuracy, {labelled} labels of each subject")
    for seed in range(seeds):
        table.add_row(f"seed {seed}", *(f"{runs[name][seed].accuracy:.1%}" for name in NAMES))
    table.add_section()
    for row, unit, pattern in (("mean", "accuracy", "{:.1%}"), ("seconds", "seconds", "{:.1f}")):
        table.add_row(row, *(pattern.format(sum(getattr(r, unit) for r in runs[name]) / seeds) for name in NAMES))
    console.print(table)
    student.save_pretrained(output / "student")  # the last one: of the last seed, with the attention loss
    tokenizer.save_pretrained(output / "student")
    plot_losses(runs, output / "loss.png")
    console.print(f"student: {output / 'student'} (loads in plain transformers too)\nplot:    {output / 'loss.png'}")


if __name__ == "__main__":
    typer.run(main)

"""What the short examples share: a fused model of a checkpoint, a training loop with a bar, and made names."""

import random
from collections.abc import Callable, Iterable
from typing import Any

from finetune import DEMO_CHECKPOINT, read_checkpoint

#: Names and places that are trained on, and others to test on.
NAMES = {
    "train": ["Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ines", "Jonas", "Klara", "Lena"],
    "test": ["Rosa", "Simon", "Tilda", "Victor"],
}
PLACES = {
    "train": ["Lisbon", "Vienna", "Oslo", "Dublin", "Athens", "Cairo", "Lima", "Delhi", "Kyoto", "Quito", "Boston"],
    "test": ["Madrid", "Berlin", "Nairobi", "Toronto"],
}
JOBS = ["baker", "nurse", "teacher", "sailor", "painter", "lawyer", "farmer", "singer"]

__all__ = ["DEMO_CHECKPOINT", "JOBS", "NAMES", "PLACES", "load", "predict", "train"]


def load(model: str, head: str, seed: int, **settings: Any) -> tuple[Any, Any]:
    """A head of Hugging Face's on a checkpoint, fused, on the GPU if there is one; and its tokenizer.

    Args:
        model: folder of the checkpoint.
        head: such as AutoModelForTokenClassification.
        seed: of the new head's weights, and of dropout.
        settings: of the configuration, such as num_labels.
    """
    import torch
    import transformers

    import fastbert

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    _, tokenizer = read_checkpoint(model)
    transformers.set_seed(seed)
    network = getattr(transformers, head).from_pretrained(model, **settings)
    return fastbert.fuse(network).to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def train(
    network: Any, rows: list[Any], collate: Callable[[list[Any]], Any], steps: int, batch_size: int, rate: float
) -> list[float]:
    """Train on batches drawn from rows, with a bar. Returns the losses.

    Args:
        network: called with what `collate` makes of a list of rows; its output has a loss.
    """
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    draw, losses = random.Random(0), []
    network.train()
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("loss {task.fields[loss]}"))
    with Progress(TextColumn("training"), *columns) as progress:
        bar = progress.add_task("", total=steps, loss="-")
        for _ in range(steps):
            loss = network(**collate(draw.choices(rows, k=batch_size)).to(network.device)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            progress.update(bar, advance=1, loss=f"{losses[-1]:.3f}")
    return losses


def predict(network: Any, rows: list[Any], collate: Callable[[list[Any]], Any], batch_size: int = 48) -> Iterable[Any]:
    """The network's outputs, in eval mode, a batch of rows at a time, each with its inputs."""
    import torch

    network.eval()
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size]).to(network.device)
        with torch.inference_mode():
            yield batch, network(**batch)

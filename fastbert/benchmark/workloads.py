"""The workloads: what a batch looks like and what is done with it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Task = Literal["forward", "backward", "finetune"]


@dataclass(frozen=True)
class Workload:
    """A batch, and what is done with it.

    Attributes:
        name: how people call it.
        lengths: tokens of each row; the batch is padded to the longest.
        task: "forward", for the model's outputs, in inference mode; "backward", forward and backward of the base model
            in training mode with the dropout of its configuration; "finetune", a whole step of sequence
            classification: loss, backward, clipping, AdamW, and under autocast in half precision.
        attentions: whether the attention maps are returned, and for "backward" and "finetune" part of the loss.
        about: one line for people.
    """

    name: str
    lengths: tuple[int, ...]
    task: Task
    attentions: bool = False
    about: str = ""

    @property
    def seq(self) -> int:
        """Length of the padded batch."""
        return max(self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return sum(self.lengths)

    @property
    def fill(self) -> float:
        """Tokens over positions."""
        return self.tokens / (len(self.lengths) * self.seq)

    def batch(self, vocab_size: int, device: torch.device) -> dict[str, Tensor]:
        """Random ids, the same each time: input_ids and attention_mask, int64 (batch, seq), padded on the right."""
        generator = torch.Generator().manual_seed(0)
        mask = torch.arange(self.seq)[None, :] < torch.tensor(self.lengths)[:, None]
        ids = torch.randint(1, vocab_size, mask.shape, generator=generator) * mask
        return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}


def full(batch: int, seq: int) -> tuple[int, ...]:
    """Lengths of a batch without padding."""
    return (seq,) * batch


def ragged(batch: int, seq: int, fill: float) -> tuple[int, ...]:
    """Lengths up to `seq` whose batch is filled to a share: most rows short, few long, as text is; in mixed order.

    The lengths are the quantiles of seq * u^k for u uniform in (0, 1), with the k that gives the fill.
    """
    low, high = 0.0, 50.0
    for _ in range(40):
        middle = (low + high) / 2
        lengths = _power_lengths(batch, seq, middle)
        low, high = (middle, high) if sum(lengths) > fill * batch * seq else (low, middle)
    reached = sum(lengths) / (batch * seq)
    if abs(reached - fill) > 0.02:
        raise ValueError(f"{batch} rows, one of them {seq} long, cannot have a fill of {fill}, only {reached:.2f}")
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(0)).tolist()
    return tuple(lengths[i] for i in order)


def _power_lengths(batch: int, seq: int, power: float) -> list[int]:
    return [max(2, math.ceil(seq * ((i + 1) / batch) ** power)) for i in range(batch)]


#: What is measured on a GPU.
GPU_WORKLOADS = {
    w.name: w
    for w in (
        Workload("full-128", full(256, 128), "forward", about="full batch, length 128"),
        Workload("full-512", full(64, 512), "forward", about="full batch, length 512"),
        Workload("ragged-384", ragged(64, 384, 0.46), "forward", about="54% padding"),
        Workload("one-128", full(1, 128), "forward", about="one sentence of 128 tokens"),
        Workload("attentions-512", full(16, 512), "forward", attentions=True, about="attention maps returned"),
        Workload("finetune-128", full(32, 128), "finetune", about="a fine-tuning step, full batch"),
        Workload("finetune-512", full(32, 512), "finetune", about="a fine-tuning step, full batch"),
        Workload("finetune-ragged-384", ragged(32, 384, 0.46), "finetune", about="a fine-tuning step, 54% padding"),
        Workload("backward-512", full(32, 512), "backward", about="forward and backward of the encoder"),
        Workload(
            "attentions-backward-512",
            full(8, 512),
            "backward",
            attentions=True,
            about="backward through the attention maps",
        ),
    )
}

#: For a CPU: the same, smaller.
CPU_WORKLOADS = {
    w.name: w
    for w in (
        Workload("full", full(8, 128), "forward", about="full batch, length 128"),
        Workload("ragged", ragged(8, 128, 0.46), "forward", about="54% padding"),
        Workload("one", full(1, 128), "forward", about="one sentence of 128 tokens"),
        Workload("attentions", ragged(8, 128, 0.46), "forward", attentions=True, about="attention maps returned"),
        Workload("finetune-full", full(8, 128), "finetune", about="a fine-tuning step, full batch"),
        Workload("finetune-ragged", ragged(8, 128, 0.46), "finetune", about="a fine-tuning step, 54% padding"),
        Workload(
            "attentions-backward",
            ragged(8, 128, 0.46),
            "backward",
            attentions=True,
            about="backward through the attention maps",
        ),
    )
}


def named(names: Sequence[str], workloads: dict[str, Workload]) -> list[Workload]:
    """The workloads of these names, all for none; ValueError for an unknown one, which lists the known."""
    unknown = [name for name in names if name not in workloads]
    if unknown:
        raise ValueError(f"unknown workload {', '.join(map(repr, unknown))}: choose from {', '.join(workloads)}")
    return [workloads[name] for name in names] or list(workloads.values())

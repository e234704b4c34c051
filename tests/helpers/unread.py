"""Heads that skip the rows that nothing reads, beside such as compute all: what tests of both share."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import ids, mask_of, randomize, tiny_config
from torch import nn

import fastbert

SEQ = 11
MASKS = {
    "full": None,
    "ragged": mask_of([SEQ, 3, 7], SEQ),
    "left": mask_of([SEQ, 3, 7], SEQ).flip(1),
    "a row without a token": mask_of([3, 7, 0], SEQ),
}
POOLED = ["BertForSequenceClassification", "BertForNextSentencePrediction", "BertForMultipleChoice"]
MASKED_LM = ["BertForMaskedLM", "BertForPreTraining"]


def two(head: str, device: torch.device, **changes: Any) -> tuple[Any, Any]:
    """A fused head, and one with the same weights that skips what it does not read, both in training mode."""
    whole = getattr(transformers, head)(tiny_config(**changes))
    randomize(whole)
    less = getattr(transformers, head)(tiny_config(**changes))
    less.load_state_dict(whole.state_dict())
    whole, less = (fastbert.fuse(model).to(device).train() for model in (whole, less))
    return whole, fastbert.skip_unread(less)


def inputs_of(head: str, mask: str, device: torch.device) -> dict[str, Any]:
    x = ids(3, SEQ)
    inputs: dict[str, Any] = {"input_ids": x, "attention_mask": MASKS[mask]}
    if head == "BertForMultipleChoice":
        inputs = {name: None if value is None else value[None] for name, value in inputs.items()}
        inputs["labels"] = torch.tensor([1])
    elif head in MASKED_LM:
        inputs["labels"] = torch.where(torch.rand(3, SEQ) < 0.3, x, -100)
        inputs["labels"][0, 1] = 5
        if head == "BertForPreTraining":
            inputs["next_sentence_label"] = torch.tensor([0, 1, 1])
    else:
        inputs["labels"] = torch.tensor([0, 1, 1])
    return {name: None if value is None else value.to(device) for name, value in inputs.items()}


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    wanted = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert (p.grad is None) == (wanted[name].grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, wanted[name].grad, atol=2e-5, rtol=1e-3, msg=name)


class Rows:
    """Rows that went through the linear layers of each width, while it watches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[int, int]] = []
        linear = F.linear

        def watched(x: torch.Tensor, weight: torch.Tensor, *args: Any) -> torch.Tensor:
            self.seen.append((x.shape[:-1].numel(), weight.shape[0]))
            return linear(x, weight, *args)

        monkeypatch.setattr(F, "linear", watched)

    def of(self, width: int) -> list[int]:
        return [rows for rows, features in self.seen if features == width]

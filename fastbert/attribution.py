"""Which tokens a classifier's answer comes from, by attention and its gradient.

The rule is that of Chefer, Gur and Wolf (Generic Attention-model Explainability, ICCV 2021, equations 5 and 6) for
self-attention: in each layer A = mean over heads of max(0, map * gradient of the class's logit by the map), and
R = R + A R from R = 1 before the first layer. Row 0 of R says how much each token counts for the first one, which the
classifier reads. `rollout` is the older rule of Abnar and Zuidema (Quantifying Attention Flow, ACL 2020), which asks no
classifier: R = (A + 1) / 2 R with A = mean over heads of the map.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.modules.model import EncoderModel


@dataclass(frozen=True)
class Attribution:
    """Where the answers of a classifier come from.

    Attributes:
        relevance: float32 (batch, seq), from 0 on: how much each token counts for the class; 0 at padding.
        classes: int64 (batch,), the class of each sequence that was asked about.
        logits: (batch, labels), what the classifier answers.
    """

    relevance: Tensor
    classes: Tensor
    logits: Tensor


def attribute(model: nn.Module, inputs: Mapping[str, Tensor], classes: int | Tensor | None = None) -> Attribution:
    """The relevance of each token for a class, for a whole batch in one pass forward and one backward.

    It keeps the attentions of all layers, and as much again for their gradients:
    2 * layers * batch * heads * seq * seq numbers. No gradient of a parameter is computed, and none is touched.

    Args:
        model: a fused classifier of sequences, in eval mode: its output has `logits` (batch, labels).
        inputs: what it is called with, `input_ids` and `attention_mask` (batch, seq) among them; padding on the right.
        classes: one for all sequences, or int (batch,). Default: the one with the highest logit.

    Raises:
        ValueError: for a model that is not fused, that is in training mode, or whose logits are not (batch, labels);
            for a batch whose first position is padding; for classes that do not fit.
    """
    encoder = _fused_encoder(model)
    mask = inputs.get("attention_mask")
    if mask is not None and not mask[:, 0].all():
        raise ValueError("the classifier reads the first position, which is padding here: pad on the right")
    with _differentiable(model, encoder):
        # Rows of padding take no part in what the first position gives.
        output = model(**inputs, output_attentions=True, return_dict=True, packing=True)
        logits = output.logits
        if logits.dim() != 2:
            raise ValueError(f"attribution needs logits (batch, labels), and these are {tuple(logits.shape)}")
        chosen = _choose(classes, logits.detach())
        total = logits.gather(1, chosen[:, None]).sum()  # sequences do not mix: each has its own gradient
        gradients = torch.autograd.grad(total, output.attentions)
    row = _first_row(output.attentions[0])
    for probabilities, gradient in zip(reversed(output.attentions), reversed(gradients), strict=True):
        weights = (probabilities.detach().float() * gradient.float()).clamp(min=0).mean(1)
        row = row + _through(row, weights)
    row[:, 0] -= 1  # where R starts
    return Attribution(row, chosen, logits.detach())


def rollout(attentions: Sequence[Tensor]) -> Tensor:
    """Attention rolled out: how much of each token is mixed into the first one, by attention alone.

    Args:
        attentions: of every layer, (batch, heads, seq, seq).

    Returns:
        float32 (batch, seq); each row has the sum 1.
    """
    row = _first_row(attentions[0])
    for probabilities in reversed(attentions):
        row = (row + _through(row, probabilities.detach().float().mean(1))) / 2
    return row


def _first_row(attentions: Tensor) -> Tensor:
    """Row 0 of R before the first layer: (batch, seq), 1 at the first token.

    Row 0 of a product of matrices needs no product of matrices: from the last layer to the first, it is a row times
    each.
    """
    row = attentions.new_zeros((attentions.shape[0], attentions.shape[-1]), dtype=torch.float32)
    row[:, 0] = 1
    return row


def _through(row: Tensor, weights: Tensor) -> Tensor:
    """(batch, seq) times (batch, seq, seq)."""
    return torch.bmm(row[:, None], weights)[:, 0]


def _fused_encoder(model: nn.Module) -> Any:
    """The encoder inside a classifier that can be asked."""
    encoder = next((module for module in model.modules() if isinstance(module, EncoderModel)), None)
    if encoder is None or encoder is model:
        what = "holds no fused encoder: call fastbert.fuse(model)" if encoder is None else "is no classifier"
        raise ValueError(f"attribution needs a fused classifier of sequences, and {type(model).__name__} {what}")
    if model.training:
        raise ValueError("attribution of a model in training mode would be of its dropout: call model.eval()")
    return encoder


def _choose(classes: int | Tensor | None, logits: Tensor) -> Tensor:
    """The class of each sequence, int64 (batch,)."""
    batch, labels = logits.shape
    if classes is None:
        return logits.argmax(1)
    chosen = torch.as_tensor(classes, device=logits.device)
    if chosen.is_floating_point() or chosen.dtype == torch.bool or chosen.dim() > 1:
        raise ValueError(f"classes must be an int or int (batch,), got {chosen.dtype} {tuple(chosen.shape)}")
    chosen = chosen.long().expand(batch) if chosen.dim() == 0 else chosen.long()
    if chosen.shape != (batch,):
        raise ValueError(f"classes must be (batch,) = ({batch},), got {tuple(chosen.shape)}")
    if batch and not (int(chosen.min()) >= 0 and int(chosen.max()) < labels):
        raise ValueError(f"classes must be from 0 to {labels - 1}, got {chosen.tolist()}")
    return chosen


@contextlib.contextmanager
def _differentiable(model: nn.Module, encoder: Any) -> Iterator[None]:
    """While it lasts, attentions have a gradient and parameters have none, but one before the first layer."""
    first = encoder.get_input_embeddings().weight
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(parameter is first)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)

"""Parameters that lie side by side, seen as one, and still a parameter each to autograd."""

import itertools
from typing import Any

import torch


class StackedParameters(torch.autograd.Function):
    """Groups of neighbouring parameters, each seen as one; its gradient is handed out in slices, without a copy."""

    @staticmethod
    def forward(ctx: Any, views: tuple[torch.Tensor, ...], *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The views, each of as many parameters as the others."""
        count = len(parts) // len(views)
        groups = [parts[i : i + count] for i in range(0, len(parts), count)]
        ctx.save_for_backward(*parts)  # that they do not change meanwhile: a view tells of its first one only
        ctx.rows = [[part.shape[0] for part in group] for group in groups]
        ctx.set_materialize_grads(False)
        frozen = [not any(part.requires_grad for part in group) for group in groups]
        ctx.mark_non_differentiable(*itertools.compress(views, frozen))
        return views

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        _ = ctx.saved_tensors
        slices: list[torch.Tensor | None] = [None]
        for grad, rows in zip(grads, ctx.rows, strict=True):
            slices += [None] * len(rows) if grad is None else grad.split(rows)
        return tuple(slices)


def stacked(views: tuple[torch.Tensor, ...], parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Views of parameters, detached, as autograd is to see them.

    Args:
        views: each of as many parameters as the others, (sum of rows, ...).
        parts: the parameters (rows, ...), those of the first view first.
    """
    return StackedParameters.apply(views, *parts) if torch.is_grad_enabled() else views

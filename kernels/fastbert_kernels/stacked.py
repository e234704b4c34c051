"""Parameters that lie side by side, seen as one, and still a parameter each to autograd."""

import itertools
from typing import Any

import torch


class ContextUse:
    """Whether a gradient came to attention's context. Without one no value has a gradient, though the product of which
    values are a third has: a loss of attention maps alone does not reach them."""

    reached = False

    def watch(self, context: torch.Tensor) -> None:
        """Look at the context's gradients."""
        if context.requires_grad:
            context.register_hook(self._note)

    def _note(self, grad: torch.Tensor) -> None:
        self.reached = True

    def taken(self) -> bool:
        """Whether one came in this backward pass; the next one is looked at anew."""
        reached, self.reached = self.reached, False
        return reached


class SideBySide(torch.autograd.Function):
    """Query, key and value (..., out) as one (..., 3 * out)."""

    @staticmethod
    def forward(ctx: Any, use: ContextUse, *parts: torch.Tensor) -> torch.Tensor:
        ctx.use, ctx.widths = use, [part.shape[-1] for part in parts]
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = grad.split(ctx.widths, dim=-1)
        return None, query, key, value if ctx.use.taken() else None


class StackedParameters(torch.autograd.Function):
    """Groups of neighbouring parameters, each seen as one; its gradient is handed out in slices, without a copy."""

    @staticmethod
    def forward(
        ctx: Any, views: tuple[torch.Tensor, ...], use: ContextUse | None, *parts: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The views, each of as many parameters as the others."""
        count = len(parts) // len(views)
        groups = [parts[i : i + count] for i in range(0, len(parts), count)]
        ctx.save_for_backward(*parts)  # that they do not change meanwhile: a view tells of its first one only
        ctx.use = use
        ctx.rows = [[part.shape[0] for part in group] for group in groups]
        ctx.set_materialize_grads(False)
        frozen = [not any(part.requires_grad for part in group) for group in groups]
        ctx.mark_non_differentiable(*itertools.compress(views, frozen))
        return views

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        _ = ctx.saved_tensors
        slices: list[torch.Tensor | None] = [None, None]
        of_values = ctx.use is None or ctx.use.taken()
        for grad, rows in zip(grads, ctx.rows, strict=True):
            slices += [None] * len(rows) if grad is None else grad.split(rows)
            slices[-1] = slices[-1] if of_values else None
        return tuple(slices)


def stacked(
    views: tuple[torch.Tensor, ...], parts: tuple[torch.Tensor, ...], use: ContextUse | None = None
) -> tuple[torch.Tensor, ...]:
    """Views of parameters, detached, as autograd is to see them.

    Args:
        views: each of as many parameters as the others, (sum of rows, ...).
        parts: the parameters (rows, ...), those of the first view first.
        use: of the context that values, the last of each view, have their gradient from; None: they always have one.
    """
    return StackedParameters.apply(views, use, *parts) if torch.is_grad_enabled() else views

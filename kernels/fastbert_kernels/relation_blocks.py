"""The relation loss in plain PyTorch by blocks of rows: what a CPU runs. `reference.relation_loss` defines it."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .reference import upcast

#: Rows of the score matrices that exist at a time.
ROWS = 64

INSTEAD_OF_SECOND_DERIVATIVE = "take fastbert_kernels.reference.relation_loss, which stores the maps"


class _Scores:
    """The two models' scores in one sequence, a block of rows at a time: (heads, rows, length)."""

    def __init__(self, operands: tuple[torch.Tensor, ...], scales: tuple[float, float]) -> None:
        # Each (heads, length, dim).
        self.student_a, self.student_b, self.teacher_a, self.teacher_b = (upcast(x).transpose(0, 1) for x in operands)
        self.scales = scales

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        for start in range(0, self.student_a.shape[1], ROWS):
            rows = slice(start, start + ROWS)
            s = (self.student_a[:, rows] @ self.student_b.transpose(1, 2)).mul_(self.scales[0])
            t = (self.teacher_a[:, rows] @ self.teacher_b.transpose(1, 2)).mul_(self.scales[1])
            yield rows, s, t


def _sequences(lengths: list[int]) -> Iterator[slice]:
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


class RelationLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        *operands, lengths, kind, student_scale, teacher_scale = inputs
        ctx.save_for_backward(*operands)
        ctx.scalars = (lengths, kind, (student_scale, teacher_scale))
        student_a = operands[0]
        tokens, heads, _ = student_a.shape
        loss = student_a.new_empty(heads, tokens, dtype=upcast(student_a[:0]).dtype)
        for tokens_here in _sequences(lengths):
            scores = _Scores(tuple(x[tokens_here] for x in operands), ctx.scalars[2])
            for rows, s, t in scores.blocks():
                out = loss[:, tokens_here][:, rows]
                if kind == "mse":
                    torch.sum(s.sub_(t).square_(), dim=-1, out=out)
                else:
                    s, t = F.log_softmax(s, dim=-1), F.log_softmax(t, dim=-1)
                    torch.sum(t.exp().mul_(t.sub_(s)), dim=-1, out=out)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        da, db = RelationLossBackward.apply(dloss, *ctx.saved_tensors, *ctx.scalars)
        return da, db, *[None] * 6


class RelationLossBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dloss: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *operands, lengths, kind, scales = inputs
        da, db = (torch.empty_like(x) for x in operands[:2])
        for tokens_here in _sequences(lengths):
            scores = _Scores(tuple(x[tokens_here] for x in operands), scales)
            db_here = torch.zeros_like(scores.student_b)
            for rows, s, t in scores.blocks():
                if kind == "mse":
                    ds = s.sub_(t).mul_(2.0)
                else:
                    ds = F.softmax(s, dim=-1).sub_(F.softmax(t, dim=-1))
                ds.mul_(dloss[:, tokens_here][:, rows, None] * scales[0])
                da[tokens_here][rows] = (ds @ scores.student_b).transpose(0, 1)
                db_here += ds.transpose(1, 2) @ scores.student_a[:, rows]
            db[tokens_here] = db_here.transpose(0, 1)
        return da, db

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, ...]:
        raise NotImplementedError(
            "fastbert's relation loss has no second derivative: for gradients of gradients "
            f"{INSTEAD_OF_SECOND_DERIVATIVE}"
        )


def relation_loss_by_blocks(
    student_a: torch.Tensor,
    student_b: torch.Tensor,
    teacher_a: torch.Tensor,
    teacher_b: torch.Tensor,
    lengths: list[int],
    kind: str,
    student_scale: float,
    teacher_scale: float,
) -> torch.Tensor:
    """`reference.relation_loss`, in memory that grows with the tokens: blocks of the scores come and go, and the
    backward pass computes them again. Gradients for the student only, and only once."""
    return RelationLoss.apply(student_a, student_b, teacher_a, teacher_b, lengths, kind, student_scale, teacher_scale)

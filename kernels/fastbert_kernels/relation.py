"""How far one model's token relations are from another's, without storing either's: a loss, forward and backward.

A relation is the score matrix S = scale * A B^T of one head in one sequence: of queries and keys it is what attention
takes the softmax of; of values and values, or queries and queries, it is what MiniLM (arXiv:2002.10957) and MiniLMv2
(arXiv:2012.15828) distil. For the student's S_s and the teacher's S_t, with p = softmax(S) and LSE its log-sum-exp, a
row's loss is one of

    kl    KL(p_t || p_s) = sum(p_t * (S_t - S_s)) - LSE_t + LSE_s
    mse   sum((S_s - S_t)^2)            as TinyBERT (arXiv:1909.10351) takes it, before the mean

Both softmaxes stream over tiles of columns, as in `attention.py`, and sum(p_t * (S_t - S_s)) is rescaled with the
teacher's. Two numbers a row are kept for the backward pass: the log-sum-exps.
"""

from typing import Any

import torch

from .backend import check_same_device, uses_triton
from .launch import cdiv, register_op, wrap_triton
from .relation_blocks import INSTEAD_OF_SECOND_DERIVATIVE, relation_loss_by_blocks
from .relation_kernels import relation_backward_a, relation_backward_b, relation_forward
from .sequences import batch_size, blocked_length, check_lengths
from .tiles import block_width, relation_tiles

MAX_RELATION_DIM = 128
RELATION_KINDS = ("kl", "mse")

#: The operands of an op: student_a, student_b, teacher_a, teacher_b.
_Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _arguments(
    operands: _Operands, cu_seqlens: torch.Tensor | None, max_seqlen: int, kind: str, scales: tuple[float, float]
) -> dict[str, Any]:
    """The kernel arguments that all three kernels share. Absent offsets are stood in for by an operand, never read."""
    names = ("student_a", "student_b", "teacher_a", "teacher_b")
    tokens, heads, student_dim = operands[0].shape
    teacher_dim = operands[2].shape[2]
    return {
        **{f"{name}_ptr": x for name, x in zip(names, operands, strict=True)},
        **{f"{name}_row_stride": x.stride(0) for name, x in zip(names, operands, strict=True)},
        "cu_seqlens_ptr": operands[0] if cu_seqlens is None else cu_seqlens,
        "tokens": tokens,
        "heads": heads,
        "max_seqlen": blocked_length(cu_seqlens, max_seqlen),
        "student_scale": scales[0],
        "teacher_scale": scales[1],
        "STUDENT_DIM": student_dim,
        "TEACHER_DIM": teacher_dim,
        "BLOCK_STUDENT": block_width(student_dim),
        "BLOCK_TEACHER": block_width(teacher_dim),
        "HAS_CU_SEQLENS": cu_seqlens is not None,
        "HAS_SOFTMAX": kind == "kl",
    }


def _forward_fake(
    student_a: torch.Tensor,
    student_b: torch.Tensor,
    teacher_a: torch.Tensor,
    teacher_b: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    kind: str,
    student_scale: float,
    teacher_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, heads, _ = student_a.shape
    loss = student_a.new_empty(heads, tokens, dtype=torch.float32)
    return loss, student_a.new_empty(2 if kind == "kl" else 0, heads, tokens, dtype=torch.float32)


@register_op("relation_loss", _forward_fake)
def _forward(
    student_a: torch.Tensor,
    student_b: torch.Tensor,
    teacher_a: torch.Tensor,
    teacher_b: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    kind: str,
    student_scale: float,
    teacher_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, heads, _ = student_a.shape
    operands = (student_a, student_b, teacher_a, teacher_b)
    loss = student_a.new_empty(heads, tokens, dtype=torch.float32)
    lse = student_a.new_empty(2 if kind == "kl" else 0, heads, tokens, dtype=torch.float32)
    tiles = relation_tiles("forward", student_a, teacher_a)
    grid = (cdiv(max_seqlen, tiles["BLOCK_M"]) * heads * batch_size(student_a, cu_seqlens, max_seqlen),)
    if grid[0] > 0:
        wrap_triton(relation_forward)[grid](
            loss_ptr=loss,
            lse_ptr=lse,
            **_arguments(operands, cu_seqlens, max_seqlen, kind, (student_scale, teacher_scale)),
            **tiles,
        )
    return loss, lse


def _backward_fake(
    dloss: torch.Tensor,
    lse: torch.Tensor,
    student_a: torch.Tensor,
    student_b: torch.Tensor,
    teacher_a: torch.Tensor,
    teacher_b: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    kind: str,
    student_scale: float,
    teacher_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return student_a.new_empty(student_a.shape), student_b.new_empty(student_b.shape)


@register_op("relation_loss_backward", _backward_fake)
def _backward(
    dloss: torch.Tensor,
    lse: torch.Tensor,
    student_a: torch.Tensor,
    student_b: torch.Tensor,
    teacher_a: torch.Tensor,
    teacher_b: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    kind: str,
    student_scale: float,
    teacher_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the student's two operands.

    With g the gradient of each row's loss:

        dS_s = g * (p_s - p_t)         for kl
        dS_s = 2 * g * (S_s - S_t)     for mse
        dA = scale * dS_s B,  dB = scale * dS_s^T A

    The scores are recomputed. Two launches, no atomics: the result is the same every time. The products are of the
    operands' dtype, in which the g of a mean over many rows may be nothing: in dA it is multiplied in afterwards, and
    dB takes it relative to the largest.
    """
    heads = student_a.shape[1]
    batch = batch_size(student_a, cu_seqlens, max_seqlen)
    operands = (student_a, student_b, teacher_a, teacher_b)
    da, db = student_a.new_empty(student_a.shape), student_b.new_empty(student_b.shape)
    if student_a.numel() == 0:
        return da, db
    arguments = _arguments(operands, cu_seqlens, max_seqlen, kind, (student_scale, teacher_scale)) | {"lse_ptr": lse}
    dloss = dloss.contiguous()
    dloss_max = dloss.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    tiles = relation_tiles("backward_a", student_a, teacher_a)
    wrap_triton(relation_backward_a)[(cdiv(max_seqlen, tiles["BLOCK_M"]) * heads * batch,)](
        dloss_ptr=dloss, da_ptr=da, **arguments, **tiles
    )
    tiles = relation_tiles("backward_b", student_a, teacher_a)
    wrap_triton(relation_backward_b)[(cdiv(max_seqlen, tiles["BLOCK_N"]) * heads * batch,)](
        dloss_ptr=dloss / dloss_max, dloss_max_ptr=dloss_max, db_ptr=db, **arguments, **tiles
    )
    return da, db


_backward.forbid_double_backward("relation", INSTEAD_OF_SECOND_DERIVATIVE)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    student_a, student_b, teacher_a, teacher_b, cu_seqlens, max_seqlen, kind, student_scale, teacher_scale = inputs
    ctx.save_for_backward(output[1], student_a, student_b, teacher_a, teacher_b, cu_seqlens)
    ctx.scalars = (max_seqlen, kind, student_scale, teacher_scale)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, dloss: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    gradients = (None, None) if dloss is None else _backward(dloss, *ctx.saved_tensors, *ctx.scalars)
    return *gradients, *[None] * 7


_forward.register_autograd(_autograd, setup_context=_setup_context)


def relation_loss(
    student_a: torch.Tensor,
    student_b: torch.Tensor,
    teacher_a: torch.Tensor,
    teacher_b: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    *,
    kind: str = "kl",
    student_scale: float | None = None,
    teacher_scale: float | None = None,
) -> torch.Tensor:
    """How far the student's relations are from the teacher's, row by row; memory grows with tokens, not their square.

    Args:
        student_a, student_b: (tokens, heads, dim), rows and columns of the student's scores; dim up to 128. May be one
            tensor.
        teacher_a, teacher_b: (tokens, heads, dim), the teacher's, with a dim and a dtype of their own. They are
            constants: no gradient reaches them.
        cu_seqlens: int32 (batch + 1,), first token of each sequence and, last, the number of tokens; sequences may be
            empty. None: every sequence has `max_seqlen` tokens.
        max_seqlen: tokens in the longest sequence.
        kind: "kl" or "mse", see above.
        student_scale, teacher_scale: factors on the scores; default 1 / sqrt(dim).

    Returns:
        (heads, tokens), float32 (float64 for a float64 student on the PyTorch path): "kl", each row's divergence in
        nats; "mse", the sum of its squared differences. Differentiable once.

    Raises:
        ValueError: for shapes that do not fit each other, a dim over 128, an unknown kind, mixed devices.
        TypeError: for a dtype that no kernel has.
    """
    _check(student_a, student_b, teacher_a, teacher_b, cu_seqlens, max_seqlen, kind)
    teacher_a, teacher_b = teacher_a.detach(), teacher_b.detach()
    student_scale = student_a.shape[-1] ** -0.5 if student_scale is None else student_scale
    teacher_scale = teacher_a.shape[-1] ** -0.5 if teacher_scale is None else teacher_scale
    operands = (student_a, student_b, teacher_a, teacher_b)
    # Both decide, so that a teacher in a dtype without a kernel is named too.
    if not (uses_triton(student_a) and uses_triton(teacher_a)):
        batch = batch_size(student_a, cu_seqlens, max_seqlen)
        lengths = [max_seqlen] * batch if cu_seqlens is None else cu_seqlens.diff().tolist()
        return relation_loss_by_blocks(*operands, lengths, kind, student_scale, teacher_scale)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    rows = (_with_plain_rows(x) for x in operands)
    loss, _ = _forward(*rows, cu_seqlens, max_seqlen, kind, student_scale, teacher_scale)
    return loss


def _with_plain_rows(x: torch.Tensor) -> torch.Tensor:
    """x with the heads of a token next to each other, as a slice of stacked projections already has them."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _check(
    student_a: torch.Tensor,
    student_b: torch.Tensor,
    teacher_a: torch.Tensor,
    teacher_b: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    kind: str,
) -> None:
    if kind not in RELATION_KINDS:
        raise ValueError(f"unknown kind {kind!r} of relation loss: it is one of {', '.join(RELATION_KINDS)}")
    for model, a, b in (("student", student_a, student_b), ("teacher", teacher_a, teacher_b)):
        if a.dim() != 3 or a.shape != b.shape or a.dtype != b.dtype:
            raise ValueError(
                f"relation_loss needs {model}_a and {model}_b of one shape (tokens, heads, dim) and one dtype, got "
                f"{a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
            )
        if not 1 <= a.shape[2] <= MAX_RELATION_DIM:
            raise ValueError(
                f"relation_loss has kernels for a dim from 1 to {MAX_RELATION_DIM}, got {a.shape[2]} of the {model}"
            )
    if student_a.shape[:2] != teacher_a.shape[:2]:
        raise ValueError(
            "relation_loss compares the same tokens and as many heads, got (tokens, heads) = "
            f"{tuple(student_a.shape[:2])} of the student and {tuple(teacher_a.shape[:2])} of the teacher"
        )
    check_lengths("student_a", student_a, cu_seqlens, max_seqlen)
    check_same_device(
        "relation_loss",
        student_a=student_a,
        student_b=student_b,
        teacher_a=teacher_a,
        teacher_b=teacher_b,
        cu_seqlens=cu_seqlens,
    )

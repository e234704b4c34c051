"""Attention distillation: a loss between a student's attention and a teacher's that stores neither map.

    with capture(teacher) as theirs, torch.no_grad():
        teacher(**batch)
    with capture(student) as ours:
        output = student(**batch)
    loss = task_loss(output) + attention_loss(ours[0], theirs[0])

What is kept of a layer is its query, key and value projections, which it computes anyway. Scores are computed from them
again, tile by tile, forward and backward. Compared are the maps before dropout and head masks.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastbert_kernels import relation_loss
from fastbert_kernels.backend import check_mode, check_same_device
from fastbert_kernels.relation import MAX_RELATION_DIM

from .batch.prefix import either
from .families import MODELS
from .modules.attention import FusedSelfAttention, attends_fused, self_attention
from .modules.model import EncoderModel

_QUERY, _KEY, _VALUE = range(3)

#: Kind of loss -> which two projections' products are compared, and how.
_KINDS: dict[str, tuple[int, int, str]] = {
    "kl": (_QUERY, _KEY, "kl"),
    "mse_scores": (_QUERY, _KEY, "mse"),
    "query_relation": (_QUERY, _QUERY, "kl"),
    "key_relation": (_KEY, _KEY, "kl"),
    "value_relation": (_VALUE, _VALUE, "kl"),
}


@dataclass(frozen=True, eq=False)
class Projections:
    """The query, key and value projections of one layer on one batch: what `capture` gives, or a model of your own.

    Attributes:
        qkv: (tokens, 3, heads, head_dim), float: the tokens of all sequences one after the other, padding dropped.
        cu_seqlens: int32 (batch + 1,), first token of each sequence and, last, the number of tokens. None: every
            sequence has `max_seqlen` tokens.
        max_seqlen: tokens in the longest sequence.
    """

    qkv: torch.Tensor
    cu_seqlens: torch.Tensor | None
    max_seqlen: int

    def __post_init__(self) -> None:
        if self.qkv.dim() != 4 or self.qkv.shape[1] != 3:
            raise ValueError(
                f"Projections needs qkv of shape (tokens, 3, heads, head_dim), got {tuple(self.qkv.shape)}"
            )

    @property
    def heads(self) -> int:
        return self.qkv.shape[2]

    @property
    def hidden(self) -> int:
        return self.qkv.shape[2] * self.qkv.shape[3]

    @property
    def batch(self) -> int:
        return self.qkv.shape[0] // self.max_seqlen if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


@contextlib.contextmanager
def capture(model: nn.Module, layers: Sequence[int] = (-1,)) -> Iterator[list[Projections]]:
    """Keep the projections of some layers of every forward pass inside the block. The layers stay fused.

    Args:
        model: a fused encoder, as `BertModel`, or anything that holds exactly one.
        layers: indices of encoder layers, negative ones from the last.

    Yields:
        A list, empty until the model's forward pass ends, and then one `Projections` for each of `layers`, in their
        order; the next forward pass replaces them. Their gradient reaches the model, unless it ran in `torch.no_grad`.

    Raises:
        ValueError: on entry, for a model with no or several encoders, a layer that it does not have or whose
            attention is not fused or has a learned bias; in the forward pass, for a batch whose padding was not
            dropped, a mask of more than two dimensions, a cache, and reentrant gradient checkpointing, which detaches
            the projections.
        RuntimeError: on entry, inside another `capture` of the model; on leaving, when no forward pass was made.
    """
    bert = _only_bert(model)
    watched = [_fused_attention(bert, i) for i in layers]
    if any(attention.watcher is not None for attention in watched):
        raise RuntimeError("these layers are being captured already: name all layers in one capture(model, layers=...)")
    seen: dict[nn.Module, Projections] = {}
    found: list[Projections] = []

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if either(kwargs.get("cache"), kwargs.get("past_key_values")) is not None:
            raise ValueError("capture knows no cache: leave it out, or distil the model without its prefix")
        _refuse_detached(bert)
        seen.clear()

    def end(module: nn.Module, args: Any, output: Any) -> None:
        found[:] = [seen[attention] for attention in watched]

    for attention in watched:
        attention.watcher = functools.partial(_keep, seen, attention)
    hooks = (bert.register_forward_pre_hook(begin, with_kwargs=True), bert.register_forward_hook(end))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        for attention in set(watched):
            del attention.watcher
    if not found:
        raise RuntimeError(f"nothing was captured: {type(model).__name__} was not called inside the block")


def _only_bert(model: nn.Module) -> Any:
    berts = [module for module in model.modules() if isinstance(module, MODELS)]
    if len(berts) != 1:
        raise ValueError(f"capture needs exactly one BertModel, got {type(model).__name__} with {len(berts)}: pass it")
    return berts[0]


def _fused_attention(bert: Any, index: int) -> FusedSelfAttention:
    count = bert.config.num_hidden_layers
    if not -count <= index < count:
        raise ValueError(f"there is no layer {index} to capture: the model has {count}")
    if not isinstance(bert, EncoderModel) or not attends_fused(bert.layers[index]):
        raise ValueError(
            f"the attention of layer {index} is not fused, and only fused layers are captured: call "
            "fastbert.fuse(model), and see fastbert.explain(model)"
        )
    found = self_attention(bert.layers[index])
    assert found is not None
    if bert.score_bias is not None:
        raise ValueError(
            f"the attention of {type(bert).__name__} adds a learned bias to its scores, which no loss knows: "
            "distil its hidden states or attentions"
        )
    return found[1]


def _refuse_detached(bert: Any) -> None:
    layer: Any = bert.layers[0]
    if bert.training and torch.is_grad_enabled() and layer.gradient_checkpointing:
        if layer._gradient_checkpointing_func.keywords.get("use_reentrant"):
            raise ValueError(
                "reentrant gradient checkpointing detaches the projections, so no gradient would reach the model: use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )


def _keep(
    seen: dict[nn.Module, Projections],
    attention: nn.Module,
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    mask: torch.Tensor | None,
) -> None:
    if attention in seen:  # a checkpointed layer runs again in the backward pass
        return
    if mask is not None:
        raise ValueError(
            "capture takes batches whose padding was dropped, or that have none, but this layer attends under a mask: "
            "pass a 2-D attention_mask, leave packing on, and neither compile the model nor put forward hooks in it"
        )
    seen[attention] = Projections(qkv, cu_seqlens, max_seqlen)


def attention_loss(
    student: Projections, teacher: Projections, kind: str = "kl", *, relation_heads: int | None = None
) -> torch.Tensor:
    """How far the student's attention in one layer is from the teacher's, with no map of either in memory.

    With S = A B^T / sqrt(dim), of one head in one sequence, for A and B the projections the kind names:

    | kind | A, B | loss | source |
    |---|---|---|---|
    | `"kl"` | query, key | mean over heads and rows of KL(softmax(S_teacher), softmax(S_student)) | MiniLM |
    | `"mse_scores"` | query, key | mean over heads and pairs of (S_student - S_teacher)^2 | TinyBERT |
    | `"query_relation"`, `"key_relation"`, `"value_relation"` | one of them, twice | as `"kl"` | MiniLM, MiniLMv2 |

    MiniLM is arXiv:2002.10957, MiniLMv2 arXiv:2012.15828, TinyBERT arXiv:1909.10351. Rows and pairs are those of real
    tokens. Memory grows with the tokens: two numbers a head and token are kept for the backward pass.

    Args:
        student, teacher: projections of the same tokens, any float dtype each. The teacher's are constants. Models may
            differ in hidden size.
        kind: see above.
        relation_heads: put the heads of each model together and split them into so many instead (MiniLMv2's relation
            heads), which lets models differ in their number of heads; divides both hidden sizes, into dims of at most
            128. Default: the heads as they are.

    Returns:
        float32 scalar (float64 for float64 students on the PyTorch path), in nats where it is a divergence; 0 when
        there are no tokens. Its gradient goes to the student's projections.

    Raises:
        ValueError: for an unknown kind, batches that differ in their tokens, different numbers of heads without
            `relation_heads`, heads that do not divide, mixed devices.
        TypeError: for a dtype that no kernel has.
    """
    if kind not in _KINDS:
        raise ValueError(f"unknown kind {kind!r} of attention loss: it is one of {', '.join(_KINDS)}")
    cu_seqlens, max_seqlen = _common_sequences(student, teacher)
    if relation_heads is None and student.heads != teacher.heads:
        raise ValueError(
            f"the student has {student.heads} heads and the teacher {teacher.heads}: pass relation_heads, a number "
            f"that divides both hidden sizes, {student.hidden} and {teacher.hidden}"
        )
    first, second, divergence = _KINDS[kind]
    ours = _relation_heads("student", student, relation_heads).unbind(1)
    theirs = _relation_heads("teacher", teacher, relation_heads).unbind(1)
    rows = relation_loss(
        ours[first], ours[second], theirs[first], theirs[second], cu_seqlens, max_seqlen, kind=divergence
    )
    if divergence == "kl":
        return rows.sum() / max(1, rows.numel())
    if cu_seqlens is None:
        return rows.sum() / max(1, rows.numel() * max_seqlen)
    pairs = cu_seqlens.diff().long().square().sum() * rows.shape[0]
    return rows.sum() / pairs.clamp(min=1)


def _common_sequences(student: Projections, teacher: Projections) -> tuple[torch.Tensor | None, int]:
    """cu_seqlens and max_seqlen of the batch that both were captured on."""
    check_same_device("attention_loss", student=student.qkv, teacher=teacher.qkv)
    theirs = (teacher.qkv.shape[0], teacher.batch)
    if (student.qkv.shape[0], student.batch) != theirs:
        raise ValueError(
            f"student and teacher must have seen the same tokens, got {student.qkv.shape[0]} in {student.batch} "
            f"sequences and {theirs[0]} in {theirs[1]}"
        )
    ours, others = student.cu_seqlens, teacher.cu_seqlens
    reads_back = (not student.qkv.is_cuda or check_mode()) and not torch.compiler.is_compiling()
    if ours is not others and reads_back and not torch.equal(_offsets(student), _offsets(teacher)):
        raise ValueError(
            "student and teacher must have seen the same sequences, got cu_seqlens "
            f"{_offsets(student).tolist()} and {_offsets(teacher).tolist()}"
        )
    if ours is None:
        return None, student.max_seqlen
    return ours, max(student.max_seqlen, teacher.max_seqlen)


def _offsets(projections: Projections) -> torch.Tensor:
    """cu_seqlens, also of sequences that are all as long."""
    if projections.cu_seqlens is not None:
        return projections.cu_seqlens
    return torch.arange(projections.batch + 1, dtype=torch.int32) * projections.max_seqlen


def _relation_heads(model: str, projections: Projections, relation_heads: int | None) -> torch.Tensor:
    """The projections with all heads put together and split anew: (tokens, 3, heads, dim)."""
    hidden = projections.hidden
    heads = projections.heads if relation_heads is None else relation_heads
    if heads < 1 or hidden % heads != 0:
        raise ValueError(f"relation_heads must divide the {model}'s hidden size {hidden}, got {heads}")
    if hidden // heads > MAX_RELATION_DIM:
        raise ValueError(
            f"{heads} relation heads of the {model}'s hidden size {hidden} have dim {hidden // heads}, over the "
            f"kernels' {MAX_RELATION_DIM}: pass relation_heads of at least {-(-hidden // MAX_RELATION_DIM)}"
        )
    return projections.qkv.flatten(2).unflatten(2, (heads, hidden // heads))

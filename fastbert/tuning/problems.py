"""Calls of the ops that tiles are timed on and checked by, each beside its definition.

A call's switches are the kernels' own, without their HAS_, and the activation. Three more: FLAT makes every attention
probability count the same, so that one element of a dropout mask drawn wrongly shows; COLUMNS shifts the maps; FROZEN
leaves out the gradients of the embedding tables, whose scatter is not the kernel's.

A feed-forward kernel is called alone, without the products that are cuBLAS's, and has no gradients to take.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert_kernels import (
    ACTIVATIONS,
    add_layer_norm,
    attention,
    backend,
    bias_activation,
    embed,
    feed_forward,
    reference,
    relation_loss,
)
from fastbert_kernels.attention_backward_kernels import attention_backward_dkv, attention_backward_dq
from fastbert_kernels.attention_kernels import attention_forward
from fastbert_kernels.bias_activation import _bias_activation_backward, _bias_activation_forward
from fastbert_kernels.catalogue import Launch, Product
from fastbert_kernels.column_sums import _column_sums, column_sums
from fastbert_kernels.embedding_kernels import embed_backward, embed_forward
from fastbert_kernels.feed_forward import _backward as feed_forward_backward_op
from fastbert_kernels.feed_forward import _forward as feed_forward_forward_op
from fastbert_kernels.feed_forward_kernels import feed_forward_backward, feed_forward_forward
from fastbert_kernels.layer_norm_kernels import add_layer_norm_backward, add_layer_norm_forward
from fastbert_kernels.relation_kernels import relation_backward_a, relation_backward_b, relation_forward
from fastbert_kernels.sequences import key_spans
from fastbert_kernels.tiles import FEED_FORWARD_ACTIVATIONS, short_class

Switches = tuple[str, ...]
Op = Callable[..., tuple[Tensor, ...]]

#: Kernel -> what is compiled.
COMPILED: dict[str, Any] = {
    "attention_forward": attention_forward,
    "attention_backward_dq": attention_backward_dq,
    "attention_backward_dkv": attention_backward_dkv,
    "relation_forward": relation_forward,
    "relation_backward_a": relation_backward_a,
    "relation_backward_b": relation_backward_b,
    "bias_activation_forward": _bias_activation_forward,
    "bias_activation_backward": _bias_activation_backward,
    "add_layer_norm_forward": add_layer_norm_forward,
    "add_layer_norm_backward": add_layer_norm_backward,
    "embed_forward": embed_forward,
    "embed_backward": embed_backward,
    "feed_forward_forward": feed_forward_forward,
    "feed_forward_backward": feed_forward_backward,
    "column_sums": _column_sums,
}

DROPOUT_P = 0.1
#: Over 32 bits, so that both words of the Philox key matter.
SEED, STREAM = 123_456_789_123, 7
EPS = 1e-12


@dataclass(frozen=True)
class Sizes:
    """How large the calls are.

    Attributes:
        lengths: tokens of a sequence in the timed calls: a shape for each.
        tokens: of a timed call.
        heads: of a timed call's attention.
        ragged: lengths of the sequences of a checked call with CU_SEQLENS.
        even: the same without it or with FLAT, all of them equal.
        rows: of a checked call without sequences: more than the programs of a backward pass take at once.
        vocabulary: rows of the word table.
    """

    lengths: tuple[int, ...] = (30, 128, 512)
    tokens: int = 32768
    heads: int = 12
    ragged: tuple[int, ...] = (1, 63, 64, 65, 257)
    even: tuple[int, ...] = (193, 193)
    rows: int = 4500
    vocabulary: int = 30522


@dataclass(frozen=True)
class Problem:
    """A call.

    Attributes:
        op: the call by fastbert's kernels.
        definition: the same in plain PyTorch, with the mask that the kernels must draw.
        inputs: what both take, and what gradients are taken of.
        differentiable: whether they are: not of an op that is one kernel, forward or backward.
    """

    op: Op
    definition: Op
    inputs: tuple[Tensor, ...]
    differentiable: bool = True


@dataclass(frozen=True)
class _ProblemParts:
    """What a problem is made of; attention takes no rows, row kernels neither lengths nor heads."""

    launch: Launch
    on: Switches
    lengths: tuple[int, ...]
    heads: int
    rows: int
    vocabulary: int
    device: torch.device


def lengths_of(launch: Launch, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Those of the lengths that a launch is timed at."""
    if not launch.traits.attends:
        return lengths[:1]
    if launch.traits.op != "attention":
        return lengths
    return tuple(length for length in lengths if short_class(length) == launch.up_to)


def timed_switches(launch: Launch) -> list[Switches]:
    """The calls that tiles are timed on: a model's, in inference and in training."""
    base: dict[str, Switches] = {
        "attention": ("CU_SEQLENS", "PROBS") if launch.maps else ("CU_SEQLENS",),
        "relation": ("CU_SEQLENS", "SOFTMAX"),
        "bias_activation": ("BIAS", "gelu"),
        "add_layer_norm": ("BIAS", "RESIDUAL"),
        "embed": ("WORD_TABLE", "FROZEN"),
        "feed_forward": ("gelu",),
    }
    op = launch.traits.op
    inference = base[op]
    if op in ("attention", "add_layer_norm", "embed"):
        return [inference, (*inference, "DROPOUT")]
    return [inference, (*inference, "PRE")] if launch.kernel == "feed_forward_forward" else [inference]


def all_switches(launch: Launch) -> list[Switches]:
    """Every kind of call that the tiles of a launch serve: what they are checked by before they are kept."""
    op = launch.traits.op
    if op == "relation":
        return _subsets("CU_SEQLENS", "SOFTMAX")
    if op == "bias_activation":
        return [(*on, activation) for on in _subsets("BIAS") for activation in ACTIVATIONS]
    if op == "add_layer_norm":
        return _subsets("BIAS", "RESIDUAL", "DROPOUT")
    if op == "embed":
        return _subsets("WORD_TABLE", "DROPOUT")
    if op == "feed_forward":
        kinds = _subsets("PRE") if launch.kernel == "feed_forward_forward" else [()]
        return [(*on, activation) for on in kinds for activation in FEED_FORWARD_ACTIVATIONS]
    if not launch.maps:
        return [
            *_subsets("CU_SEQLENS", "HEAD_MASK", "DROPOUT"),
            *(("KEY_SPANS", *more) for more in _subsets("HEAD_MASK", "DROPOUT")),
            ("CU_SEQLENS", "DROPOUT", "FLAT"),
        ]
    maps: list[Switches] = [
        ("CU_SEQLENS", "PROBS"),
        ("CU_SEQLENS", "COLUMNS", "PROBS"),
        ("CU_SEQLENS", "COLUMNS", "BIAS", "PROBS"),
        ("BIAS",),
        ("BIAS", "PROBS"),
        ("KEY_SPANS", "PROBS"),
    ]
    return [
        *((*kind, *more) for kind in maps for more in _subsets("HEAD_MASK", "DROPOUT")),
        *((*kind, "DROPOUT", "FLAT") for kind in (("CU_SEQLENS", "PROBS"), ("BIAS",))),
    ]


def checked_problem(launch: Launch, on: Switches, sizes: Sizes, device: torch.device) -> Problem:
    """A small call with nasty lengths."""
    # Values of short sequences are large: beside them, one element of a long one's mask would not show.
    lengths = sizes.ragged if "CU_SEQLENS" in on and "FLAT" not in on else sizes.even
    return _MAKERS[launch.traits.op](_ProblemParts(launch, on, lengths, 3, sizes.rows, sizes.vocabulary, device))


def timed_problem(launch: Launch, on: Switches, length: int, sizes: Sizes, device: torch.device) -> Problem:
    """A call of a model's size."""
    lengths = (length,) * max(1, sizes.tokens // length)
    return _MAKERS[launch.traits.op](
        _ProblemParts(launch, on, lengths, sizes.heads, sizes.tokens, sizes.vocabulary, device)
    )


def cotangents_of(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of the outputs, the same whoever made them."""
    torch.manual_seed(1)
    return [_draw(*y.shape, dtype=y.dtype, device=y.device) for y in outputs]


def by_kernels(op: Op) -> Op:
    """The op by Triton, whatever the device."""

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        with backend("triton"):
            return op(*inputs)

    return run


def _subsets(*switches: str) -> list[Switches]:
    kept = itertools.product((False, True), repeat=len(switches))
    return [tuple(itertools.compress(switches, keep)) for keep in kept]


def _draw(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal random numbers that bfloat16 holds."""
    return torch.randn(*shape, device=device).bfloat16().to(dtype)


def _dropout(on: Switches, device: torch.device) -> dict[str, Any]:
    if "DROPOUT" not in on:
        return {}
    return {"dropout_p": DROPOUT_P, "seed": torch.tensor(SEED, device=device), "stream": STREAM}


def _attention(call: _ProblemParts) -> Problem:
    launch, on, lengths, heads, device = call.launch, call.on, call.lengths, call.heads, call.device
    batch, longest = len(lengths), max(lengths)
    torch.manual_seed(0)
    qkv = _draw(sum(lengths), 3, heads, launch.width, dtype=launch.dtype, device=device)
    if "FLAT" in on:
        qkv = qkv.sign()
        qkv[:, 0] = 0
    inputs = [qkv]
    if "HEAD_MASK" in on:
        inputs.append(torch.linspace(0.5, 1.5, heads).to(device, launch.dtype))
    bias = spans = columns = probs_seq = None
    if "BIAS" in on:
        bias = _draw(batch, 1, longest, longest, dtype=launch.dtype, device=device)
        bias = (
            torch.zeros_like(bias)
            if "FLAT" in on
            else bias.masked_fill(torch.rand(bias.shape, device=device) < 0.3, torch.finfo(launch.dtype).min)
        )
    if "KEY_SPANS" in on:  # two thirds of the keys; and all but the first and one between
        visible = torch.arange(longest, device=device).expand(batch, longest) < longest * 2 // 3
        visible[1::2] = True
        visible[1::2, [0, longest // 2]] = False
        bias, spans = reference.additive(visible[:, None, None, :]), key_spans(visible)
    if "PROBS" in on:
        probs_seq = longest + 3 if "COLUMNS" in on else longest
    if "COLUMNS" in on:
        columns = torch.cat([torch.arange(length) + 2 for length in lengths]).to(device, torch.int32)
    ends = torch.tensor((0, *lengths)).cumsum(0).to(device, torch.int32) if "CU_SEQLENS" in on else None

    def op(qkv: Tensor, head_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        more = {"bias": bias, "head_mask": head_mask, "probs_seq": probs_seq, "columns": columns}
        out, probs = attention(qkv, ends, longest, key_spans=spans, **more, **_dropout(on, device))  # type: ignore[arg-type]
        return (out,) if probs is None else (out, probs)

    def definition(qkv: Tensor, head_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        dropout: dict[str, Any] = {}
        if "DROPOUT" in on:
            keep = reference.dropout_keep_map(SEED, STREAM, batch * heads, longest, longest, DROPOUT_P)
            dropout = {"dropout_p": DROPOUT_P, "keep": keep.view(batch, heads, longest, longest).to(device)}
        more = {"bias": bias, "head_mask": head_mask, "probs_seq": probs_seq, "columns": columns}
        scale = launch.width**-0.5
        out, probs = reference.attention(qkv, list(lengths), scale=scale, **more, **dropout)  # type: ignore[arg-type]
        return (out,) if probs is None else (out, probs)

    return Problem(op, definition, tuple(inputs))


def _relation(call: _ProblemParts) -> Problem:
    launch, on, lengths, device = call.launch, call.on, call.lengths, call.device
    torch.manual_seed(0)
    shape = (sum(lengths), call.heads, launch.width)
    a, b, teacher_a, teacher_b = (_draw(*shape, dtype=launch.dtype, device=device) for _ in range(4))
    kind, scale = "kl" if "SOFTMAX" in on else "mse", launch.width**-0.5
    ends = torch.tensor((0, *lengths)).cumsum(0).to(device, torch.int32) if "CU_SEQLENS" in on else None

    def definition(a: Tensor, b: Tensor) -> tuple[Tensor]:
        theirs = teacher_a.to(a.dtype), teacher_b.to(a.dtype)
        return (reference.relation_loss(a, b, *theirs, list(lengths), kind, scale, scale),)

    def op(a: Tensor, b: Tensor) -> tuple[Tensor]:
        return (relation_loss(a, b, teacher_a, teacher_b, ends, max(lengths), kind=kind),)

    return Problem(op, definition, (a, b))


def _add_layer_norm(call: _ProblemParts) -> Problem:
    launch, on, rows, device = call.launch, call.on, call.rows, call.device
    torch.manual_seed(0)
    x, residual = (_draw(rows, launch.width, dtype=launch.dtype, device=device) for _ in range(2))
    weight, norm_bias, bias = (_draw(launch.width, dtype=launch.dtype, device=device) for _ in range(3))
    given = {"x": x, "weight": weight, "norm_bias": norm_bias}
    given |= {"bias": bias} if "BIAS" in on else {}
    given |= {"residual": residual} if "RESIDUAL" in on else {}
    absent = {name: None for name in ("bias", "residual") if name not in given}

    def op(*inputs: Tensor) -> tuple[Tensor]:
        arguments: dict[str, Any] = absent | dict(zip(given, inputs, strict=True))
        return (add_layer_norm(**arguments, eps=EPS, **_dropout(on, device)),)

    def definition(*inputs: Tensor) -> tuple[Tensor]:
        arguments: dict[str, Any] = absent | dict(zip(given, inputs, strict=True))
        return (reference.add_layer_norm(**arguments, eps=EPS, **_kept(on, rows, launch.width, device)),)

    return Problem(op, definition, tuple(given.values()))


def _embed(call: _ProblemParts) -> Problem:
    launch, on, rows, device = call.launch, call.on, call.rows, call.device
    torch.manual_seed(0)
    ids, positions, types = (torch.randint(high, (rows,), device=device) for high in (call.vocabulary, 512, 2))
    tables = [_draw(high, launch.width, dtype=launch.dtype, device=device) for high in (call.vocabulary, 512, 2)]
    affine = [_draw(launch.width, dtype=launch.dtype, device=device) for _ in range(2)]
    if "WORD_TABLE" not in on:
        tables[0] = _draw(rows, launch.width, dtype=launch.dtype, device=device)  # the word vectors
    frozen = tables if "FROZEN" in on else []

    def arguments(inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        words, position, token_type, weight, norm_bias = (*frozen, *inputs)
        first, table = (ids, words) if "WORD_TABLE" in on else (words, None)
        return first, positions, types, table, position, token_type, weight, norm_bias, EPS

    def op(*inputs: Tensor) -> tuple[Tensor]:
        return (embed(*arguments(inputs), **_dropout(on, device)),)

    def definition(*inputs: Tensor) -> tuple[Tensor]:
        return (reference.embed(*arguments(inputs), **_kept(on, rows, launch.width, device)),)

    return Problem(op, definition, tuple(affine if frozen else [*tables, *affine]))


def _bias_activation(call: _ProblemParts) -> Problem:
    launch, on, rows, device = call.launch, call.on, call.rows, call.device
    torch.manual_seed(0)
    x = _draw(rows, launch.width, dtype=launch.dtype, device=device)
    bias = (_draw(launch.width, dtype=launch.dtype, device=device),) if "BIAS" in on else ()
    activation = next(name for name in on if name in ACTIVATIONS)

    def op(x: Tensor, bias: Tensor | None = None) -> tuple[Tensor]:
        return (bias_activation(x, bias, activation),)

    def definition(x: Tensor, bias: Tensor | None = None) -> tuple[Tensor]:
        return (reference.bias_activation(x, bias, activation),)

    return Problem(op, definition, (x, *bias))


def _feed_forward(call: _ProblemParts) -> Problem:
    launch, on, rows, device = call.launch, call.on, call.rows, call.device
    activation = next(name for name in on if name in FEED_FORWARD_ACTIVATIONS)
    x, weight1, bias, weight2 = _feed_forward_inputs(launch.dtype, launch.width, rows, device)

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        y, pre = feed_forward_forward_op(x, weight, bias, activation, "PRE" in on)
        return (y, pre) if "PRE" in on else (y,)

    def forward_definition(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        pre = F.linear(x, weight, bias)
        y = reference.bias_activation(pre, None, activation)
        return (y, pre) if "PRE" in on else (y,)

    if launch.kernel == "feed_forward_forward":
        return Problem(forward, forward_definition, (x, weight1, bias), differentiable=False)

    def backward(dout: Tensor, weight: Tensor, pre: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        dpre, y, partials = feed_forward_backward_op(dout, weight, pre, activation)
        (dbias,) = column_sums((partials, (bias.dtype,)))
        assert dbias is not None
        return dpre, y, dbias

    def backward_definition(dout: Tensor, weight: Tensor, pre: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        y, gradient = torch.func.vjp(lambda z: reference.bias_activation(z, None, activation), pre)[:2]
        (dpre,) = gradient(dout @ weight)
        return dpre, y, dpre.sum(0)

    pre = _draw(rows, 4 * launch.width, dtype=launch.dtype, device=device)
    return Problem(backward, backward_definition, (x, weight2, pre, bias), differentiable=False)


def _feed_forward_inputs(dtype: torch.dtype, hidden: int, rows: int, device: torch.device) -> list[Tensor]:
    """x, weight1, bias1 and weight2 of a block of four times its hidden size: products keep x's deviation, roughly."""
    torch.manual_seed(0)
    shapes = (rows, hidden), (4 * hidden, hidden), (4 * hidden,), (hidden, 4 * hidden)
    x, weight1, bias, weight2 = (_draw(*shape, dtype=dtype, device=device) for shape in shapes)
    scale = 0.5 ** (hidden.bit_length() // 2)  # a power of two, so that bfloat16 holds the product
    return [x, weight1 * scale, bias, weight2 * scale]


def feed_forward_problem(product: Product, fused: bool, rows: int, device: torch.device) -> Problem:
    """The whole of a feed-forward block's products, one way or the other."""

    def op(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> tuple[Tensor]:
        return (feed_forward(x, weight1, bias1, weight2, product.activation, fused),)

    def definition(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> tuple[Tensor]:
        return (reference.feed_forward(x, weight1, bias1, weight2, product.activation),)

    return Problem(op, definition, tuple(_feed_forward_inputs(product.dtype, product.hidden, rows, device)))


def _kept(on: Switches, rows: int, features: int, device: torch.device) -> dict[str, Any]:
    if "DROPOUT" not in on:
        return {}
    keep = reference.dropout_keep(SEED, STREAM, rows, features, DROPOUT_P)
    return {"dropout_p": DROPOUT_P, "keep": keep.to(device)}


#: By op.
_MAKERS: dict[str, Callable[[_ProblemParts], Problem]] = {
    "attention": _attention,
    "relation": _relation,
    "bias_activation": _bias_activation,
    "add_layer_norm": _add_layer_norm,
    "embed": _embed,
    "feed_forward": _feed_forward,
}

"""What a call must compute and move, and the least time that takes on a GPU: shared with the runs on a GPU.

    call = cost("attention_forward", lengths=[512] * 64, heads=12, width=64, dtype="bfloat16")
    microseconds, bound = floor(call, PEAKS["H200"], "bfloat16")

A cost is what the outputs need of the inputs: each input read once, each output written once, each product and each
exponential computed once. Left out, because they are far below the rest: element-wise arithmetic, index vectors.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from fastbert_kernels.catalogue import KERNELS
from fastbert_kernels.tiles import PARTIAL_SUMS

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
#: Compile-time switches of the kernels, without their HAS_.
FLAGS = (
    *("CU_SEQLENS", "ORDER", "COLUMNS", "BIAS", "KEY_SPANS", "HEAD_MASK", "DROPOUT", "PROBS", "DPROBS", "WHOLE_DPROBS"),
    *("SUMS", "RESIDUAL", "WORD_TABLE", "TOKEN_TYPES", "SOFTMAX", "PRE", "NORMED", "Y", "THEN"),
)
#: Intermediate size of the feed-forward block by its hidden size, in every BERT.
FEED_FORWARD = 4
#: Rows of BERT's word table.
VOCABULARY = 30522

#: Exponentials an element, forward and backward. erf has one; its derivative is another.
_EXPONENTIALS = {"gelu": (1, 2), "gelu_tanh": (1, 1), "silu": (1, 1), "relu": (0, 0)}


@dataclasses.dataclass(frozen=True)
class Cost:
    """The least that one call can do."""

    flops: float
    """Of matrix products; a multiplication and an addition are two."""
    bytes: float
    """Read from and written to global memory."""
    exps: float
    """Exponentials."""


@dataclasses.dataclass(frozen=True)
class Peaks:
    """The rates of one GPU, per second. Replace fields with measured ones where there are some."""

    tensor: float
    """FLOP/s of a half-precision matrix product."""
    float32: float
    """FLOP/s in float32 outside the tensor cores, which would round to TF32."""
    copy: float
    """Bytes read and written."""
    multiprocessors: int
    clock: float
    """Highest clock of the multiprocessors, in Hz."""

    @property
    def exps(self) -> float:
        """Exponentials: 16 a clock (CUDA C++ Programming Guide; AMD CDNA 3 ISA, a quarter of the vector rate)."""
        return 16 * self.multiprocessors * self.clock


#: H200: matrix product and copy as measured on one. All else are the vendors' peaks, which no program reaches: data
#: sheets of A100 SXM 80 GB, A10, L4, H200 SXM, HGX B200 (an eighth of its eight GPUs) and MI300X, without sparsity, and
#: the appendix of NVIDIA's RTX Blackwell architecture whitepaper (sums in float32, at half the rate on GeForce).
PEAKS: dict[str, Peaks] = {
    "A100": Peaks(tensor=312e12, float32=19.5e12, copy=2.04e12, multiprocessors=108, clock=1.41e9),
    "A10": Peaks(tensor=125e12, float32=31.2e12, copy=0.6e12, multiprocessors=72, clock=1.695e9),
    "L4": Peaks(tensor=121e12, float32=30.3e12, copy=0.3e12, multiprocessors=58, clock=2.04e9),
    "H200": Peaks(tensor=790e12, float32=67e12, copy=4.3e12, multiprocessors=132, clock=1.98e9),
    "B200": Peaks(tensor=2250e12, float32=75e12, copy=8e12, multiprocessors=148, clock=1.965e9),
    "RTX 5090": Peaks(tensor=209.5e12, float32=104.8e12, copy=1.792e12, multiprocessors=170, clock=2.407e9),
    "MI300X": Peaks(tensor=1307e12, float32=163e12, copy=5.3e12, multiprocessors=304, clock=2.1e9),
}


class Floor(NamedTuple):
    """The least time of a call, and what sets it."""

    microseconds: float
    bound: str
    """"compute", "bandwidth" or "exp"."""


def floor(cost: Cost, peaks: Peaks, dtype: str, precision: str = "ieee") -> Floor:
    """The least time of a call: products, copies and exponentials overlap, so the slowest of the three.

    Args:
        cost: of the call.
        peaks: an entry of `PEAKS`, or measured rates.
        dtype: of the operands of the matrix products: a key of `ITEMSIZE`.
        precision: of float32 products, as of `numerics.dot`. Tensor cores take TF32 at half the rate of two-byte
            operands, and "tf32x3" makes three products of one.
    """
    _known("dtype", dtype, ITEMSIZE)
    rates = {"ieee": peaks.float32, "tf32": peaks.tensor / 2, "tf32x3": peaks.tensor / 6}
    _known("precision", precision, rates)
    seconds = {
        "compute": cost.flops / (rates[precision] if dtype == "float32" else peaks.tensor),
        "bandwidth": cost.bytes / peaks.copy,
        "exp": cost.exps / peaks.exps,
    }
    bound = max(seconds, key=lambda name: seconds[name])
    return Floor(seconds[bound] * 1e6, bound)


@dataclasses.dataclass(frozen=True)
class _CallSizes:
    """A call's sizes, and the sums the formulas are made of."""

    lengths: Sequence[int]
    heads: int
    width: int
    itemsize: int
    flags: frozenset[str]
    exponentials: tuple[int, int]
    probs_seq: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def scores(self) -> int:
        """Entries of all attention maps of valid tokens."""
        return self.heads * sum(length * length for length in self.lengths)

    def having(self, *flags: str) -> int:
        """How many of these switches are on."""
        return len(self.flags.intersection(flags))

    def matrices(self, count: int) -> int:
        """Bytes of (tokens, features) matrices, features being heads * width for attention."""
        return count * self.tokens * self.heads * self.width * self.itemsize

    def vectors(self, count: int) -> int:
        """Bytes of (features,) parameters."""
        return count * self.width * self.itemsize

    def statistics(self, count: int) -> int:
        """Bytes of float32 numbers, one for each token and head."""
        return count * self.tokens * self.heads * 4

    def partials(self, count: int) -> int:
        """Bytes of the float32 partial sums of (features,) gradients."""
        return count * min(PARTIAL_SUMS, max(1, self.tokens)) * self.width * 4

    def head_sums(self, count: int) -> int:
        """Bytes of the float32 partial sums of (tokens, heads, head_dim) matrices, a row for 128 tokens of a sequence:
        no tile has more."""
        return count * sum(-(-length // 128) for length in self.lengths) * self.heads * self.width * 4

    def maps(self) -> int:
        """Bytes of what is read of maps: a float32 bias, one for all heads, and the gradient of the probabilities."""
        bias = self.having("BIAS") * self.scores // self.heads * 4
        return bias + self.having("DPROBS") * self.scores * self.itemsize


def _attention(products: int, matrices: int, statistics: int, sums: int = 0) -> Callable[[_CallSizes], Cost]:
    """Cost of an attention kernel by its products of a map with a (tokens, head_dim) matrix, and what it moves: with
    SUMS, partial sums of so many matrices too."""

    def cost(call: _CallSizes) -> Cost:
        entries = call.scores
        if call.having("PROBS") and not call.having("COLUMNS"):  # padding is written too
            entries = len(call.lengths) * call.heads * call.probs_seq**2
        written = call.having("PROBS") * entries * call.itemsize
        moved = call.matrices(matrices) + call.statistics(statistics) + call.maps() + written
        moved += call.having("SUMS") * call.head_sums(sums)
        return Cost(2 * products * call.scores * call.width, moved, call.scores)

    return cost


def _relation(products: int, matrices: int) -> Callable[[_CallSizes], Cost]:
    """Cost of a relation kernel. A number for each row goes in or out, and with the softmaxes two log-sum-exps."""

    def cost(call: _CallSizes) -> Cost:
        softmax = call.having("SOFTMAX")
        moved = call.matrices(matrices) + call.statistics(1 + 2 * softmax)
        return Cost(2 * products * call.scores * call.width, moved, 2 * softmax * call.scores)

    return cost


def _rows(
    matrices: int, optional: tuple[str, ...], statistics: int, vectors: int, partials: int, direction: int = 0
) -> Callable[[_CallSizes], Cost]:
    """Cost of an element-wise or row kernel by the matrices it moves, always and with each of the `optional` flags.

    A bias is one more of the vectors, and in the backward pass one more of the partial sums.
    """

    def cost(call: _CallSizes) -> Cost:
        bias = call.having("BIAS")
        moved = call.matrices(matrices + call.having(*optional)) + call.statistics(statistics)
        moved += call.vectors(vectors + bias) + (call.partials(partials + bias) if direction else 0)
        return Cost(0, moved, call.exponentials[direction] * call.tokens * call.width)

    return cost


def _feed_forward(matrices: int, direction: int) -> Callable[[_CallSizes], Cost]:
    """Cost of a feed-forward kernel: its product, and the (tokens, intermediate) matrices it moves besides operands."""

    def cost(call: _CallSizes) -> Cost:
        intermediate = FEED_FORWARD * call.width
        moved = call.matrices(1 + FEED_FORWARD * (matrices + call.having("PRE"))) + call.vectors(intermediate)
        moved += FEED_FORWARD * (call.partials(1) if direction else call.vectors(1))
        exponentials = call.exponentials[direction] * call.tokens * intermediate
        return Cost(2 * call.tokens * call.width * intermediate, moved, exponentials)

    return cost


def _embed_forward(call: _CallSizes) -> Cost:
    # The tables' rows come from cache when they come again. Three ids are read for each token.
    words = min(call.tokens, VOCABULARY) if call.having("WORD_TABLE") else call.tokens
    gathered = (words + max(call.lengths) + 2) * call.width * call.itemsize
    ids = (2 + call.having("WORD_TABLE")) * call.tokens * 8
    kept = call.having("NORMED") * (call.tokens * call.width * 4 + call.statistics(1))
    return Cost(0, call.matrices(1) + gathered + ids + kept + call.vectors(2), 0)


def _embed_backward(call: _CallSizes) -> Cost:
    kept = call.tokens * call.width * 4
    types = call.having("TOKEN_TYPES")
    # Ids of words and positions go in, and what is found of them out.
    ids = (2 + 2 * call.having("WORD_TABLE") + types) * call.tokens * 8
    moved = call.matrices(2) + kept + call.statistics(1) + ids + call.vectors(1) + call.partials(2 + 2 * types)
    return Cost(0, moved, 0)


def _column_sums(call: _CallSizes) -> Cost:
    vectors = FEED_FORWARD + 2 * 3 + 3  # of a layer: its activation's bias, both norms, and the projections' biases
    return Cost(0, call.partials(vectors) + call.vectors(vectors), 0)


_COSTS: dict[str, Callable[[_CallSizes], Cost]] = {
    # Q K^T and P V; qkv in, context out, two statistics out.
    "attention_forward": _attention(2, 4, 2),
    # S, dP and dQ; qkv, dO and O in, dQ out; two statistics in, delta out.
    "attention_backward_dq": _attention(3, 6, 3, sums=1),
    # S, dP, dV and dK; qkv and dO in, dK and dV out; two statistics and delta in.
    "attention_backward_dkv": _attention(4, 6, 3, sums=2),
    # Both as one: S, dP, dQ, dK and dV; qkv, dO and O in, dqkv out. Delta need not leave the chip.
    "attention_backward": _attention(5, 8, 2, sums=3),
    # The scores of both models; their four operands in.
    "relation_forward": _relation(2, 4),
    # The scores again and dA, or dB; the operands in, and the gradient of one out.
    "relation_backward_a": _relation(3, 5),
    "relation_backward_b": _relation(3, 5),
    "bias_activation_forward": _rows(2, (), 0, 0, 0),
    # dy and x in, dx out, and y again.
    "bias_activation_backward": _rows(3, ("Y",), 0, 0, 0, direction=1),
    # x and the weight in, y out.
    "feed_forward_forward": _feed_forward(1, 0),
    # dout, the weight and the pre-activation in, its gradient and y out; sums of dbias.
    "feed_forward_backward": _feed_forward(3, 1),
    # x in, y out, and to keep the normed sum; rstd out; weight and bias of the norm.
    "add_layer_norm_forward": _rows(2, ("RESIDUAL", "NORMED"), 1, 2, 0),
    # dy and the normed sum in, dz out, with dropout dx, and y again; rstd in; sums of dweight and dnorm_bias.
    "add_layer_norm_backward": _rows(3, ("DROPOUT", "Y"), 1, 1, 2, direction=1),
    # y out, and to keep the normed sum in float32; rstd out; weight and bias of the norm.
    "embed_forward": _embed_forward,
    # dy and the normed sum in, dz out; rstd in; sums of dweight, dnorm_bias and token types.
    "embed_backward": _embed_backward,
    "column_sums": _column_sums,
}

#: Kernels with heads.
_HEADED = {"attention_backward", *(kernel.name for kernel in KERNELS.values() if kernel.attends)}


def cost(
    kernel: str,
    *,
    lengths: Sequence[int],
    width: int,
    dtype: str,
    heads: int = 1,
    flags: Collection[str] = (),
    activation: str | None = None,
    probs_seq: int | None = None,
) -> Cost:
    """What one call of a kernel must compute and move.

    Args:
        kernel: of one of `catalogue.KERNELS`; "attention_backward" is the two backward kernels as one.
        lengths: tokens of each sequence; the kernels of rows only need their sum.
        width: head_dim of an attention kernel, dim of a relation kernel, hidden size of a feed-forward kernel, features
            of the others.
        dtype: of activations and weights, a key of `ITEMSIZE`.
        heads: of an attention or relation kernel.
        flags: which HAS_ switches of the kernel are on, without the HAS_. A BIAS of attention is float32, one for
            all heads; "PROBS" (forward) and "DPROBS" (backward) are maps of every head in `dtype`.
        activation: "gelu", "gelu_tanh", "silu" or "relu", for the kernels that have one.
        probs_seq: side of the maps that PROBS writes; default the longest sequence.

    Raises:
        ValueError: for an unknown kernel, dtype, flag or activation, or sizes below zero.
    """
    _known("kernel", kernel, _COSTS)
    _known("dtype", dtype, ITEMSIZE)
    for flag in flags:
        _known("flag", flag, FLAGS)
    _known("activation", activation or "relu", _EXPONENTIALS)
    if not lengths or min(lengths) < 0 or width < 1 or heads < 1:
        raise ValueError(f"a call needs sequences, got lengths={lengths}, width={width}, heads={heads}")
    if kernel not in _HEADED and heads != 1:
        raise ValueError(f"{kernel} has no heads, got heads={heads}: its width is all its features")
    sides = max(lengths) if probs_seq is None else probs_seq
    exponentials = _EXPONENTIALS[activation or "relu"]
    return _COSTS[kernel](_CallSizes(lengths, heads, width, ITEMSIZE[dtype], frozenset(flags), exponentials, sides))


def _known(what: str, name: str, names: Collection[str]) -> None:
    if name not in names:
        raise ValueError(f"unknown {what} {name!r}: known are {', '.join(sorted(names))}")

"""Attention: the kernel against its definition, over shapes, masks, head masks, dropout and returned probabilities."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from two_references import DTYPES, Outputs, two_references

from fastbert_kernels import attention, backend, reference

#: Over 32 bits, so that both words of the Philox key matter.
SEED, STREAM = 123_456_789_123, 7

Tile = Callable[[int, int], None]


def offsets(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def random_qkv(lengths: list[int], heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(sum(lengths), 3, heads, head_dim).to(device, dtype)


def compare(
    device: torch.device,
    dtype: torch.dtype,
    lengths: list[int],
    *,
    heads: int = 2,
    head_dim: int = 16,
    qkv: torch.Tensor | None = None,
    packed: bool = True,
    bias: torch.Tensor | None = None,
    head_mask: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    probs_seq: int | None = None,
    columns: torch.Tensor | None = None,
    returned: str = "all",
) -> None:
    """The two-reference test of one configuration; `returned`, "out", "probs" or "all", is what the loss sees."""
    batch, longest = len(lengths), max(lengths)
    if qkv is None:
        qkv = random_qkv(lengths, heads, head_dim, dtype, device)
    heads, head_dim = qkv.shape[2:]
    inputs = {"qkv": qkv} if head_mask is None else {"qkv": qkv, "head_mask": head_mask}
    chosen = {"out": slice(0, 1), "probs": slice(1, 2), "all": slice(0, 2)}[returned]
    keep = None
    if dropout_p > 0.0:
        keep = reference.dropout_keep_map(SEED, STREAM, batch * heads, longest, longest, dropout_p)
        keep = keep.view(batch, heads, longest, longest).to(device)

    def kernel(qkv: torch.Tensor, head_mask: torch.Tensor | None = None) -> tuple[torch.Tensor | None, ...]:
        with backend("triton"):
            return attention(
                qkv,
                offsets(lengths, device) if packed else None,
                longest,
                bias=bias,
                head_mask=head_mask,
                scale=scale,
                dropout_p=dropout_p,
                seed=torch.tensor(SEED, device=device) if dropout_p > 0.0 else None,
                stream=STREAM,
                probs_seq=probs_seq,
                columns=columns,
            )[chosen]

    def definition(qkv: torch.Tensor, head_mask: torch.Tensor | None = None) -> tuple[torch.Tensor | None, ...]:
        return reference.attention(
            qkv,
            lengths,
            bias=bias,
            head_mask=head_mask,
            scale=head_dim**-0.5 if scale is None else scale,
            dropout_p=dropout_p,
            keep=keep,
            probs_seq=probs_seq,
            columns=columns,
        )[chosen]

    def eager(qkv: torch.Tensor, head_mask: torch.Tensor | None = None) -> Outputs:
        """The same written out in half precision, softmax in float32: what a model without fused kernels runs."""
        contexts, maps, start = [], [], 0
        added = bias
        if added is not None:
            low = torch.finfo(dtype).min
            added = torch.where(added, 0.0, low).to(dtype) if added.dtype == torch.bool else added.clamp(min=low)
            added = added.to(dtype).expand(batch, heads, -1, -1)
        for b, length in enumerate(lengths):
            q, k, v = qkv[start : start + length].permute(1, 2, 0, 3)
            scores = q @ k.transpose(1, 2) * (head_dim**-0.5 if scale is None else scale)
            scores = scores if added is None else scores + added[b, :, :length, :length]
            probs = torch.softmax(scores, dim=-1, dtype=torch.float32).to(dtype)
            probs = probs if keep is None else reference.dropout(probs, dropout_p, keep[b, :, :length, :length])
            probs = probs if head_mask is None else probs * head_mask.to(dtype)[:, None, None]
            contexts.append((probs @ v).transpose(0, 1))
            if probs_seq is not None:
                here = None if columns is None else columns[start : start + length]
                maps.append(reference._place(probs[None], probs_seq, here)[0])
            start += length
        return (torch.cat(contexts), torch.stack(maps) if maps else None)[chosen]

    two_references(
        kernel,
        definition,
        inputs,
        summed_rows={"head_mask": sum(n * n for n in lengths)},
        plain=None if dtype == torch.float32 else eager,
    )


# The definition


@pytest.mark.parametrize("mask", ["bool", "float", "float wider than the sequences"])
@pytest.mark.parametrize("lengths", [[7, 7], [7, 3]])
def test_definition_is_softmax_attention_in_float64(device: torch.device, mask: str, lengths: list[int]) -> None:
    qkv = torch.randn(sum(lengths), 3, 2, 4, dtype=torch.float64, device=device)
    side = 9 if "wider" in mask else 7
    visible = torch.rand(2, 1, side, side, device=device) > 0.3
    visible[..., 0] = True
    bias = visible if mask == "bool" else torch.randn(2, 1, side, side, device=device).masked_fill(~visible, -torch.inf)
    out, probs = reference.attention(qkv, lengths, bias=bias, scale=0.3, probs_seq=7)
    alone, none = reference.attention(qkv, lengths, bias=bias, scale=0.3)
    assert none is None
    start = 0
    for b, length in enumerate(lengths):
        for h in range(2):
            q, k, v = qkv[start : start + length, :, h].unbind(1)
            added = torch.zeros(side, side, dtype=torch.float64, device=device) if mask == "bool" else bias[b, 0]
            scores = (0.3 * (q @ k.T) + added[:length, :length]).exp() * visible[b, 0, :length, :length]
            want = scores / scores.sum(1, keepdim=True)
            torch.testing.assert_close(probs[b, h, :length, :length], want, rtol=0, atol=1e-12)
            torch.testing.assert_close(out[start : start + length, h], want @ v, rtol=0, atol=1e-12)
            torch.testing.assert_close(alone[start : start + length, h], want @ v, rtol=0, atol=1e-12)
        start += length


def test_definition_has_the_right_gradients(device: torch.device) -> None:
    lengths = [2, 0, 4]
    qkv = torch.randn(6, 3, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    head_mask = torch.tensor([0.0, 0.7], dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.randn(3, 1, 4, 4, dtype=torch.float64, device=device)
    bias[0, :, :, 1] = -torch.inf
    bias[2, :, 2, 2:] = -torch.inf
    keep = reference.dropout_keep_map(SEED, STREAM, 6, 4, 4, 0.3).view(3, 2, 4, 4).to(device)

    def op(qkv: torch.Tensor, head_mask: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return reference.attention(
            qkv, lengths, bias=bias, head_mask=head_mask, scale=0.5, dropout_p=0.3, keep=keep, probs_seq=5
        )

    assert torch.autograd.gradcheck(op, (qkv, head_mask))


# Shapes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 32, 48, 64, 80, 96, 128])
def test_head_dims(device: torch.device, dtype: torch.dtype, head_dim: int, attention_tile: Tile) -> None:
    attention_tile(16, 32)
    compare(device, dtype, [19], head_dim=head_dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[1], [64, 63], [65, 0, 1]])
def test_lengths_around_a_tile(device: torch.device, dtype: torch.dtype, lengths: list[int]) -> None:
    compare(device, dtype, lengths)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [(16, 16), (32, 16), (16, 32)])
def test_many_tiles(device: torch.device, dtype: torch.dtype, tile: tuple[int, int], attention_tile: Tile) -> None:
    attention_tile(*tile)
    compare(device, dtype, [36, 0, 17], heads=1, head_dim=24)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_lengths_need_no_cu_seqlens(device: torch.device, dtype: torch.dtype, attention_tile: Tile) -> None:
    attention_tile(16, 16)
    qkv = random_qkv([18] * 2, 2, 16, dtype, device)
    compare(device, dtype, [18] * 2, qkv=qkv, packed=False, probs_seq=25)
    with backend("triton"):
        padded = attention(qkv, None, 18, probs_seq=18)
        packed = attention(qkv, offsets([18] * 2, device), 18, probs_seq=18)
    for a, b in zip(padded, packed, strict=True):
        assert torch.equal(a, b)


def test_max_seqlen_may_exceed_the_longest_sequence(device: torch.device, attention_tile: Tile) -> None:
    attention_tile(16, 16)
    qkv = random_qkv([5, 20], 2, 16, torch.float32, device).requires_grad_()
    results = []
    for max_seqlen in (20, 50):
        with backend("triton"):
            out, _ = attention(qkv, offsets([5, 20], device), max_seqlen)
        results.append((out, torch.autograd.grad(out.square().sum(), qkv)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("probs_seq", [None, 4])
def test_no_tokens_at_all(device: torch.device, probs_seq: int | None) -> None:
    qkv = torch.randn(0, 3, 2, 16, device=device, requires_grad=True)
    for name in ("triton", "torch"):
        with backend(name):
            out, probs = attention(qkv, None, 4, probs_seq=probs_seq)
            empty, zeros = attention(qkv, offsets([0, 0], device), 4, probs_seq=probs_seq)
        assert out.shape == empty.shape == (0, 2, 16)
        if probs_seq is not None:
            assert probs.shape == (0, 2, 4, 4)
            assert torch.equal(zeros, torch.zeros(2, 2, 4, 4, device=device))
        assert torch.autograd.grad(empty.sum(), qkv)[0].shape == qkv.shape


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.7])
def test_scale(device: torch.device, scale: float) -> None:
    compare(device, torch.float32, [9, 4], scale=scale, probs_seq=9)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 4.0), (torch.float16, 12.0), (torch.bfloat16, 12.0)])
def test_scores_of_large_magnitude(
    device: torch.device, dtype: torch.dtype, factor: float, attention_tile: Tile
) -> None:
    """Scores far over what exp can hold: up to 60, and in half precision 500."""
    attention_tile(16, 16)
    qkv = random_qkv([37], 2, 16, dtype, device)
    qkv[:, :2] *= factor
    compare(device, dtype, [37], qkv=qkv, probs_seq=37)


@pytest.mark.parametrize("score", [200.0, -200.0])
def test_scores_far_from_zero(device: torch.device, score: float, attention_tile: Tile) -> None:
    """All of them: past the sequence, in its last tile, a score of 0 is over what exp can hold, or next to nothing."""
    attention_tile(16, 16)
    qkv = random_qkv([37, 5], 2, 16, torch.float32, device)
    qkv[:, 0, :, 0], qkv[:, 1, :, 0] = score / 5, 20.0
    compare(device, torch.float32, [37, 5], qkv=qkv, probs_seq=37, head_mask=torch.tensor([1.0, -0.5], device=device))


@pytest.mark.parametrize("layout", ["separate", "sliced", "transposed", "expanded"])
def test_strided_qkv(device: torch.device, layout: str) -> None:
    if layout == "separate":  # heads outermost, as stacked per-head projections are
        qkv = torch.randn(3, 2, 21, 16, device=device).permute(2, 0, 1, 3)
    elif layout == "sliced":
        qkv = torch.randn(42, 3, 2, 20, device=device)[::2, :, :, 2:18]
    elif layout == "transposed":
        qkv = torch.randn(21, 3, 16, 2, device=device).transpose(2, 3)
    else:
        qkv = torch.randn(21, 3, 1, 16, device=device).expand(-1, -1, 2, -1)
    compare(device, torch.float32, [13, 8], qkv=qkv, probs_seq=13)


def test_strided_gradients_of_the_results(device: torch.device) -> None:
    qkv = random_qkv([9, 9], 2, 16, torch.float32, device).requires_grad_()
    dout = torch.randn(2, 16, 18, device=device).permute(2, 0, 1)
    dprobs = torch.randn(2, 9, 9, device=device)[:, None].expand(-1, 2, -1, -1).transpose(2, 3)

    def gradient(dout: torch.Tensor, dprobs: torch.Tensor) -> torch.Tensor:
        with backend("triton"):
            results = attention(qkv, None, 9, probs_seq=9)
        return torch.autograd.grad(results, qkv, (dout, dprobs))[0]

    assert torch.equal(gradient(dout, dprobs), gradient(dout.contiguous(), dprobs.contiguous()))


def test_strided_companions(device: torch.device) -> None:
    lengths, dtype = [9, 4], torch.float32
    head_mask = torch.tensor([0.5, 9.0, -2.0, 9.0], device=device)[::2]
    columns = torch.tensor([0, 2, 3, 4, 5, 6, 8, 10, 11, 1, 4, 5, 9], device=device, dtype=torch.int32)
    strided_columns = torch.stack((columns, columns * 0), dim=1)[:, 0]
    compare(device, dtype, lengths, head_mask=head_mask, probs_seq=12, columns=strided_columns)
    compare(device, dtype, lengths, head_mask=torch.tensor(0.5, device=device).expand(2))
    qkv = random_qkv(lengths, 2, 16, dtype, device)
    strided_offsets = torch.tensor([0, -1, 9, -1, 13, -1], device=device, dtype=torch.int32)[::2]
    with backend("triton"):
        assert torch.equal(attention(qkv, strided_offsets, 9)[0], attention(qkv, offsets(lengths, device), 9)[0])


# Masks


def random_bias(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    visible = torch.rand(shape, device=device) > 0.4
    visible[..., 0] = True
    if kind == "bool":
        return visible
    bias = torch.randn(shape, device=device).to(dtype)
    low = -torch.inf if kind == "-inf" else torch.finfo(dtype).min
    return bias.masked_fill(~visible, low)


@pytest.mark.parametrize("kind", ["bool", "-inf"])
@pytest.mark.parametrize("shape", [(3, 1, 1, 20), (1, 1, 20, 20), (3, 2, 20, 20), (1, 2, 1, 20), (3, 1, 23, 30)])
def test_bias_shapes(device: torch.device, kind: str, shape: tuple[int, ...], attention_tile: Tile) -> None:
    attention_tile(16, 16)
    compare(device, torch.float32, [20, 3, 0], bias=random_bias(kind, shape, torch.float32, device))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("kind", ["finfo.min", "-inf"])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32])
def test_bias_of_half_precision_models(
    device: torch.device, dtype: torch.dtype, kind: str, bias_dtype: torch.dtype | None, attention_tile: Tile
) -> None:
    attention_tile(16, 16)
    bias = random_bias(kind, (1, 1, 20, 20), bias_dtype or dtype, device)
    compare(device, dtype, [20], bias=bias, probs_seq=20)


@pytest.mark.parametrize("layout", ["expanded", "expanded columns", "transposed", "sliced"])
def test_strided_bias(device: torch.device, layout: str) -> None:
    if layout == "expanded":
        bias = random_bias("-inf", (2, 1, 1, 20), torch.float32, device).expand(2, 2, 20, 20)
    elif layout == "expanded columns":
        bias = torch.randn(2, 1, 20, 1, device=device).expand(2, 1, 20, 20)
    elif layout == "transposed":
        bias = torch.randn(2, 1, 20, 20, device=device).transpose(2, 3)
    else:
        bias = torch.randn(2, 1, 40, 40, device=device)[:, :, ::2, ::2]
    compare(device, torch.float32, [20, 11], bias=bias, probs_seq=20)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend_name", ["torch", "triton"])
def test_gradient_of_a_learned_bias(device: torch.device, backend_name: str, packed: bool) -> None:
    lengths = [9, 4, 7] if packed else [9, 9]
    qkv = random_qkv(lengths, 2, 16, torch.float32, device).requires_grad_()
    bias = torch.randn(1, 2, 9, 9, device=device, requires_grad=True)
    cotangent = torch.randn(sum(lengths), 2, 16, device=device)
    with backend(backend_name):
        out, _ = attention(qkv, offsets(lengths, device) if packed else None, 9, bias=bias)
    got = torch.autograd.grad(out, (qkv, bias), cotangent)
    contexts = []
    for part in qkv.double().split(lengths):
        q, k, v = part.permute(1, 2, 0, 3)  # each (heads, length, head_dim)
        probs = torch.softmax(q @ k.mT / 4 + bias.double()[0, :, : q.shape[1], : q.shape[1]], -1)
        contexts.append((probs @ v).transpose(0, 1))
    want = torch.autograd.grad(torch.cat(contexts), (qkv, bias), cotangent.double())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        *((torch.float32, kind) for kind in ("bool", "finfo.min", "-inf", "finfo.min plus scores")),
        *((dtype, kind) for dtype in DTYPES[1:] for kind in ("finfo.min", "-inf")),
    ],
)
def test_row_with_no_visible_key_is_uniform(
    device: torch.device, dtype: torch.dtype, kind: str, attention_tile: Tile
) -> None:
    attention_tile(16, 16)
    lengths = [20, 9]
    low = -torch.inf if kind == "-inf" else torch.finfo(dtype).min
    bias = torch.zeros(2, 1, 20, 20, dtype=dtype, device=device)
    bias[0, :, 3] = low  # one row sees nothing
    bias[1] = low  # no row of the second sequence sees anything
    bias[0, :, 18, :17] = low  # keys of the last tile only
    if kind == "finfo.min plus scores":
        bias = bias + torch.rand_like(bias) * 8
    bias = bias >= 0 if kind == "bool" else bias
    head_mask = torch.tensor([0.5, 2.0], device=device, dtype=dtype)
    compare(device, dtype, lengths, bias=bias, head_mask=head_mask, dropout_p=0.2, probs_seq=20)
    qkv = random_qkv(lengths, 2, 16, dtype, device)
    with backend("triton"):
        _, probs = attention(qkv, offsets(lengths, device), 20, bias=bias, probs_seq=20)
    for rows, length in ((probs[0, :, 3], 20), (probs[1, :, :9, :9], 9)):
        torch.testing.assert_close(rows, torch.full_like(rows, 1 / length), rtol=torch.finfo(dtype).eps, atol=0)


def test_masked_key_is_as_if_absent(device: torch.device) -> None:
    qkv = random_qkv([12], 2, 16, torch.float32, device)
    visible = torch.ones(1, 1, 1, 12, dtype=torch.bool, device=device)
    visible[..., 9:] = False
    with backend("triton"):
        masked, probs = attention(qkv, None, 12, bias=visible, probs_seq=12)
        short, _ = attention(qkv[:9], None, 9)
    torch.testing.assert_close(masked[:9], short, rtol=0, atol=1e-6)
    assert not probs[..., 9:].any()


# Head mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probs_seq", [None, 20])
def test_head_mask(device: torch.device, dtype: torch.dtype, probs_seq: int | None, attention_tile: Tile) -> None:
    attention_tile(16, 16)
    head_mask = torch.tensor([1.0, 0.0, -0.75], device=device, dtype=dtype)
    compare(device, dtype, [20, 0, 5], heads=3, head_mask=head_mask, probs_seq=probs_seq)


def test_head_mask_keeps_its_own_dtype(device: torch.device) -> None:
    compare(device, torch.bfloat16, [17, 5], head_mask=torch.tensor([0.3, 0.0], device=device), dropout_p=0.1)


# Dropout


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probs_seq", [None, 24])
def test_dropout(device: torch.device, dtype: torch.dtype, probs_seq: int | None, attention_tile: Tile) -> None:
    attention_tile(16, 32)
    head_mask = torch.tensor([0.5, -2.0], device=device, dtype=dtype)
    compare(device, dtype, [20, 0, 7], dropout_p=0.3, probs_seq=probs_seq, head_mask=head_mask)


def test_dropout_of_everything(device: torch.device) -> None:
    compare(device, torch.float32, [9, 4], dropout_p=1.0, probs_seq=9, head_mask=torch.ones(2, device=device))


# Probabilities


@pytest.mark.parametrize(
    ("dtype", "returned"),
    [*((torch.float32, r) for r in ("out", "probs", "all")), (torch.float16, "all"), (torch.bfloat16, "all")],
)
@pytest.mark.parametrize("with_columns", [False, True])
def test_probs_and_their_gradient(
    device: torch.device, dtype: torch.dtype, returned: str, with_columns: bool, attention_tile: Tile
) -> None:
    attention_tile(16, 16)
    lengths, side = [20, 0, 7], 30
    columns = None
    if with_columns:
        columns = torch.cat([torch.randperm(side)[:n].sort()[0] for n in lengths]).to(device, torch.int32)
    compare(device, dtype, lengths, probs_seq=side, columns=columns, returned=returned)


def test_probs_with_everything_at_once(device: torch.device, attention_tile: Tile) -> None:
    attention_tile(32, 16)
    lengths, side = [20, 0, 33], 50
    compare(
        device,
        torch.float32,
        lengths,
        bias=random_bias("-inf", (3, 2, 33, 33), torch.float32, device),
        head_mask=torch.tensor([0.5, -1.5], device=device),
        dropout_p=0.25,
        probs_seq=side,
        columns=torch.cat([torch.randperm(side)[:n] for n in lengths]).to(device, torch.int32),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_of_the_probs_is_exactly_zero(device: torch.device, dtype: torch.dtype, attention_tile: Tile) -> None:
    attention_tile(16, 16)
    lengths, side = [7, 0, 20], 40
    qkv = random_qkv(lengths, 2, 16, dtype, device)
    columns = [torch.randperm(side)[:n] for n in lengths]
    placed = torch.cat(columns).to(device, torch.int32)
    with backend("triton"):
        _, left = attention(qkv, offsets(lengths, device), 20, probs_seq=side)
        _, spread = attention(qkv, offsets(lengths, device), 20, probs_seq=side, columns=placed)
    for b, length in enumerate(lengths):
        rows = torch.zeros(side, dtype=torch.bool)
        rows[:length] = True
        inside = (rows[:, None] & rows[None, :]).to(device)
        assert bool((left[b, :, ~inside] == 0).all())
        assert bool((left[b, :, inside] > 0).all())
        rows = torch.zeros(side, dtype=torch.bool)
        rows[columns[b]] = True
        inside = (rows[:, None] & rows[None, :]).to(device)
        assert bool((spread[b, :, ~inside] == 0).all())
        assert bool((spread[b, :, inside] > 0).all())
        sums = left[b, :, :length].float().sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_probs_do_not_change_the_context(device: torch.device) -> None:
    qkv = random_qkv([9, 5], 2, 16, torch.bfloat16, device)
    with backend("triton"):
        with_probs, _ = attention(qkv, offsets([9, 5], device), 9, probs_seq=9)
        without, none = attention(qkv, offsets([9, 5], device), 9)
    assert none is None
    assert torch.equal(with_probs, without)


def test_same_call_gives_the_same_bits(device: torch.device) -> None:
    qkv = random_qkv([20, 5], 2, 16, torch.float32, device).requires_grad_()

    def run() -> tuple[torch.Tensor, ...]:
        with backend("triton"):
            out, probs = attention(qkv, offsets([20, 5], device), 20, probs_seq=20)
        return out, probs, *torch.autograd.grad(out.sum() + probs.square().sum(), qkv)

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


# The order in which sequences start


@pytest.mark.parametrize(
    "features",
    [
        "plain",
        "everything",
        *[pytest.param(one, marks=pytest.mark.slow) for one in ("bias", "head mask", "dropout", "maps")],
    ],
)
def test_any_order_gives_the_same(device: torch.device, features: str, attention_tile: Tile) -> None:
    attention_tile(16, 16)
    lengths = [5, 0, 33, 17, 0, 18]
    qkv = random_qkv(lengths, 2, 16, torch.float32, device).requires_grad_()
    more: dict[str, Any] = {}
    if features in ("bias", "everything"):
        more["bias"] = random_bias("-inf", (6, 2, 33, 33), torch.float32, device)
    if features in ("head mask", "everything"):
        more["head_mask"] = torch.tensor([0.5, 2.0], device=device, requires_grad=True)
    if features in ("dropout", "everything"):
        more |= {"dropout_p": 0.2, "seed": torch.tensor(SEED, device=device), "stream": STREAM}
    if features in ("maps", "everything"):
        more["probs_seq"] = 40
    if features == "everything":
        more["columns"] = torch.cat([torch.randperm(40)[:n] for n in lengths]).to(device, torch.int32)
    order = torch.tensor([[2, 5, 3, 0, 1, 4], [0] * 6], device=device, dtype=torch.int32).T[:, 0]  # strided

    def results(order: torch.Tensor | None) -> list[torch.Tensor]:
        with backend("triton"):
            outputs = [x for x in attention(qkv, offsets(lengths, device), 33, order=order, **more) if x is not None]
        torch.manual_seed(1)
        loss = sum((x * torch.randn(x.shape).to(device)).sum() for x in outputs)
        inputs = [x for x in (qkv, more.get("head_mask")) if x is not None]
        return [*outputs, *torch.autograd.grad(loss, inputs)]

    for ordered, plain in zip(results(order), results(None), strict=True):
        assert plain.isfinite().all()
        assert torch.equal(ordered, plain)


def test_the_kernels_take_the_sequences_that_the_order_names(device: torch.device) -> None:
    """No result tells the order of the work: one that leaves a sequence out tells that it is followed."""
    qkv = random_qkv([9, 5], 2, 16, torch.float32, device)
    cu_seqlens = offsets([9, 5], device)
    twice = torch.tensor([1, 1], device=device, dtype=torch.int32)
    unmasked = None, None, 0.25, 0.0, None, 0
    with backend("triton"):
        out, stats, _ = torch.ops.fastbert.attention(qkv, cu_seqlens, 9, *unmasked, 0, None, None, None)
        some, *_ = torch.ops.fastbert.attention(qkv, cu_seqlens, 9, *unmasked, 0, None, twice, None)
        arguments = torch.randn_like(out), None, qkv, out, stats, cu_seqlens, 9, *unmasked, None
        gradient, *_ = torch.ops.fastbert.attention_backward(*arguments, None, None)
        some_gradient, *_ = torch.ops.fastbert.attention_backward(*arguments, twice, None)
    for named, whole in ((some, out), (some_gradient, gradient)):
        assert named[:9].isnan().all()
        assert torch.equal(named[9:], whole[9:])


# Anything at all


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=3).filter(any),
    heads=st.integers(1, 2),
    head_dim=st.sampled_from([8, 20, 32]),
    tile=st.sampled_from([(16, 16), (32, 16), (16, 32)]),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from([None, "bool", "finfo.min", "-inf"]),
    masked_head=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.1, 0.5]),
    padding=st.none() | st.integers(0, 20),
    spread=st.booleans(),
)
def test_any_configuration(
    device: torch.device,
    attention_tile: Tile,
    lengths: list[int],
    heads: int,
    head_dim: int,
    tile: tuple[int, int],
    dtype: torch.dtype,
    kind: str | None,
    masked_head: bool,
    dropout_p: float,
    padding: int | None,
    spread: bool,
) -> None:
    attention_tile(*tile)
    longest = max(lengths)
    probs_seq = None if padding is None else longest + padding
    columns = None
    if spread and probs_seq is not None:
        columns = torch.cat([torch.randperm(probs_seq)[:n].sort()[0] for n in lengths]).to(device, torch.int32)
    compare(
        device,
        dtype,
        lengths,
        heads=heads,
        head_dim=head_dim,
        bias=None if kind is None else random_bias(kind, (len(lengths), 1, longest, longest), dtype, device),
        head_mask=torch.linspace(0, 1.5, heads, dtype=dtype, device=device) if masked_head else None,
        dropout_p=dropout_p,
        probs_seq=probs_seq,
        columns=columns,
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 32, 64, 80, 128])
@pytest.mark.parametrize("features", ["plain", "bias", "dropout", "everything"])
def test_sweep(device: torch.device, dtype: torch.dtype, head_dim: int, features: str) -> None:
    lengths = [1, 63, 64, 65, 129, 0]
    everything = features == "everything"
    compare(
        device,
        dtype,
        lengths,
        head_dim=head_dim,
        bias=random_bias("-inf", (6, 1, 129, 129), dtype, device) if everything or features == "bias" else None,
        head_mask=torch.tensor([0.5, 0.0], dtype=dtype, device=device) if everything else None,
        dropout_p=0.1 if everything or features == "dropout" else 0.0,
        probs_seq=140 if everything else None,
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [511, 512])
def test_long_sequences(device: torch.device, dtype: torch.dtype, length: int) -> None:
    compare(device, dtype, [length, 1], heads=1, head_dim=128, probs_seq=length, dropout_p=0.1)


# The op as torch sees it


def op_arguments(device: torch.device, requires_grad: bool) -> tuple:
    qkv = random_qkv([9, 5], 2, 16, torch.float32, device).requires_grad_(requires_grad)
    head_mask = torch.tensor([0.5, 2.0], device=device, requires_grad=requires_grad)
    bias = torch.randn(2, 1, 9, 9, device=device).expand(2, 2, 9, 9)
    columns = torch.cat([torch.randperm(12)[:n] for n in (9, 5)]).to(device, torch.int32)
    seed = torch.tensor(SEED, device=device)
    order = torch.tensor([1, 0], device=device, dtype=torch.int32)
    return qkv, offsets([9, 5], device), 9, bias, head_mask, 0.25, 0.2, seed, STREAM, 12, columns, order, None


def test_opcheck_forward(device: torch.device) -> None:
    everything = op_arguments(device, requires_grad=True)
    torch.library.opcheck(torch.ops.fastbert.attention, everything)
    qkv = torch.randn(18, 3, 2, 16, device=device, requires_grad=True)
    plain = (qkv, None, 9, None, None, 0.25, 0.0, None, 0, 0, None, None, None)
    torch.library.opcheck(torch.ops.fastbert.attention, plain)


def test_opcheck_backward(device: torch.device) -> None:
    everything = op_arguments(device, requires_grad=False)
    out, lse, probs = torch.ops.fastbert.attention(*everything)
    qkv, cu_seqlens, max_seqlen, bias, head_mask, scale, dropout_p, seed, stream, _, columns, order, key_spans = (
        everything
    )
    arguments = (
        torch.randn_like(out), torch.randn_like(probs), qkv, out, lse, cu_seqlens, max_seqlen, bias, head_mask, scale,
        dropout_p, seed, stream, columns, order, key_spans,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastbert.attention_backward, arguments)
    torch.library.opcheck(torch.ops.fastbert.attention_backward, (*arguments, True))
    torch.library.opcheck(torch.ops.fastbert.attention_backward, (*arguments, False, True))
    plain = (torch.randn_like(out), None, qkv, out, lse, cu_seqlens, 9, None, None, 0.25, 0.0, None, 0)
    torch.library.opcheck(torch.ops.fastbert.attention_backward, (*plain, None, None, None))


@pytest.mark.parametrize("features", ["plain", "everything"])
def test_backward_of_whole_gradients_of_probabilities(
    device: torch.device, features: str, attention_tile: Tile
) -> None:
    attention_tile(16, 16)
    lengths, side = [20, 5], 20
    qkv, bounds = random_qkv(lengths, 2, 16, torch.float32, device), offsets(lengths, device)
    bias = head_mask = columns = seed = None
    if features == "everything":
        side = 23
        bias = torch.randn(2, 2, 20, 20, device=device)
        head_mask = torch.rand(2, device=device)
        columns = torch.cat([torch.arange(length) + 3 for length in lengths]).to(device, torch.int32)
        seed = torch.tensor(SEED, device=device)
    dropout_p = 0.0 if seed is None else 0.3
    forward: Any = torch.ops.fastbert.attention
    backward: Any = torch.ops.fastbert.attention_backward
    out, stats, probs = forward(
        qkv, bounds, 20, bias, head_mask, 0.25, dropout_p, seed, STREAM, side, columns, None, None
    )
    dout, dprobs = torch.randn_like(out), torch.randn_like(probs)
    rest = (stats, bounds, 20, bias, head_mask, 0.25, dropout_p, seed, STREAM, columns, None, None)
    want = backward(dout, dprobs, qkv, out, *rest)
    whole = dprobs.clone()
    for b, (start, length) in enumerate([(0, 20), (20, 5)]):
        first = 0 if columns is None else int(columns[start])
        here, there = slice(start, start + length), slice(first, first + length)
        whole[b, :, there, there] += torch.einsum("qhd,khd->hqk", dout[here], qkv[here, 2])
    got = backward(dout, whole, qkv, torch.full_like(out, torch.nan), *rest, True)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def _everything(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a ragged call with every feature; the map's are left out."""
    return {
        "bias": torch.randn(3, 2, 7, 7, device=device, dtype=dtype),
        "head_mask": torch.rand(2, device=device, dtype=dtype).requires_grad_(),
        "columns": torch.cat([torch.randperm(9)[:n].sort().values for n in (7, 2)]).to(device, torch.int32),
        "dropout_p": 0.3,
    }


def test_definitions_gradient_of_the_probabilities_by_finite_differences() -> None:
    """They lie between the scores and the context: what is added to them changes the context."""
    cpu = torch.device("cpu")
    given, keep = _everything(cpu, torch.float64), torch.rand(3, 2, 7, 7) > 0.3
    qkv = torch.randn(9, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    added = torch.randn(3, 2, 9, 9, dtype=torch.float64, requires_grad=True)

    def run(qkv: torch.Tensor, added: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        def hand_out(probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return probs + added, probs + added

        return reference.attention(qkv, [7, 0, 2], scale=0.3, probs_seq=9, keep=keep, hand_out=hand_out, **given)

    assert torch.autograd.gradcheck(run, (qkv, added), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (qkv, added), fast_mode=True)


@pytest.mark.parametrize("features", ["equal lengths", "longer maps", "everything"])
def test_gradient_of_the_probabilities(device: torch.device, features: str, attention_tile: Tile) -> None:
    attention_tile(16, 16)
    lengths, side = ([5, 5], 5) if features == "equal lengths" else ([7, 0, 2], 9)
    given: dict[str, Any] = _everything(device, torch.float32) if features == "everything" else {}
    packed = None if features == "equal lengths" else offsets(lengths, device)
    keep = reference.dropout_keep_map(SEED, STREAM, 6, 7, 7, 0.3).view(3, 2, 7, 7).to(device)
    start = random_qkv(lengths, 2, 16, torch.float32, device)
    found = []
    for kernel in (True, False):
        qkv = start.clone().requires_grad_()
        added = torch.zeros(len(lengths), 2, side, side, device=device, requires_grad=True)
        more = {"hand_out": lambda probs, added=added: (probs, probs + added), "probs_seq": side, **given}
        with backend("triton"):
            if kernel:
                seed = torch.tensor(SEED, device=device)
                out, probs = attention(qkv, packed, max(lengths), scale=0.3, seed=seed, stream=STREAM, **more)
            else:
                more |= {"keep": keep} if features == "everything" else {}
                out, probs = reference.attention(qkv, lengths, scale=0.3, **more)
        torch.manual_seed(5)
        probs.register_hook(lambda grad: 2.0 * grad)
        loss = (out * torch.randn(out.shape).to(out)).sum() + (probs * torch.randn(probs.shape).to(probs)).sum()
        found.append(torch.autograd.grad(loss, [qkv, added, probs, *([given["head_mask"]] if given else [])]))
    for ours, theirs in zip(*found, strict=True):
        assert theirs.abs().max() > 0
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_second_derivative_is_refused(device: torch.device) -> None:
    qkv = random_qkv([9], 2, 16, torch.float32, device).requires_grad_()
    with backend("triton"):
        out, _ = attention(qkv, None, 9)
    (gradient,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="fastbert's attention kernel has no second derivative"):
        gradient.sum().backward()
    with backend("triton"):
        out, probs = attention(qkv, None, 9, probs_seq=9)
    (gradient,) = torch.autograd.grad(out.sum(), probs, create_graph=True)  # linear in the values alone
    with pytest.raises(NotImplementedError, match="fastbert's attention kernel has no second derivative"):
        gradient.sum().backward()


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(14, 2, 2, 16)}, "(tokens, 3, heads, head_dim), got (14, 2, 2, 16)"),
        ({"qkv": torch.zeros(14, 96)}, "(tokens, 3, heads, head_dim), got (14, 96)"),
        ({"qkv": torch.zeros(14, 3, 2, 136)}, "head_dim up to 128, got 136"),
        ({"dropout_p": 1.5}, "dropout_p must lie in [0, 1], got 1.5"),
        ({"dropout_p": -0.1}, "dropout_p must lie in [0, 1], got -0.1"),
        ({"dropout_p": 0.1}, "dropout_p=0.1 needs a seed"),
        ({"max_seqlen": 0}, "max_seqlen must be at least 1, got 0"),
        ({"cu_seqlens": None}, "max_seqlen=9 tokens, but qkv has 14 tokens"),
        ({"cu_seqlens": torch.tensor([0, 9, 14])}, "must be int32 of shape (batch + 1,), got torch.int64 (3,)"),
        ({"cu_seqlens": torch.zeros(2, 2, dtype=torch.int32)}, "got torch.int32 (2, 2)"),
        ({"bias": torch.zeros(9, 9)}, "must broadcast to (batch, heads, seq, seq) = (2, 2, 9, 9), got (9, 9)"),
        ({"bias": torch.zeros(3, 1, 9, 9)}, "= (2, 2, 9, 9), got (3, 1, 9, 9)"),
        ({"bias": torch.zeros(2, 1, 9, 1)}, "= (2, 2, 9, 9), got (2, 1, 9, 1)"),
        ({"bias": torch.zeros(2, 1, 8, 9)}, "= (2, 2, 9, 9), got (2, 1, 8, 9)"),
        ({"head_mask": torch.ones(3)}, "head_mask must have shape (heads,) = (2,), got (3,)"),
        ({"probs_seq": 8}, "probs_seq=8 is shorter than the longest sequence, max_seqlen=9"),
        ({"columns": torch.zeros(13, dtype=torch.int32)}, "= (14,), got torch.int32 (13,)"),
        ({"columns": torch.zeros(14)}, "= (14,), got torch.float32 (14,)"),
        ({"order": torch.zeros(3, dtype=torch.int32)}, "of shape (batch,) = (2,), got torch.int32 (3,)"),
        ({"order": torch.tensor([1, 0])}, "of shape (batch,) = (2,), got torch.int64 (2,)"),
        ({"cu_seqlens": None, "max_seqlen": 7, "order": torch.zeros(2, dtype=torch.int32)}, "pass no order"),
    ],
)  # fmt: skip
def test_bad_input(device: torch.device, change: dict, message: str) -> None:
    arguments = {"qkv": torch.zeros(14, 3, 2, 16), "cu_seqlens": offsets([9, 5], device), "max_seqlen": 9} | change
    on_device = {
        name: x.to(device).detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for name, x in arguments.items()
    }
    with backend("triton"), pytest.raises(ValueError, match=re.escape(message)):
        attention(**on_device)


@pytest.mark.parametrize("bounds", [[0, 9, 13], [1, 9, 14], [0, 4, 14], [0, 9, 5, 14], [14]])
def test_bad_cu_seqlens(device: torch.device, monkeypatch: pytest.MonkeyPatch, bounds: list[int]) -> None:
    monkeypatch.setenv("FASTBERT_CHECK", "1")  # on a GPU the values are looked at only then
    qkv = torch.zeros(14, 3, 2, 16, device=device)
    message = f"from 0 to the 14 tokens of qkv in steps of at most max_seqlen=9, got {bounds}"
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(qkv, torch.tensor(bounds, device=device, dtype=torch.int32), 9)


@pytest.mark.parametrize("backend_name", ["torch", "triton"])
@pytest.mark.parametrize("order", [[0, 0], [1, 2], [-1, 0]])
def test_bad_order(device: torch.device, monkeypatch: pytest.MonkeyPatch, backend_name: str, order: list[int]) -> None:
    monkeypatch.setenv("FASTBERT_CHECK", "1")  # on a GPU the values are looked at only then
    qkv = torch.zeros(14, 3, 2, 16, device=device)
    message = f"order must name each of the 2 sequences once, got {order}"
    with backend(backend_name), pytest.raises(ValueError, match=re.escape(message)):
        attention(qkv, offsets([9, 5], device), 9, order=torch.tensor(order, device=device, dtype=torch.int32))


def test_mixed_devices(device: torch.device) -> None:
    qkv = torch.zeros(18, 3, 2, 16, device=device)
    with pytest.raises(ValueError, match=rf"one device, got qkv on {device}.*head_mask on meta"):
        attention(qkv, None, 9, head_mask=torch.ones(2, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_dtype_without_a_kernel(device: torch.device, dtype: torch.dtype) -> None:
    with backend("triton"), pytest.raises(TypeError, match=f"no fastbert kernel has dtype {dtype}"):
        attention(torch.zeros(9, 3, 2, 16, device=device, dtype=dtype), None, 9)

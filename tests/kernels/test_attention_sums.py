"""The gradient of a bias that was added to queries, keys and values: sums over tokens that attention's backward kernels
make of what they have in registers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from two_references import DTYPES

from fastbert_kernels import backend, reference
from fastbert_kernels.column_sums import column_sums
from fastbert_kernels.sequences import key_spans

SEED, STREAM = 123_456_789_123, 7
HEADS, HEAD_DIM = 2, 24
#: Empty, shorter than a tile, tiles to the row, and one more; the longest ends with a tile.
RAGGED = (0, 5, 16, 32, 33, 0, 1, 48)
EVEN = (20, 20, 20)

Tile = Callable[[int, int], None]


def backward(device: torch.device, qkv: torch.Tensor, lengths: tuple[int, ...], features: str) -> list[torch.Tensor]:
    """dqkv and the rows of partial sums of dQ, and of dK and dV."""
    longest, even = max(lengths), len({*lengths}) == 1
    bias = head_mask = seed = order = spans = bounds = None
    if not even:
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        order = torch.tensor(lengths).argsort(descending=True).to(device, torch.int32)
    if features == "everything":
        head_mask = torch.tensor([0.5, 1.5], device=device)
        seed = torch.tensor(SEED, device=device)
        bias = torch.randn(len(lengths), HEADS, longest, longest, device=device)
    if features == "key spans":
        visible = torch.arange(longest, device=device) < torch.tensor([7, 0, longest], device=device)[:, None]
        visible[0, 2] = False
        bias, spans = reference.additive(visible[:, None, None, :]), key_spans(visible)
        bias = bias.expand(-1, HEADS, longest, -1)
    side = longest if features == "everything" else 0
    attended = qkv, bounds, longest, bias, head_mask, 0.25, 0.0 if seed is None else 0.3, seed, STREAM
    ops: Any = torch.ops.fastbert
    with backend("triton"):
        out, stats, probs = ops.attention(*attended, side, None, order, spans)
        dprobs = torch.randn_like(probs) if side else None
        given = torch.randn_like(out), dprobs, qkv, out, stats, *attended[1:], None, order, spans, False
        dqkv, _, *sums = ops.attention_backward(*given, True)
    return [dqkv, *sums]


def check(dqkv: torch.Tensor, sums: list[torch.Tensor]) -> None:
    """The sums are those of what was stored, but for its rounding."""
    kinds = torch.float32, torch.float32
    with backend("triton"):
        found = column_sums((sums[0], kinds[:1]), (sums[1], kinds))
    want = dqkv.double().flatten(2).sum(0)
    allowed = (torch.finfo(dqkv.dtype).eps + 1e-6) * dqkv.double().abs().flatten(2).sum(0)
    for vector, wanted, bound in zip(found, want, allowed, strict=True):
        assert vector is not None
        assert bool(((vector.double() - wanted).abs() <= bound + 1e-9).all())


@pytest.mark.parametrize("tile", [(16, 32), (32, 16)])
@pytest.mark.parametrize(
    ("lengths", "features"),
    [(RAGGED, "plain"), (EVEN, "plain"), (RAGGED, "everything"), (EVEN, "everything"), (EVEN, "key spans")],
)
def test_sums_of_what_is_stored(
    device: torch.device, attention_tile: Tile, tile: tuple[int, int], lengths: tuple[int, ...], features: str
) -> None:
    attention_tile(*tile)
    qkv = torch.randn(sum(lengths), 3, HEADS, HEAD_DIM, device=device)
    dqkv, *sums = backward(device, qkv, lengths, features)
    assert dqkv.abs().flatten(2).sum(0).min() > 0
    check(dqkv, sums)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_sums_in_half_precision(device: torch.device, dtype: torch.dtype) -> None:
    qkv = torch.randn(sum(RAGGED), 3, HEADS, HEAD_DIM, device=device).to(dtype)
    dqkv, *sums = backward(device, qkv, RAGGED, "plain")
    assert sums[0].dtype == sums[1].dtype == torch.float32
    check(dqkv, sums)


def test_keys_past_the_end_add_nothing(device: torch.device) -> None:
    """Scores so low that the zeros which stand in for keys past the end would have infinite probabilities."""
    qkv = torch.randn(9, 3, HEADS, HEAD_DIM, device=device)
    qkv[:, 0], qkv[:, 1] = 10.0, -10.0
    dqkv, *sums = backward(device, qkv, (5, 4), "plain")
    check(dqkv, sums)


def test_short_sequences_have_no_rows_for_the_longest_ones_tiles(device: torch.device, attention_tile: Tile) -> None:
    attention_tile(16, 32)
    lengths = (100, *[1] * 20)
    dqkv, *sums = backward(device, torch.randn(120, 3, HEADS, HEAD_DIM, device=device), lengths, "plain")
    assert [len(rows) for rows in sums] == [120 // 16 + 21, 120 // 32 + 21]
    check(dqkv, sums)


def test_the_same_sums_each_time(device: torch.device) -> None:
    qkv = torch.randn(sum(RAGGED), 3, HEADS, HEAD_DIM, device=device)
    torch.manual_seed(1)
    once = backward(device, qkv, RAGGED, "plain")
    torch.manual_seed(1)
    for first, second in zip(once, backward(device, qkv, RAGGED, "plain"), strict=True):
        assert torch.equal(first, second)

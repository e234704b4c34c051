"""Dropout: the bits, the rate, and one mask in the forward and the backward pass."""

import itertools
from collections.abc import Callable

import pytest
import torch
from two_references import directional_derivatives

from fastbert_kernels import add_layer_norm, attention, backend, embed, reference

SEEDS = [0, -5, 123_456_789_123, 2**63 - 1, -(2**63)]


def philox_4x32(key: int, counter: tuple[int, int, int, int], rounds: int) -> tuple[int, int, int, int]:
    """Philox as its paper writes it, in Python's unbounded integers."""
    low = 2**32 - 1
    c, k = list(counter), [key % 2**32, (key >> 32) % 2**32]
    for _ in range(rounds):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [second >> 32 ^ c[1] ^ k[0], second & low, first >> 32 ^ c[3] ^ k[1], first & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return tuple(c)


def test_philox_known_answers() -> None:
    # The known-answer vectors of Random123, https://github.com/DEShawResearch/random123, tests/kat_vectors
    ones = 2**32 - 1
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox_4x32(0, (0, 0, 0, 0), 7) == (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    assert philox_4x32(2**64 - 1, (ones,) * 4, 7) == (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)
    assert philox_4x32(0x299F31D0_A4093822, pi, 7) == (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)
    assert philox_4x32(0, (0, 0, 0, 0), 10) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


def kept(seed: int, counter: tuple[int, int, int, int], word: int, half: int, p: float) -> bool:
    """Whether the half, 0 the low and 1 the high, of a word of a Philox call is kept."""
    draw = philox_4x32(seed % 2**64, counter, 7)[word] >> 16 * half & 0xFFFF
    return draw >= round(p * 2**16)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stream", [0, 7, 2**31 - 1])
def test_reference_masks_are_philox(seed: int, stream: int) -> None:
    rows, columns, p = 3, 19, 0.4
    found = reference.dropout_keep(seed, stream, rows, columns, p)
    assert found.shape == (rows, columns)
    for row, column in itertools.product(range(rows), range(columns)):
        counter = (column // 8, row, 0, stream)
        assert found[row, column].item() == kept(seed, counter, column % 8 // 2, column % 2, p)

    planes, rows, columns = 2, 19, 35
    found = reference.dropout_keep_map(seed, stream, planes, rows, columns, p)
    assert found.shape == (planes, rows, columns)
    for plane, row, column in itertools.product(range(planes), range(rows), range(columns)):
        counter = (column // 16 * 4 + column % 8 // 2, row // 16 * 8 + row % 8, plane, stream)
        word = 2 * (column // 8 % 2) + row // 8 % 2
        assert found[plane, row, column].item() == kept(seed, counter, word, column % 2, p)


def ops(device: torch.device) -> dict[str, Callable[..., torch.Tensor]]:
    """Each op with dropout, as a map onto an array that is zero exactly where its mask drops."""
    rows, features = 200, 64
    ones, zeros = torch.ones(features, device=device), torch.zeros(features, device=device)
    ids = torch.zeros(rows, dtype=torch.long, device=device)

    def attention_probs(dropout_p: float, seed: torch.Tensor, stream: int) -> torch.Tensor:
        qkv = torch.zeros(2 * 64, 3, 2, 16, device=device)
        return attention(qkv, None, 64, dropout_p=dropout_p, seed=seed, stream=stream, probs_seq=64)[1].flatten(0, 1)

    def layer_norm_mask(dropout_p: float, seed: torch.Tensor, stream: int) -> torch.Tensor:
        # The gradient of x is zero exactly where x was dropped.
        x = torch.randn(rows, features, device=device, requires_grad=True)
        y = add_layer_norm(x, None, None, ones, zeros, 1e-5, dropout_p=dropout_p, seed=seed, stream=stream)
        return (torch.autograd.grad(y, x, torch.randn_like(y))[0])[None]

    def embedding_output(dropout_p: float, seed: torch.Tensor, stream: int) -> torch.Tensor:
        table = torch.zeros(1, features, device=device)
        arguments = (ids, ids, ids, table, table, table, ones, ones, 1e-5)
        return embed(*arguments, dropout_p=dropout_p, seed=seed, stream=stream)[None]

    return {"attention": attention_probs, "add_layer_norm": layer_norm_mask, "embed": embedding_output}


OPS = ["attention", "add_layer_norm", "embed"]


def draw(name: str, device: torch.device, p: float, seed: int, stream: int) -> torch.Tensor:
    with backend("triton"):
        return ops(device)[name](p, torch.tensor(seed, device=device), stream)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("seed", SEEDS[:4])
def test_kernels_draw_the_reference_mask(device: torch.device, name: str, seed: int) -> None:
    y = draw(name, device, 0.3, seed, 2**31 - 1)
    if name == "attention":
        expected = reference.dropout_keep_map(seed, 2**31 - 1, *y.shape, 0.3)
    else:
        expected = reference.dropout_keep(seed, 2**31 - 1, *y.shape[1:], 0.3)[None]
    assert torch.equal(y.cpu() != 0, expected)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropped_fraction(device: torch.device, name: str, p: float) -> None:
    dropped = (draw(name, device, p, 42, 3) == 0).double().mean().item()
    assert dropped == pytest.approx(p, abs=0.01)


@pytest.mark.parametrize("name", OPS)
def test_seed_and_stream_choose_the_mask(device: torch.device, name: str) -> None:
    dropped = draw(name, device, 0.5, 42, 3) == 0
    assert torch.equal(dropped, draw(name, device, 0.5, 42, 3) == 0)
    for seed, stream in ((43, 3), (42, 4), (42 + 2**32, 3)):
        agreement = (dropped == (draw(name, device, 0.5, seed, stream) == 0)).double().mean().item()
        assert agreement == pytest.approx(0.5, abs=0.03)  # independent coins agree half of the time


def test_planes_rows_and_columns_are_independent(device: torch.device) -> None:
    dropped = draw("attention", device, 0.5, 42, 3) == 0
    for shift in itertools.product((0, 1), repeat=3):
        if any(shift):
            agreement = (dropped == dropped.roll(shift, (0, 1, 2))).double().mean().item()
            assert agreement == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("name", OPS)
def test_rates_zero_and_one(device: torch.device, name: str) -> None:
    with backend("triton"):
        kept = ops(device)[name](0.0, None, 0)
    assert bool((kept != 0).all())
    assert not draw(name, device, 1.0, 42, 3).any()


def test_thresholds() -> None:
    assert reference.dropout_threshold(0.0) == 0
    assert reference.dropout_threshold(0.5) == 2**15
    assert reference.dropout_threshold(1.0) == 2**16 - 1  # the largest draw, which a scale of 0 takes care of
    for mask in (reference.dropout_keep, reference.dropout_keep_map):
        shape = (20, 20) if mask is reference.dropout_keep else (1, 20, 20)
        assert bool(mask(42, 3, *shape, 0.0).all())
        assert mask(42, 3, *shape, 1.0).float().mean() < 0.01


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_definition_of_dropout(p: float) -> None:
    x = torch.randn(1000, dtype=torch.float64)
    keep = torch.rand(1000) >= p
    want = x * keep / (1 - p) if p < 1 else torch.zeros_like(x)
    torch.testing.assert_close(reference.dropout(x, p, keep), want, rtol=1e-15, atol=0)
    dropped = (reference.dropout(x, p) == 0).double().mean().item()
    assert dropped == pytest.approx(p, abs=0.06)


@pytest.mark.parametrize("returned", ["out", "probs"])
def test_attention_backward_sees_the_mask_of_the_forward(device: torch.device, returned: str) -> None:
    head_mask = torch.tensor([0.5, -2.0], device=device)
    seed = torch.tensor(42, device=device)

    def op(qkv: torch.Tensor, head_mask: torch.Tensor) -> torch.Tensor:
        with backend("triton"):
            out, probs = attention(qkv, None, 9, head_mask=head_mask, dropout_p=0.4, seed=seed, stream=3, probs_seq=9)
        return out if returned == "out" else probs

    qkv = torch.randn(18, 3, 2, 16, device=device)
    by_backward, by_difference = directional_derivatives(op, {"qkv": qkv, "head_mask": head_mask})
    assert by_backward == pytest.approx(by_difference, rel=1e-3)


def test_layer_norm_backward_sees_the_mask_of_the_forward(device: torch.device) -> None:
    seed = torch.tensor(42, device=device)

    def op(**inputs: torch.Tensor) -> torch.Tensor:
        with backend("triton"):
            return add_layer_norm(**inputs, eps=1e-5, dropout_p=0.4, seed=seed, stream=3)

    inputs = {name: torch.randn(9, 37, device=device) for name in ("x", "residual")}
    inputs |= {name: torch.randn(37, device=device) for name in ("bias", "weight", "norm_bias")}
    by_backward, by_difference = directional_derivatives(op, inputs)
    assert by_backward == pytest.approx(by_difference, rel=1e-3)


def test_embed_backward_sees_the_mask_of_the_forward(device: torch.device) -> None:
    seed = torch.tensor(42, device=device)
    words, positions, token_types = (torch.randint(0, n, (20,), device=device) for n in (30, 12, 2))

    def op(**tables: torch.Tensor) -> torch.Tensor:
        with backend("triton"):
            return embed(words, positions, token_types, **tables, eps=1e-5, dropout_p=0.4, seed=seed, stream=3)

    rows = {"word_table": 30, "position_table": 12, "token_type_table": 2}
    tables = {name: torch.randn(n, 37, device=device) for name, n in rows.items()}
    tables |= {name: torch.randn(37, device=device) for name in ("weight", "norm_bias")}
    by_backward, by_difference = directional_derivatives(op, tables)
    assert by_backward == pytest.approx(by_difference, rel=1e-3)

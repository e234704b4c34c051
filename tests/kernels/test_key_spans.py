"""Attention that takes its keys by length: nothing is read of masked keys at the end, nor of the mask after the last
hole."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from two_references import Outputs, two_references

from fastbert_kernels import attention, backend, reference
from fastbert_kernels.sequences import key_spans

SEED, STREAM = 123_456_789_123, 7
SEQ = 20

Tile = Callable[[int, int], None]


def visible(device: torch.device | str = "cpu") -> torch.Tensor:
    """A mask of each kind: lengths, one of them a tile's and one all keys; none; left padding over a tile; holes."""
    mask = torch.arange(SEQ) < torch.tensor([7, 16, SEQ, 0, SEQ, 19])[:, None]
    mask[4, :17] = False
    mask[5, [0, 7, 16]] = False
    return mask.to(device)


def qkv_of(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(mask.numel(), 3, 2, 16).to(mask.device, dtype)


def call(qkv: torch.Tensor, mask: torch.Tensor, **more: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    with backend("triton"):
        bias = reference.additive(mask[:, None, None, :])
        return attention(qkv, None, mask.shape[1], bias=bias, key_spans=key_spans(mask), **more)


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
def test_spans_of_any_mask(rows: list[list[bool]]) -> None:
    spans = key_spans(torch.tensor(rows))
    assert spans.dtype == torch.int32
    for row, (masked_before, end) in zip(rows, spans.tolist(), strict=True):
        assert end == max((i + 1 for i, seen in enumerate(row) if seen), default=0)
        assert masked_before == max((i + 1 for i, seen in enumerate(row[:end]) if not seen), default=0)


#: dtype, tile, and whether there is a head mask, dropout and a map that is returned.
CONFIGURATIONS = [
    (torch.float32, (32, 16), False),
    (torch.bfloat16, (16, 32), False),
    (torch.float32, (16, 16), True),
]


@pytest.mark.parametrize(("dtype", "tile", "everything"), CONFIGURATIONS)
def test_every_row_and_gradient(
    device: torch.device, dtype: torch.dtype, tile: tuple[int, int], everything: bool, attention_tile: Tile
) -> None:
    attention_tile(*tile)
    mask = visible(device)
    more: dict[str, Any] = {}
    inputs = {"qkv": qkv_of(mask, dtype)}
    keep = None
    if everything:
        inputs["head_mask"] = torch.tensor([0.5, 1.5], dtype=dtype, device=device)
        more = {"dropout_p": 0.3, "probs_seq": SEQ + 3}
        keep = reference.dropout_keep_map(SEED, STREAM, 12, SEQ, SEQ, 0.3).view(6, 2, SEQ, SEQ).to(device)

    def kernel(qkv: torch.Tensor, head_mask: torch.Tensor | None = None) -> Outputs:
        seed = torch.tensor(SEED, device=device) if more else None
        return call(qkv, mask, head_mask=head_mask, seed=seed, stream=STREAM, **more)

    def definition(qkv: torch.Tensor, head_mask: torch.Tensor | None = None) -> Outputs:
        bias = reference.additive(mask[:, None, None, :])
        return reference.attention(qkv, SEQ, bias=bias, head_mask=head_mask, scale=0.25, keep=keep, **more)

    def eager(qkv: torch.Tensor) -> Outputs:
        q, k, v = qkv.unflatten(0, (6, SEQ)).permute(2, 0, 3, 1, 4)
        low = torch.finfo(dtype).min
        scores = q @ k.transpose(2, 3) * 0.25 + torch.where(mask, 0.0, low).to(dtype)[:, None, None]
        probs = torch.softmax(scores, dim=-1, dtype=torch.float32).to(dtype)
        return (probs @ v).transpose(1, 2).flatten(0, 1)

    plain = None if dtype == torch.float32 else eager
    two_references(kernel, definition, inputs, summed_rows={"head_mask": 6 * SEQ * SEQ}, plain=plain)


@pytest.mark.parametrize("probs_seq", [None, SEQ])
def test_what_lies_after_the_spans_is_not_read(device: torch.device, probs_seq: int | None) -> None:
    mask = visible(device)
    mask[3] = True
    qkv = qkv_of(mask, torch.float32)
    bias, spans = reference.additive(mask[:, None, None, :]), key_spans(mask)
    after = torch.arange(SEQ, device=device) >= spans[:, :, None]  # (batch, 2, keys)
    poisoned = qkv.clone()
    poisoned[:, 1:][after[:, 1].flatten()] = torch.nan
    results = []
    for given_qkv, given_bias in ((qkv, bias), (poisoned, bias.masked_fill(after[:, 0, None, None], torch.nan))):
        leaf = given_qkv.clone().requires_grad_()
        with backend("triton"):
            outputs = attention(leaf, None, SEQ, bias=given_bias, key_spans=spans, probs_seq=probs_seq)
        found = [x for x in outputs if x is not None]
        torch.manual_seed(2)
        (gradient,) = torch.autograd.grad(found, leaf, [torch.randn(x.shape).to(x) for x in found])
        results.append([*found, gradient])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert not results[0][-1][:, 1:][~mask.flatten()].any()  # masked keys and values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_spans": torch.zeros(1, 2, dtype=torch.int32)}, "= (2, 2), got torch.int32 (1, 2)"),
        ({"key_spans": torch.zeros(2, 2)}, "= (2, 2), got torch.float32 (2, 2)"),
        ({"bias": None}, "key_spans need a bias (batch, 1, 1, max_seqlen) = (2, 1, 1, 7), got None"),
        ({"bias": torch.zeros(2, 1, 7, 7)}, "= (2, 1, 1, 7), got (2, 1, 7, 7)"),
        ({"bias": torch.full((2, 1, 1, 7), -1.0)}, "key_spans must say what the bias masks"),
        ({"key_spans": torch.ones(2, 2, dtype=torch.int32)}, "[[0, 7], [0, 7]], got [[1, 1], [1, 1]]"),
        ({"cu_seqlens": torch.tensor([0, 7, 14], dtype=torch.int32)}, "key_spans are of sequences of one length"),
    ],
)
def test_bad_input(device: torch.device, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str) -> None:
    monkeypatch.setenv("FASTBERT_CHECK", "1")  # values are looked at only then
    spans = torch.tensor([[0, 7], [0, 7]], dtype=torch.int32)
    arguments = {"cu_seqlens": None, "bias": torch.zeros(2, 1, 1, 7), "key_spans": spans} | change
    on_device = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(torch.zeros(14, 3, 2, 8, device=device), max_seqlen=7, **on_device)

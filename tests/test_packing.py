"""The padded door in and out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.packing import dense_layout, packed_layout


@given(st.integers(1, 5), st.integers(1, 9), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_round_trip_keeps_tokens_and_zeroes_the_rest(batch: int, seq: int, random: object) -> None:
    bits = [[random.random() < 0.6 for _ in range(seq)] for _ in range(batch)]  # type: ignore[attr-defined]
    mask = torch.tensor(bits)
    x = torch.randn(batch, seq, 3)
    layout = packed_layout(mask)
    packed = layout.pack(x)
    if layout.indices is not None:
        assert torch.equal(packed[0], x[mask])
        assert layout.cu_seqlens is not None
        assert layout.cu_seqlens.dtype == torch.int32
        assert layout.cu_seqlens.diff().tolist() == mask.sum(1).tolist()
        assert layout.max_seqlen == max(1, mask.sum(1).max())
        if layout.columns is not None:
            assert torch.equal(layout.columns.long(), mask.nonzero()[:, 1])
        else:
            assert torch.equal(mask, torch.arange(seq)[None] < mask.sum(1)[:, None])
    else:
        assert mask.all()
    assert torch.equal(layout.unpack(packed), x * mask[:, :, None])


def test_a_full_batch_is_left_alone() -> None:
    layout = packed_layout(torch.ones(2, 5, dtype=torch.bool))
    assert layout == dense_layout(2, 5)
    x = torch.randn(2, 5, 3)
    assert layout.pack(x) is x
    assert layout.unpack(x) is x


@pytest.mark.parametrize("through", ["pack", "unpack"])
def test_gradients_pass_the_doors(through: str) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    layout = packed_layout(mask)
    shape = (2, 3, 4) if through == "pack" else (1, 3, 4)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(getattr(layout, through), x)

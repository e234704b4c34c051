"""A padded batch packed and unpacked."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from fastbert.batch.layout import dense_layout, packed_layout


@given(st.integers(1, 5), st.integers(1, 9), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_round_trip_keeps_tokens_and_zeroes_the_rest(batch: int, seq: int, random: object) -> None:
    bits = [[random.random() < 0.6 for _ in range(seq)] for _ in range(batch)]  # type: ignore[attr-defined]
    mask = torch.tensor(bits)
    x = torch.randn(batch, seq, 3)
    layout = packed_layout(mask)
    lengths = mask.sum(1).tolist()
    if len(set(lengths)) == 1:
        assert layout.order is None
    else:
        assert layout.order.dtype == torch.int32
        assert layout.order.tolist() == sorted(range(batch), key=lambda b: (-lengths[b], b))
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


class _Reads(TorchFunctionMode):
    """Names of the calls that bring values to Python, for which a GPU's have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        reads = not isinstance(result, torch.Tensor) and func.__name__ != "__get__"
        if reads or func.__name__ in ("cpu", "nonzero", "masked_select"):
            self.names.append(func.__name__)
        return result


def test_a_batch_is_waited_for_once() -> None:
    mask = torch.tensor([[True, True, False], [False, True, False], [True, True, True]])
    with _Reads() as reads:
        layout = packed_layout(mask)
    assert layout.order is not None
    assert layout.columns is not None
    assert reads.names == ["tolist"]


@pytest.mark.parametrize("through", ["pack", "unpack"])
def test_gradients_pass_the_doors(through: str) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    layout = packed_layout(mask)
    shape = (2, 3, 4) if through == "pack" else (1, 3, 4)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(getattr(layout, through), x)

"""The second stage of the weight gradients: rows of partial sums of several kernels, in one launch."""

import pytest
import torch

from fastbert_kernels import backend
from fastbert_kernels.column_sums import _sums, column_sums

#: Rows and columns of matrices of which each has another number of programs.
SHAPES = ((70, 33), (1, 128), (32, 90), (300, 5), (129, 64))


def matrices(device: torch.device) -> list[torch.Tensor]:
    torch.manual_seed(3)
    return [torch.randn(shape, device=device) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_sums_are_those_of_the_columns(device: torch.device, count: int, dtype: torch.dtype) -> None:
    partials = matrices(device)[:count]
    with backend("triton"):
        found = column_sums(*[(rows, (dtype,)) for rows in partials])
    for rows, vector in zip(partials, found, strict=True):
        want = rows.double().sum(0)
        assert vector is not None
        torch.testing.assert_close(vector.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)
        assert vector.dtype == dtype


def test_vectors_lie_beside_each_other_in_a_row(device: torch.device) -> None:
    first, second, third, *_ = matrices(device)
    half, full = torch.float16, torch.float32
    with backend("triton"):
        found = column_sums((first, (full, None, half, full)), (second, (None,)), (third, (half,) * 2))
    assert [None if vector is None else vector.dtype for vector in found] == [full, None, half, full, None, half, half]
    a, _, b, c, _, d, e = (torch.empty(0) if vector is None else vector.float() for vector in found)
    torch.testing.assert_close(torch.cat([a, b, c]), first.sum(0), rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(torch.cat([d, e]), third.sum(0), rtol=1e-3, atol=1e-2)


def test_each_is_rounded_once(device: torch.device) -> None:
    """Where dtypes differ, too: 2049 is none of float16's numbers, but the last but one before it."""
    rows = torch.full((3, 2), 683.0, device=device)
    with backend("triton"):
        half, full = column_sums((rows, (torch.float16, torch.float32)))
    assert half is not None
    assert full is not None
    assert (half.item(), full.item()) == (2048.0, 2049.0)


def test_without_rows_sums_are_zero(device: torch.device) -> None:
    with backend("triton"):
        (zeros,) = column_sums((torch.randn(0, 40, device=device), (torch.float32,)))
    assert zeros is not None
    assert torch.equal(zeros, torch.zeros_like(zeros))
    assert zeros.shape == (40,)
    assert column_sums((torch.randn(4, 0, device=device), (None,))) == [None]


def test_the_same_sums_each_time(device: torch.device) -> None:
    partials = [(rows, (torch.float32,)) for rows in matrices(device)]
    with backend("triton"):
        once, again = column_sums(*partials), column_sums(*partials)
    for a, b in zip(once, again, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_opcheck(device: torch.device) -> None:
    first, *others = matrices(device)
    with backend("triton"):
        for count in range(5):
            given = *others[:count], *[None] * (4 - count)
            torch.library.opcheck(torch.ops.fastbert.column_sums, (first, *given, torch.bfloat16))


def test_second_derivative_is_refused(device: torch.device) -> None:
    rows = torch.randn(4, 5, device=device, requires_grad=True)
    with backend("triton"):
        found = _sums(rows, None, None, None, None, torch.float32)
        with pytest.raises(NotImplementedError, match="second derivative"):
            found.sum().backward()

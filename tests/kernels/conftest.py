"""What the kernel tests share: poisoned allocations, and tiles small enough that short inputs need many of them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastbert_kernels import column_sums, tiles

with torch.device("cpu"):
    torch.empty(0)  # torch remembers, at the first such call, which functions allocate: not the poisoned ones


@pytest.fixture(autouse=True)
def _poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill uninitialised float memory with NaN, so that an element no kernel writes shows."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_and_fill(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return allocate_and_fill

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def attention_tile(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """Set the attention tile of the interpreter: `attention_tile(BLOCK_M, BLOCK_N)`. Compiled kernels keep theirs."""

    def choose(block_m: int, block_n: int) -> None:
        monkeypatch.setattr(tiles, "_ATTENTION_INTERPRETED", tiles.attention_tile(block_m, block_n, 4, 1))
        tiles.attention_table.cache_clear()

    yield choose
    tiles.attention_table.cache_clear()


@pytest.fixture
def few_partial_sums(monkeypatch: pytest.MonkeyPatch) -> int:
    """Let two programs share every backward pass over rows, so that each has several blocks."""
    monkeypatch.setattr(column_sums, "PARTIAL_SUMS", 2)
    return 2

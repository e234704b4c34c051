"""Compiled kernels are as exact as plain PyTorch, in every dtype."""

import pytest
import torch

from fastbert_kernels.backend import INTERPRETED
from tests.executor import errors

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the same kernels are interpreted beside the compiled ones")


@pytest.mark.slow
def test_every_op_executed_interpreted_and_in_plain_pytorch() -> None:
    table = errors.rows()
    print("\n".join([errors.HEADER, *map(str, table)]))
    for row in table:
        rounding = torch.finfo(errors.DTYPES[row.dtype]).eps
        for executed, interpreted, plain in zip(row.executed, row.interpreted, row.plain, strict=True):
            assert executed <= 2 * plain + rounding, row
            assert interpreted <= 2 * plain + rounding, row

"""How far every op's results are from float64, by its kernels as they run here and by plain PyTorch.

TRITON_INTERPRET=0 python -m tests.executor.errors   # compiled and executed
TRITON_INTERPRET=1 python -m tests.executor.errors   # interpreted
"""

import contextlib
import json

import torch

from fastbert.tuning.problems import Sizes
from fastbert_kernels.backend import INTERPRETED

from .calls import of_op, op_calls, problem, results
from .launch import executed

SIZES = Sizes(ragged=(70, 1, 33), even=(35, 35), rows=70, vocabulary=97)


def error(got: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """The largest error of any result, of its largest element or of 1."""
    pairs = zip(got, exact, strict=True)
    return max(((x.double() - y).abs().max() / y.abs().max().clamp(min=1)).item() for x, y in pairs)


def main() -> None:
    with contextlib.nullcontext() if INTERPRETED else executed():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for call in op_calls(dtype, head_dim=64, features=96):
                made = problem(call, SIZES)
                exact = of_op(made.definition, made, torch.float64)
                errors = [error(x, exact) for x in (results(made), of_op(made.definition, made, None))]
                print(json.dumps([call[0].kernel, *call[1], str(dtype), *errors]), flush=True)


if __name__ == "__main__":
    main()

"""How far every op's results are from float64: by its kernels executed, interpreted, and in plain PyTorch.

TRITON_INTERPRET=1 python -m tests.executor.errors   # the table
"""

import dataclasses
import json

import torch

from fastbert.tuning.problems import Sizes
from fastbert_kernels.backend import INTERPRETED
from tests.helpers.uninterpreted import run_uninterpreted

from .calls import of_op, op_calls, problem, results
from .launch import executed

SIZES = Sizes(ragged=(70, 1, 33), even=(35, 35), rows=70, vocabulary=97)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}

#: Largest errors of each result of an op, by the kernels and by plain PyTorch.
Errors = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Row:
    """An op's results, each an error relative to the result's largest element."""

    op: str
    dtype: str
    executed: list[float]
    interpreted: list[float]
    plain: list[float]

    def __str__(self) -> str:
        largest = (f"{max(errors):11.1e}" for errors in (self.executed, self.interpreted, self.plain))
        return f"{self.op:58}{self.dtype:9}{''.join(largest)}"


HEADER = f"{'op':58}{'dtype':9}{'executed':>11}{'interpreted':>12}{'plain':>10}"


def _error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact).abs().max() / exact.abs().max()).item()


def here() -> dict[str, Errors]:
    """The errors of each op in each dtype, by kernels as this process runs them."""
    found = {}
    for name, dtype in DTYPES.items():
        for call in op_calls(dtype, head_dim=64, features=96):
            made = problem(call, SIZES)
            exact = of_op(made.definition, made, torch.float64)
            pairs = zip(results(made), of_op(made.definition, made, None), exact, strict=True)
            found[f"{' '.join([call[0].kernel, *call[1]])},{name}"] = [
                (_error(mine, truth), _error(plain, truth)) for mine, plain, truth in pairs
            ]
    return found


def rows() -> list[Row]:
    """The table. Needs Triton's interpreter; compiled code is executed in a process of its own."""
    compiled = json.loads(run_uninterpreted("-m", "tests.executor.errors"))
    table = []
    for name, interpreted in here().items():
        op, dtype = name.split(",")
        mine = [executed for executed, _ in compiled[name]]
        table.append(Row(op, dtype, mine, *map(list, zip(*interpreted, strict=True))))
    return table


def main() -> None:
    if INTERPRETED:
        print("\n".join([HEADER, *map(str, rows())]))
    else:
        with executed():
            print(json.dumps(here()))


if __name__ == "__main__":
    main()

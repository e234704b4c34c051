"""Breaks the PTX of real kernels in ways that a GPU would not forgive, and says which of them the executor notices.

TRITON_INTERPRET=0 python -m tests.executor.mutants --help
"""

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastbert.tuning.problems import Sizes
from fastbert_kernels.tuned import Launch

from . import launch as launching
from .calls import op_calls, problem, results, same_bits
from .machine import Code, KernelError
from .ptx import parse

#: Long enough for every stage of a pipeline; the last sequence ends inside a tile, at the end of the tensors.
SIZES = Sizes(ragged=(200, 1, 70), even=(133, 133), rows=70, vocabulary=97)

CALLS = [
    *op_calls(torch.bfloat16, head_dim=64, features=96),
    (Launch("attention_forward", torch.float32, 64, False), ("CU_SEQLENS",)),
    (Launch("add_layer_norm_forward", torch.bfloat16, 384, False), ("BIAS", "RESIDUAL", "DROPOUT")),
    (Launch("embed_forward", torch.bfloat16, 384, False), ("WORD_TABLE", "DROPOUT")),
]


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A launch, to be made again."""

    name: str
    ptx: str
    arguments: dict[str, Any]
    grid: tuple[int, int, int]
    shared: int

    def again(self, ptx: str) -> list[torch.Tensor]:
        """The tensors after the launch of this PTX on copies of the arguments."""
        copies = {n: _copy(a) if isinstance(a, torch.Tensor) else a for n, a in self.arguments.items()}
        launching.execute(Code(parse(ptx)), copies, self.grid, self.shared)
        return [copy for copy in copies.values() if isinstance(copy, torch.Tensor)]


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A kernel with one fault."""

    kind: str
    place: str
    """The instruction, and where the source asks for it."""
    ptx: str


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor, whose elements may be far apart or one and the same."""
    flat = tensor.as_strided((launching.extent(tensor) // tensor.element_size(),), (1,)).clone()
    return flat.as_strided(tensor.shape, tensor.stride(), 0)


def record() -> list[Recorded]:
    """One launch of every kernel that the problems compile."""
    found: dict[str, Recorded] = {}
    execute = launching.execute

    def executed(code: Code, arguments: dict[str, Any], grid: Any, shared: int, counters: Any) -> Any:
        ptx = next(ptx for ptx, known in launches._codes.items() if known is code)
        if ptx not in found:
            copies = {n: _copy(a) if isinstance(a, torch.Tensor) else a for n, a in arguments.items()}
            found[ptx] = Recorded(code.kernel.name, ptx, copies, grid, shared)
        return execute(code, arguments, grid, shared, counters)

    with launching.executed() as launches, _replaced(executed):
        for call in CALLS:
            results(problem(call, SIZES))
    return list(found.values())


@contextlib.contextmanager
def _replaced(execute: Callable[..., Any]) -> Iterator[None]:
    before, launching.execute = launching.execute, execute
    try:
        yield
    finally:
        launching.execute = before


#: Kind -> the instruction that is broken, and what stands in its place.
KINDS: dict[str, tuple[str, Callable[[re.Match[str]], str]]] = {
    "barrier removed": (r"bar\.sync[^;]*;", lambda m: ""),
    "wait removed": (r"cp\.async\.wait_group[^;]*;", lambda m: ""),
    "one more group in flight": (
        r"cp\.async\.wait_group\s+(\w+);",
        lambda m: f"cp.async.wait_group {int(m[1], 0) + 1};",
    ),
    "commit removed": (r"cp\.async\.commit_group;", lambda m: ""),
    "transposition lost": (r"(ldmatrix[\w.]*)\.trans(\.shared\.b16)", lambda m: m[1] + m[2]),
    "zeros not filled in": (r"(cp\.async\.c[ag]\.[^;]*\], *0x\w+), *%\w+;", lambda m: m[1] + ";"),
    "address shifted": (
        r"((?:ld|st)\.(?:global|shared)[^;\[]*\[|ldmatrix[^;\[]*\[|cp\.async\.c[ag][^;]*?, *\[)"
        r"([^\]+]*)(?:\+ *(-?\w+) *)?\]",
        lambda m: f"{m[1]}{m[2]} + {int(m[3] or '0', 0) + 16}]",
    ),
    "predicate lost": (r"@!?%p\d+ (?=(?:ld|st)\.)", lambda m: ""),
}


def mutants(ptx: str) -> Iterator[Mutant]:
    """Every fault of every kind; of addresses, fills and predicates one for each line of the source and opcode."""
    places = {}
    place = ""
    for found in re.finditer(r"\.loc\s+(\d+) (\d+)[^\n]*", ptx):
        places[found.start()] = found
    starts = sorted(places)
    for kind, (pattern, replace) in KINDS.items():
        seen = set()
        for found in re.finditer(pattern, ptx):
            before = [start for start in starts if start < found.start()]
            place = re.sub(r".*// ", "", places[before[-1]][0]).split("@[")[0].strip()
            instruction = ptx[found.start() : ptx.index(";", found.start())]
            opcode = re.search(r"(?:ld|st|cp|ldmatrix|bar)[\w.:]*", instruction)
            assert opcode is not None
            where = f"{opcode[0]} at {place}"
            if kind in ("zeros not filled in", "address shifted", "predicate lost"):
                if where in seen:
                    continue
                seen.add(where)
            yield Mutant(kind, where, ptx[: found.start()] + replace(found) + ptx[found.end() :])


def outcome(recorded: Recorded, mutant: Mutant, right: list[torch.Tensor]) -> str:
    """What is noticed of a mutant: a fault, a wrong result, or nothing, which is ""."""
    try:
        got = recorded.again(mutant.ptx)
    except KernelError as error:
        return str(error)
    return "" if all(map(same_bits, got, right)) else "another result"


def main() -> None:
    kinds = sys.argv[1:] or list(KINDS)
    for recorded in record():
        right = recorded.again(recorded.ptx)
        for mutant in mutants(recorded.ptx):
            if mutant.kind in kinds:
                noticed = outcome(recorded, mutant, right)
                print(json.dumps([recorded.name, mutant.kind, mutant.place, noticed]), flush=True)


if __name__ == "__main__":
    main()

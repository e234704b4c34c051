"""Breaks the PTX of real kernels in ways that a GPU would not forgive, and says which of them the executor notices.

TRITON_INTERPRET=0 python -m tests.executor.mutants --help
"""

import bisect
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

from fastbert.tuning.problems import Sizes
from fastbert_kernels.tuned import Launch

from . import launch as launching
from .calls import op_calls, problem, results, same_bits
from .machine import Code, KernelError, Machine
from .ptx import parse

#: Long enough for every stage of a pipeline. A short and a long sequence end inside a tile at the end of the tensors,
#: past which nothing may be read.
SIZES = (
    Sizes(ragged=(200, 70, 1), even=(133, 133), rows=70, vocabulary=97),
    Sizes(ragged=(1, 70, 200), even=(9, 9), rows=9, vocabulary=97),
)

CALLS = [
    *op_calls(torch.bfloat16, head_dim=64, features=96),
    (Launch("attention_forward", torch.float32, 64, False), ("CU_SEQLENS",)),
    (Launch("add_layer_norm_forward", torch.bfloat16, 384, False), ("BIAS", "RESIDUAL", "DROPOUT")),
    (Launch("embed_forward", torch.bfloat16, 384, False), ("WORD_TABLE", "DROPOUT")),
]


@dataclasses.dataclass(frozen=True)
class Call:
    """A launch of a kernel, to be made again."""

    arguments: dict[str, Any]
    grid: tuple[int, int, int]
    shared: int

    def again(self, ptx: str) -> list[torch.Tensor]:
        """The tensors after the launch of this PTX on copies of the arguments."""
        copies = _copies(self.arguments)
        launching.execute(Code(parse(ptx)), copies, self.grid, self.shared)
        return [copy for copy in copies.values() if isinstance(copy, torch.Tensor)]


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A kernel with one fault."""

    kind: str
    place: str
    """The instruction, and where the source asks for it."""
    ptx: str


def _copies(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments with their tensors' memory copied, whose elements may be far apart or one and the same."""
    copies = dict(arguments)
    for name, tensor in arguments.items():
        if isinstance(tensor, torch.Tensor):
            flat = tensor.as_strided((launching.extent(tensor) // tensor.element_size(),), (1,)).clone()
            copies[name] = flat.as_strided(tensor.shape, tensor.stride(), 0)
    return copies


def _poison(arguments: dict[str, Any]) -> None:
    """NaN in some rows, which no other row may read and no column past its end, and in what no id of a table names."""
    for name in ("x_ptr", "residual_ptr", "dy_ptr", "normed_ptr"):
        if isinstance(arguments.get(name), torch.Tensor):
            arguments[name][1::8] = torch.nan
    for ids, table in (("words", "word"), ("positions", "position"), ("token_types", "token_type")):
        if f"{table}_table_ptr" in arguments:
            arguments[f"{ids}_ptr"].clamp_(min=1)
            arguments[f"{table}_table_ptr"][0] = torch.nan


def record() -> dict[str, list[Call]]:
    """The PTX of every kernel that the calls compile, and its first launch with each of the sizes."""
    found: dict[str, list[Call]] = {}
    execute = launching.execute

    def recorded(code: Code, arguments: dict[str, Any], grid: Any, shared: int, counters: Any) -> None:
        ptx = next(ptx for ptx, known in launches.codes.items() if known is code)
        if ptx not in seen:
            seen.add(ptx)
            copies = _copies(arguments)
            if sizes is SIZES[1]:
                _poison(copies)
            found.setdefault(ptx, []).append(Call(copies, grid, shared))
        execute(code, arguments, grid, shared, counters)

    with launching.executed() as launches, mock.patch.object(launching, "execute", recorded):
        for sizes in SIZES:
            seen: set[str] = set()
            for call in CALLS:
                made = problem(call, sizes)
                if sizes is SIZES[1] and call[0].kernel in ("attention_forward", "relation_forward"):
                    # Scores far below 0, whose statistics must not be taken for those of a row that is not there.
                    inputs = made.inputs if call[0].kernel == "relation_forward" else made.inputs[0].unbind(1)
                    inputs[0].add_(5)
                    inputs[1].sub_(5)
                results(made)
    return found


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

_ASYNCHRONOUS = ("wait removed", "one more group in flight", "commit removed")

#: Kinds of which one is planted for each line of the source and opcode, and not one for each instruction.
_ONE_A_PLACE = ("transposition lost", "zeros not filled in", "address shifted", "predicate lost")


def mutants(ptx: str) -> Iterator[Mutant]:
    """The kernel with every fault, one at a time."""
    lines = list(re.finditer(r"\.loc\s[^\n]*// (\S+)", ptx))
    starts = [line.start() for line in lines]
    for kind, (pattern, replace) in KINDS.items():
        seen = set()
        for found in re.finditer(pattern, ptx):
            opcode = re.search(r"(?:ld|st|cp|bar)[\w.:]*", ptx[found.start() :])
            assert opcode is not None
            place = f"{opcode[0]} at {lines[bisect.bisect(starts, found.start()) - 1][1]}"
            if kind in _ONE_A_PLACE and place in seen:
                continue
            seen.add(place)
            yield Mutant(kind, place, ptx[: found.start()] + replace(found) + ptx[found.end() :])


def outcome(calls: list[Call], mutant: Mutant, right: list[list[torch.Tensor]]) -> str:
    """What is noticed of a mutant: a fault, a wrong result, or nothing, which is ""."""
    for call, wanted in zip(calls, right, strict=True):
        try:
            got = call.again(mutant.ptx)
        except KernelError as error:
            return str(error)
        if not all(map(same_bits, got, wanted)):
            return "another result"
    return ""


def under_way(call: Call, ptx: str) -> list[int]:
    """Before each read of shared memory, which asynchronous copies are under way: a hash of their places."""
    copies: list[int] = []

    def before(read: Any) -> Any:
        def noted(machine: Machine, *arguments: Any) -> Any:
            copies.append(hash(tuple(sorted(c.where.tobytes() for c in machine.copies))))
            return read(machine, *arguments)

        return noted

    with (
        mock.patch.object(Machine, "load_shared", before(Machine.load_shared)),
        mock.patch.object(Machine, "load_matrices", before(Machine.load_matrices)),
    ):
        call.again(ptx)
    return copies


def _unused(call: Call, ptx: str, mutant: Mutant, right: list[torch.Tensor]) -> bool:
    """Whether results stay the same where the instruction fills in NaN instead of zeros."""
    fetch = Machine.fetch

    def fetched(machine: Machine, copies: Any) -> Any:
        data = fetch(machine, copies)
        line = mutant.place.rpartition(":")[0]
        if f"{copies.instruction.opcode} at {copies.instruction.place}".startswith(line):
            data[np.arange(copies.size) >= copies.filled[:, None]] = 0xFF
        return data

    with mock.patch.object(Machine, "fetch", fetched):
        return all(map(same_bits, call.again(ptx), right))


def harmless(ptx: str, calls: list[Call], mutant: Mutant, right: list[list[torch.Tensor]]) -> str:
    """Why a fault that nobody notices changes nothing on a GPU either; "" where no rule says so."""
    if mutant.kind == "barrier removed":
        # What the executor checks, at every trip of a loop; addresses of shared memory depend on nothing else.
        return "no two warps touch a byte, one of them writing, between the barriers before and after it"
    if mutant.kind in _ASYNCHRONOUS and all(under_way(call, ptx) == under_way(call, mutant.ptx) for call in calls):
        return "another group or wait does the same: before every read the same copies are under way"
    if mutant.kind == "zeros not filled in" and all(
        _unused(call, ptx, mutant, wanted) for call, wanted in zip(calls, right, strict=True)
    ):
        return "nobody reads the zeros: NaN in their place gives the same bits"
    if mutant.kind == "predicate lost" and mutant.place.startswith("ld."):
        return "the load lies within its tensor, and what it reads is not used"
    if mutant.kind == "predicate lost":
        # Others that wrote another value, or where nobody else writes, would be noticed.
        return "the other threads write the same values to the same addresses"
    return ""


def main() -> None:
    kinds = sys.argv[1:] or list(KINDS)
    for ptx, calls in record().items():
        right = [call.again(ptx) for call in calls]
        for mutant in mutants(ptx):
            if mutant.kind in kinds:
                noticed = outcome(calls, mutant, right)
                reason = "" if noticed else harmless(ptx, calls, mutant, right)
                print(json.dumps([parse(ptx).name, mutant.kind, mutant.place, noticed, reason]), flush=True)


if __name__ == "__main__":
    main()

"""Breaks real kernels in ways that a GPU would not forgive, one instruction at a time, and says what is noticed.

TRITON_INTERPRET=0 python -m tests.executor.mutants                              # every fault, and the table of all
TRITON_INTERPRET=0 python -m tests.executor.mutants "commit removed" relation   # some kinds, or some kernels'
"""

import collections
import contextlib
import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

from fastbert.tuning.problems import Sizes
from fastbert_kernels.catalogue import SHORT
from fastbert_kernels.column_sums import column_sums
from fastbert_kernels.tuned import Launch

from . import launch as launching
from .calls import op_calls, problem, results, same_bits
from .machine import Code, KernelError, Machine
from .ptx import Instruction
from .translate import ADDRESS


def _one(device: torch.device) -> int:
    return 1


#: Long enough for every stage of a pipeline. A short and a long sequence end inside a tile at the end of the tensors,
#: past which nothing may be read. The last two have poison in them.
SIZES = (
    Sizes(ragged=(200, 70, 1), even=(133, 133), rows=70, vocabulary=97),
    Sizes(ragged=(70, 41, 200), even=(70, 70), rows=37, vocabulary=97),
    Sizes(ragged=(1, 70, 200), even=(9, 9), rows=37, vocabulary=97),
)

#: Programs of the kernels that loop over rows, and multiprocessors for those that loop over tiles: several trips each.
FEW_PROGRAMS = {"fastbert_kernels.column_sums.PARTIAL_SUMS": 2, "fastbert_kernels.feed_forward.multiprocessors": _one}

CALLS = [
    *op_calls(torch.bfloat16, head_dim=64, features=160),
    (Launch("attention_forward", torch.float32, 16, False), ("CU_SEQLENS",)),
    (Launch("add_layer_norm_forward", torch.bfloat16, 384, False), ("BIAS", "RESIDUAL", "DROPOUT")),
    (Launch("embed_forward", torch.bfloat16, 384, False), ("WORD_TABLE", "DROPOUT")),
]


@dataclasses.dataclass(frozen=True)
class Call:
    """A launch of a kernel, to be made again."""

    arguments: dict[str, Any]
    grid: tuple[int, int, int]
    shared: int

    def again(self, code: Code) -> list[torch.Tensor]:
        """The tensors after a launch of this code on copies of the arguments."""
        copies = _copies(self.arguments)
        launching.execute(code, copies, self.grid, self.shared)
        return [copy for copy in copies.values() if isinstance(copy, torch.Tensor)]


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A kernel with one fault."""

    kind: str
    instruction: Instruction
    """The one that is broken."""
    block: int
    """The number of its basic block."""
    code: Code

    @property
    def place(self) -> str:
        return f"{self.instruction.opcode} at {self.instruction.place}"


def _copies(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments with their tensors' memory copied, whose elements may be far apart or one and the same."""
    copies = dict(arguments)
    for name, tensor in arguments.items():
        if isinstance(tensor, torch.Tensor):
            flat = tensor.as_strided((launching.extent(tensor) // tensor.element_size(),), (1,)).clone()
            copies[name] = flat.as_strided(tensor.shape, tensor.stride(), 0)
    return copies


def _packed(arguments: dict[str, Any]) -> bool:
    """Whether sequences have lengths of their own; without cu_seqlens another tensor stands in its place."""
    return "cu_seqlens_ptr" in arguments and not arguments["cu_seqlens_ptr"].is_floating_point()


def _poison(arguments: dict[str, Any], even: int) -> None:
    """NaN in some rows, or a whole sequence, that no other may read, no column past its end, and what no id names."""
    for name in ("x_ptr", "residual_ptr", "dy_ptr", "normed_ptr", "kept_ptr"):
        if isinstance(arguments.get(name), torch.Tensor):
            arguments[name][1::8] = torch.nan
    if "qkv_ptr" in arguments:  # of the second sequence, whose rows come after the first one's end
        bounds = arguments["cu_seqlens_ptr"][1:3].tolist() if _packed(arguments) else (even, 2 * even)
        for name in ("stats_ptr", "delta_ptr"):
            if name in arguments:
                arguments[name][..., slice(*bounds)] = torch.nan
    for ids, table in (("words", "word"), ("positions", "position"), ("token_types", "token_type")):
        if f"{table}_table_ptr" in arguments:
            arguments[f"{ids}_ptr"].clamp_(min=1)
            arguments[f"{table}_table_ptr"][0] = torch.nan


def record() -> dict[Code, list[Call]]:
    """Every kernel that the calls compile, and its first launch with each of the sizes."""
    found: dict[Code, list[Call]] = {}
    execute = launching.execute

    def recorded(code: Code, arguments: dict[str, Any], grid: Any, shared: int, counters: Any) -> None:
        if code not in seen:
            seen.add(code)
            copies = _copies(arguments)
            if sizes is not SIZES[0]:
                _poison(copies, sizes.even[0])
            found.setdefault(code, []).append(Call(copies, grid, shared))
        execute(code, arguments, grid, shared, counters)

    with contextlib.ExitStack() as stack:
        for name, value in FEW_PROGRAMS.items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(launching.executed())
        stack.enter_context(mock.patch.object(launching, "execute", recorded))
        for sizes in SIZES:
            seen: set[Code] = set()
            for dtype in (torch.float32, torch.bfloat16):
                column_sums((torch.randn(2 * sizes.rows, 96), (dtype,)))
            for call in CALLS:
                made = problem(call, sizes)
                if sizes is not SIZES[0] and call[0].kernel in ("attention_forward", "relation_forward"):
                    # Scores far below 0, whose statistics must not be taken for those of a row that is not there.
                    inputs = made.inputs if call[0].kernel == "relation_forward" else made.inputs[0].unbind(1)
                    inputs[0].add_(8)
                    inputs[1].sub_(8)
                results(made)
    return found


def _shifted(instruction: Instruction) -> Instruction:
    """The last address of an instruction, 16 bytes further: of an asynchronous copy, where it reads."""
    operands = list(instruction.operands)
    last = max(i for i, operand in enumerate(operands) if operand.startswith("["))
    found = ADDRESS.match(operands[last])
    assert found is not None
    operands[last] = f"[{found[1]} + {int(found[2] or '0', 0) + 16}]"
    return dataclasses.replace(instruction, operands=tuple(operands))


def _one_more(instruction: Instruction) -> Instruction:
    return dataclasses.replace(instruction, operands=(str(int(instruction.operands[0], 0) + 1),))


#: Kind -> which opcodes it breaks, and what stands in the place of an instruction.
KINDS: dict[str, tuple[str, Callable[[Instruction], list[Instruction]]]] = {
    "barrier removed": (r"bar\.sync", lambda i: []),
    "wait removed": (r"cp\.async\.wait_group", lambda i: []),
    "one more group in flight": (r"cp\.async\.wait_group", lambda i: [_one_more(i)]),
    "commit removed": (r"cp\.async\.commit_group", lambda i: []),
    "transposition lost": (
        r"ldmatrix.*\.trans",
        lambda i: [dataclasses.replace(i, opcode=i.opcode.replace(".trans", ""))],
    ),
    "zeros not filled in": (
        r"cp\.async\.c[ag]",
        lambda i: [dataclasses.replace(i, operands=i.operands[:3])],
    ),
    "address shifted": (r"(ld|st)\.(global|shared)|ldmatrix|cp\.async\.c[ag]", lambda i: [_shifted(i)]),
    "predicate lost": (r"(ld|st)\.", lambda i: [dataclasses.replace(i, predicate=None)]),
}

#: Kinds of which one is planted for each line of the source, opcode and basic block, and not one for each instruction.
_ONE_A_PLACE = ("transposition lost", "zeros not filled in", "address shifted", "predicate lost")


def mutants(code: Code) -> Iterator[Mutant]:
    """The kernel with every fault, one at a time."""
    for kind, (opcode, instead) in KINDS.items():
        seen = set()
        for number, block in enumerate(code.kernel.blocks):
            for index, instruction in enumerate(block):
                if not re.match(opcode, instruction.opcode) or instead(instruction) == [instruction]:
                    continue
                where = instruction.opcode, instruction.place, number
                if kind in _ONE_A_PLACE and where in seen:
                    continue
                seen.add(where)
                broken = [*block[:index], *instead(instruction), *block[index + 1 :]]
                yield Mutant(kind, instruction, number, code.with_block(number, broken))


def outcome(calls: list[Call], mutant: Mutant, right: list[list[torch.Tensor]]) -> str:
    """What is noticed of a mutant: a fault, a wrong result, or nothing, which is ""."""
    for call, wanted in zip(calls, right, strict=True):
        try:
            got = call.again(mutant.code)
        except KernelError as error:
            return str(error)
        if not all(map(same_bits, got, wanted)):
            return "another result"
    return ""


def _unused(call: Call, code: Code, mutant: Mutant, right: list[torch.Tensor]) -> bool:
    """Whether results stay the same where the instruction fills in NaN instead of zeros."""
    fetch = Machine.fetch

    def fetched(machine: Machine, copies: Any) -> Any:
        data = fetch(machine, copies)
        if copies.instruction is mutant.instruction:
            data[np.arange(copies.size) >= copies.filled[:, None]] = 0xFF
        return data

    with mock.patch.object(Machine, "fetch", fetched):
        return all(map(same_bits, call.again(code), right))


def _reads(call: Call, code: Code, mutant: Mutant) -> bool:
    """Whether an asynchronous copy takes a byte from global memory."""
    fetch, sizes = Machine.fetch, [0]

    def fetched(machine: Machine, copies: Any) -> Any:
        if copies.instruction is mutant.instruction:
            sizes.append(int(copies.filled.max(initial=0)))
        return fetch(machine, copies)

    with mock.patch.object(Machine, "fetch", fetched):
        call.again(code)
    return max(sizes) > 0


def harmless(code: Code, calls: list[Call], mutant: Mutant, right: list[list[torch.Tensor]]) -> str:
    """Why a fault that nobody notices changes nothing on a GPU either; "" where no rule says so."""
    if mutant.kind == "barrier removed":
        # What the executor checks, at every trip of a loop; addresses of shared memory depend on nothing else.
        return "no two warps touch a byte, one of them writing, between the barriers before and after it"
    if mutant.kind in ("wait removed", "one more group in flight", "commit removed"):
        # Checked at every access, in loops of one trip, of two and of many.
        return "another wait delivers the same copies before anything reads or overwrites their bytes"
    if mutant.kind == "zeros not filled in" and all(
        _unused(call, code, mutant, wanted) for call, wanted in zip(calls, right, strict=True)
    ):
        return "nobody reads the zeros: NaN in their place gives the same bits"
    if mutant.kind == "predicate lost" and mutant.instruction.opcode.startswith("ld."):
        return "the load lies within its tensor, and what it reads is not used"
    if mutant.kind == "predicate lost":
        # Others that wrote another value, or where nobody else writes, would be noticed.
        return "the other threads write the same values to the same addresses"
    if (
        mutant.kind == "address shifted"
        and mutant.instruction.opcode.startswith("cp.async")
        and all(call.arguments.get("max_seqlen", math.inf) <= SHORT[0] for call in calls)
        and not any(_reads(call, code, mutant) for call in calls)
    ):
        return "the copy is of a second tile, which sequences up to 32 tokens do not have: nothing is read"
    if mutant.block not in code.reached and not any(_packed(call.arguments) for call in calls):
        return "no thread gets there: without cu_seqlens no sequence is shorter than the longest"
    return ""


def table(lines: Iterable[tuple[str, str, str, str, str]]) -> str:
    """Of each kind: how many were planted, noticed, harmless with the reason, and open."""
    by_kind: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for _, kind, _, noticed, reason in lines:
        by_kind[kind][f"harmless: {reason}" if reason else "noticed" if noticed else "OPEN"] += 1
    rows = [f"{'kind':26}{'planted':>8}{'noticed':>8}{'harmless':>9}{'open':>6}"]
    for kind, ends in by_kind.items():
        planted, noticed, unsettled = ends.total(), ends["noticed"], ends["OPEN"]
        rows.append(f"{kind:26}{planted:8}{noticed:8}{planted - noticed - unsettled:9}{unsettled:6}")
        rows += [f"    {count} {end}" for end, count in ends.items() if end.startswith("harmless")]
    return "\n".join(rows)


def main() -> None:
    words = sys.argv[1:] or [""]
    lines = []
    for code, calls in record().items():
        chosen = [m for m in mutants(code) if any(word in f"{code.kernel.name}, {m.kind}" for word in words)]
        right = [call.again(code) for call in calls] if chosen else []
        for mutant in chosen:
            noticed = outcome(calls, mutant, right)
            reason = "" if noticed else harmless(code, calls, mutant, right)
            lines.append((code.kernel.name, mutant.kind, mutant.place, noticed, reason))
            print(json.dumps(lines[-1]), flush=True)
    print(table(lines))


if __name__ == "__main__":
    main()

"""Reads the PTX of one Triton kernel into basic blocks of instructions, each with its line of the kernel's source.

The grammar is PTX as Triton writes it for sm_80. What it does not know is an error: nothing is skipped in silence.
"""

import dataclasses
import os
import re

import numpy as np

#: NumPy's dtype of each PTX type.
TYPES: dict[str, type[np.generic]] = {
    name: dtype
    for names, dtype in (
        ("pred", np.bool_),
        ("b8 u8", np.uint8),
        ("s8", np.int8),
        ("b16 u16", np.uint16),
        ("s16", np.int16),
        ("b32 u32", np.uint32),
        ("s32", np.int32),
        ("f32", np.float32),
        ("b64 u64", np.uint64),
        ("s64", np.int64),
    )
    for name in names.split()
}


class UnsupportedError(NotImplementedError):
    """The kernel has something that the executor does not know."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a thread."""

    opcode: str
    """With all its modifiers, e.g. `"add.s32"`."""
    operands: tuple[str, ...]
    predicate: str | None
    """The register that switches the instruction on, if one does."""
    negated: bool
    """Whether the predicate switches it off instead."""
    place: str
    """Where the kernel's source asks for it, e.g. `"bias_activation.py:72"`."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel: what it declares, and its basic blocks in the order of the text."""

    name: str
    parameters: dict[str, str]
    """Name -> PTX type, in the order of the launch."""
    threads: int
    """Of a program."""
    registers: dict[str, str]
    """Name -> PTX type."""
    symbols: frozenset[str]
    """Names of shared memory. Triton declares one, for all of it: its address is 0."""
    blocks: list[list[Instruction]]
    labels: dict[str, int]
    """Label -> number of the block that it stands before."""

    @property
    def instructions(self) -> list[Instruction]:
        return [instruction for block in self.blocks for instruction in block]

    def narrowest(self, space: str) -> int:
        """Bytes of the narrowest load or store of `"shared"` or `"global"` memory: what its checks count in."""
        widths = [16]
        for instruction in self.instructions:
            parts = instruction.opcode.split(".")
            if parts[0] in ("ld", "st") and parts[1] == space:
                widths.append(TYPES[parts[-1]]().itemsize)
            elif parts[0] == "cp" and parts[2] in ("ca", "cg"):
                widths.append(int(instruction.operands[2], 0))
        return min(widths)


_STATEMENT = re.compile(
    r"\s*(?:(?P<label>[\w$]+):"
    r"|\.loc\s+(?P<file>\d+)\s+(?P<line>\d+)\s+\d+(?P<inlined>[^\n]*)"
    r"|(?P<brace>[{}])"
    r"|(?P<text>[^;]*);)"
)
_INLINED = re.compile(r", function_name [\w$]+, inlined_at (\d+) (\d+) \d+\s*$")
_INSTRUCTION = re.compile(
    r"(?:@(?P<not>!?)(?P<predicate>%\w+)\s+)?(?P<opcode>[a-z][\w.:]*)(?:\s+(?P<operands>.*))?$", re.DOTALL
)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%?\w+)(?:<(\d+)>)?$")


def parse(ptx: str) -> Kernel:
    """Parse the PTX of one kernel.

    Raises:
        UnsupportedError: for a statement, a type or a second function that the grammar does not know.
    """
    text = re.sub(r"//[^\n]*", "", ptx)
    entries = re.findall(r"\.(?:entry|func)\s+(?:\([^)]*\)\s*)?([\w$]+)\s*\((.*?)\)\s*(.*?)\{", text, re.DOTALL)
    if len(entries) != 1:
        raise UnsupportedError(f"{len(entries)} functions in one module: {', '.join(name for name, *_ in entries)}")
    name, parameters, limits = entries[0]
    files = {number: os.path.basename(path) for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text)}
    body = _Body(name, files)
    body.read(text, text.index("{", text.index(".entry")) + 1)
    threads = re.search(r"\.reqntid (\d+)", limits)
    if threads is None:
        raise UnsupportedError(f"{name} does not say how many threads it has")
    return Kernel(
        name=name,
        parameters={p: kind for kind, p in re.findall(r"\.param\s+\.(\w+)[^,]*?(\w+)\s*(?:,|$)", parameters.strip())},
        threads=int(threads[1]),
        registers=body.registers,
        symbols=frozenset(re.findall(r"\.extern \.shared [^;]*? (\w+)\[\];", text)),
        blocks=body.blocks,
        labels=body.labels,
    )


class _Body:
    """The statements between the braces of a function."""

    def __init__(self, name: str, files: dict[str, str]) -> None:
        self.name, self.files = name, files
        self.registers: dict[str, str] = {}
        self.blocks: list[list[Instruction]] = [[]]
        self.labels: dict[str, int] = {}
        self.targets: set[str] = set()
        self.place = name

    def read(self, text: str, start: int) -> None:
        self.targets = set(re.findall(r"\bbra(?:\.uni)?\s+([\w$]+)", text))  # most labels are for debuggers
        depth = 1
        while depth:
            found = _STATEMENT.match(text, start)
            if found is None:
                raise UnsupportedError(f"{self.place}: cannot read {text[start : start + 60].strip()!r}")
            start = found.end()
            if found["label"]:
                if self.blocks[-1] and found["label"] in self.targets:
                    self.blocks.append([])
                self.labels[found["label"]] = len(self.blocks) - 1
            elif found["file"]:
                self.place = self._place(found)
            elif found["brace"]:
                depth += 1 if found["brace"] == "{" else -1
            else:
                self._statement(found["text"].strip())

    def _place(self, found: re.Match[str]) -> str:
        place = f"{self.files[found['file']]}:{found['line']}"
        inlined = found["inlined"].strip()
        if not inlined:
            return place
        caller = _INLINED.match(inlined)
        if caller is None:
            raise UnsupportedError(f"{place}: cannot read {inlined!r}")
        return f"{place} (called from {self.files[caller[1]]}:{caller[2]})"

    def _statement(self, text: str) -> None:
        if declared := _REGISTERS.match(text):
            kind, prefix, count = declared.groups()
            names = [prefix] if count is None else [f"{prefix}{i}" for i in range(int(count))]
            for name in names:
                if kind not in TYPES or self.registers.setdefault(name, kind) != kind:
                    raise UnsupportedError(f"{self.place}: register {name} of type {kind}")
        elif text.startswith(".pragma"):
            pass  # advice on unrolling
        elif found := _INSTRUCTION.match(text):
            operands = tuple(split(found["operands"] or ""))
            opcode, predicate = found["opcode"], found["predicate"]
            self.blocks[-1].append(Instruction(opcode, operands, predicate, found["not"] == "!", self.place))
            if opcode in ("bra", "bra.uni", "ret"):
                self.blocks.append([])
        else:
            raise UnsupportedError(f"{self.place}: cannot read {text!r}")


def split(text: str) -> list[str]:
    """Operands between commas; those in brackets or braces stay together."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,\[{])+", text) if part.strip()]

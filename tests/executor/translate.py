"""Writes one Python function for a basic block: its instructions on arrays of one element a thread.

    block(registers, machine, active) -> None, or (who jumps, to which block)

A register is an array of one element a thread, of the type that it is declared with. `active` says which threads are in
the block; None is all of them. Whatever has an effect outside a thread's registers is a method of `Machine`.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from . import arithmetic
from .instructions import (
    ACCESSES,
    ARITHMETIC,
    CONTROL,
    COPIES,
    MATRIX_LOADS,
    PARAMETERS,
    PRODUCTS,
    SHUFFLES,
)
from .ptx import TYPES, Instruction, Kernel, UnsupportedError, split

Block = Callable[[list[np.ndarray[Any, Any]], Any, np.ndarray[Any, Any] | None], tuple[Any, int] | None]

#: What threads do that have finished.
EXIT = -1

_SPECIAL = re.compile(r"%(?:(?:tid|ntid|ctaid|nctaid)\.[xyz]|laneid)$")
ADDRESS = re.compile(r"\[\s*(%?\w+)\s*(?:\+\s*(-?\w+)\s*)?\]$")


def widen(x: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """Another integer type; a signed number keeps its sign."""
    return np.asarray(x).astype(TYPES[kind])


_SCOPE: dict[str, Any] = {
    **{name: value for name, value in vars(arithmetic).items() if not name.startswith("_")},
    **{kind.__name__: kind for kind in TYPES.values() if kind is not np.bool_},
    "bool_": np.bool_,
    "np": np,
    "widen": widen,
}


def translate(kernel: Kernel, number: int, whole: bool) -> Block:
    """The function of block `number`.

    Args:
        kernel: the kernel.
        number: of the block.
        whole: whether all threads are active.

    Raises:
        UnsupportedError: for an instruction form, a register or an operand that no table knows.
    """
    writer = _Writer(kernel, whole)
    for index, instruction in enumerate(kernel.blocks[number]):
        writer.write(index, instruction)
    lines = ["def block(R, M, active):", *(f"  {line}" for line in writer.lines), "  return None"]
    scope = dict(_SCOPE)
    exec(compile("\n".join(lines), f"<{kernel.name}, block {number}>", "exec"), scope)
    return scope["block"]


class _Writer:
    def __init__(self, kernel: Kernel, whole: bool) -> None:
        self.kernel, self.whole = kernel, whole
        self.numbers = {name: i for i, name in enumerate(kernel.registers)}
        self.lines: list[str] = []

    def write(self, index: int, instruction: Instruction) -> None:
        self.lines.append(f"M.index = {index}")
        self.instruction = instruction
        self.mask = self._mask()
        opcode = instruction.opcode
        handlers: list[tuple[Any, Callable[[str, tuple[str, ...]], None]]] = [
            (ARITHMETIC, self._arithmetic),
            (ACCESSES, self._access),
            (PARAMETERS, self._parameter),
            (COPIES, self._copy),
            (MATRIX_LOADS, self._load_matrices),
            (PRODUCTS, self._product),
            (SHUFFLES, self._shuffle),
            (CONTROL, self._control),
        ]
        for forms, handler in handlers:
            if opcode in forms:
                try:
                    handler(opcode, instruction.operands)
                except (ValueError, IndexError, KeyError, TypeError) as error:
                    raise self._unsupported(f"operands {', '.join(instruction.operands)}: {error!r}") from None
                return
        raise self._unsupported("no such form")

    def _unsupported(self, why: str) -> UnsupportedError:
        return UnsupportedError(f"{self.kernel.name}, {self.instruction.place}: {self.instruction.opcode}: {why}")

    # Operands

    def _mask(self) -> str:
        """Who executes the instruction, as an expression; "None" is every thread."""
        predicate = self.instruction.predicate
        parts = [] if self.whole else ["active"]
        if predicate is not None:
            parts.append(("~" if self.instruction.negated else "") + self._value(predicate, "pred"))
        return " & ".join(parts) or "None"

    def _value(self, operand: str, kind: str) -> str:
        """An operand as an expression of the dtype of `kind`."""
        name, width = TYPES[kind].__name__.rstrip("_"), TYPES[kind]().itemsize
        name = "bool_" if kind == "pred" else name
        if operand in self.numbers:
            own, register = TYPES[self.kernel.registers[operand]], f"R[{self.numbers[operand]}]"
            if own is TYPES[kind]:
                return register
            if (own is np.bool_) != (kind == "pred") or own().itemsize < width:
                raise self._unsupported(f"{operand} is no {kind}")
            if own().itemsize == width:
                return f"{register}.view({name})"
            return f"{register}.astype(uint{8 * width}).view({name})"
        if operand in self.kernel.symbols:
            return f"{name}(0)"
        if _SPECIAL.match(operand):
            return f"M.special[{operand!r}].view({name})"
        if found := re.match(r"0f([0-9A-Fa-f]{8})$", operand):
            return f"uint32(0x{found[1]}).view({name})"
        if kind == "pred":
            return f"bool_({bool(int(operand, 0))})"
        if kind.startswith("f"):
            raise self._unsupported(f"{operand} is no {kind}")
        bits = 8 * width
        value = int(operand.rstrip("U"), 0) & (1 << bits) - 1
        if kind.startswith("s") and value >> bits - 1:
            value -= 1 << bits
        return f"{name}({value})"

    def _list(self, operand: str, kind: str) -> str:
        return "[" + ", ".join(self._value(part, kind) for part in _parts(operand)) + "]"

    def _address(self, operand: str, kind: str) -> str:
        found = ADDRESS.match(operand)
        if found is None:
            raise self._unsupported(f"cannot read the address {operand}")
        base = self._value(found[1], kind)
        if found[1] not in self.numbers:
            base = f"np.broadcast_to({base}, M.lanes)"
        offset = int(found[2] or "0", 0)
        return f"{base} + {self._value(str(offset), kind)}" if offset else base

    def _assign(self, register: str, expression: str, kind: str) -> None:
        """Write to a register. A narrower value is extended, by its sign where `kind` has one."""
        if register == "_":
            return
        own, given = TYPES[self.kernel.registers[register]], TYPES[kind]
        fits = own().itemsize == given().itemsize or (own().itemsize > given().itemsize and kind[0] in "sub")
        if (own is np.bool_) != (given is np.bool_) or not fits:
            raise self._unsupported(f"{register} cannot hold {kind}")
        target = f"R[{self.numbers[register]}]"
        every = re.search(r"R\[|M\.special|M\.shuffle|loaded|product|whole", expression)
        self.lines.append(f"v = {expression}" if every else f"v = np.broadcast_to({expression}, M.lanes)")
        if own().itemsize > given().itemsize:
            extended = f"{'int' if kind.startswith('s') else 'uint'}{8 * own().itemsize}"
            self.lines.append(f"v = v.astype({extended})")
        value = "v" if own is given else f"v.view({own.__name__})"
        self.lines.append(
            f"{target} = {value}" if self.mask == "None" else f"{target} = np.where({self.mask}, {value}, {target})"
        )

    # Instructions

    def _arithmetic(self, opcode: str, operands: tuple[str, ...]) -> None:
        form = ARITHMETIC[opcode]
        if len(operands) != 1 + len(form.operands):
            raise self._unsupported(f"{len(operands)} operands")
        register, *sources = operands
        if opcode.startswith("mov") and "{" in register + sources[0]:
            self._move_parts(register, sources[0], form.result)
            return
        values = [f"({self._value(s, kind)})" for s, kind in zip(sources, form.operands, strict=True)]
        self._assign(register, form.expression.format(*values), form.result)

    def _move_parts(self, register: str, source: str, kind: str) -> None:
        """Take a register apart, or put one together, the lowest part first."""
        bits = 8 * TYPES[kind]().itemsize
        if register.startswith("{"):
            parts = _parts(register)
            width = bits // len(parts)
            self.lines.append(f"whole = np.broadcast_to({self._value(source, kind)}, M.lanes)")
            for i, part in enumerate(parts):
                self._assign(part, f"(whole >> uint{bits}({i * width})).astype(uint{width})", f"b{width}")
            return
        parts = _parts(source)
        width = bits // len(parts)
        terms = [
            f"widen({self._value(p, f'b{width}')}, {kind!r}) << uint{bits}({i * width})" for i, p in enumerate(parts)
        ]
        self._assign(register, " | ".join(f"({term})" for term in terms), kind)

    def _parameter(self, opcode: str, operands: tuple[str, ...]) -> None:
        register, place = operands
        kind = PARAMETERS[opcode]
        name = place.strip("[] ")
        if TYPES[self.kernel.parameters[name]]().itemsize != TYPES[kind]().itemsize:
            raise self._unsupported(f"parameter {name} is {self.kernel.parameters[name]}")
        self._assign(register, f"M.parameters[{name!r}].view({TYPES[kind].__name__})", kind)

    def _access(self, opcode: str, operands: tuple[str, ...]) -> None:
        form = ACCESSES[opcode]
        place, listed = operands if form.store else operands[::-1]
        registers = _parts(listed)
        if len(registers) != form.count:
            raise self._unsupported(f"{len(registers)} registers")
        address = self._address(place, "u32" if form.space == "shared" else "u64")
        width = TYPES[form.kind]().itemsize
        if form.store:
            values = "[" + ", ".join(self._value(r, f"b{8 * width}") for r in registers) + "]"
            self.lines.append(f"M.store_{form.space}({address}, {values}, {width}, {self.mask})")
            return
        self.lines.append(f"loaded = M.load_{form.space}({address}, {width}, {form.count}, {self.mask})")
        for i, register in enumerate(registers):
            self._assign(register, f"loaded[:, {i}].view({TYPES[form.kind].__name__})", form.kind)

    def _copy(self, opcode: str, operands: tuple[str, ...]) -> None:
        to, source, size, *count = operands
        if int(size, 0) not in COPIES[opcode] or len(count) > 1:
            raise self._unsupported(f"copies {size} bytes")
        filled = self._value(count[0], "u32") if count else f"uint32({int(size, 0)})"
        arguments = f"{self._address(to, 'u32')}, {self._address(source, 'u64')}, {int(size, 0)}, {filled}"
        self.lines.append(f"M.copy({arguments}, {self.mask})")

    def _load_matrices(self, opcode: str, operands: tuple[str, ...]) -> None:
        count, transposed = MATRIX_LOADS[opcode]
        registers = _parts(operands[0])
        if len(registers) != count:
            raise self._unsupported(f"{len(registers)} registers")
        self.lines.append(
            f"loaded = M.load_matrices({self._address(operands[1], 'u32')}, {count}, {transposed}, {self.mask})"
        )
        for i, register in enumerate(registers):
            self._assign(register, f"loaded[{i}]", "b32")

    def _product(self, opcode: str, operands: tuple[str, ...]) -> None:
        result, *factors = operands
        a, b, c = (self._list(f, kind) for f, kind in zip(factors, ("b32", "b32", "f32"), strict=True))
        self.lines.append(f"product = M.multiply({PRODUCTS[opcode]!r}, {a}, {b}, {c}, {self.mask})")
        for i, register in enumerate(_parts(result)):
            self._assign(register, f"product[{i}]", "f32")

    def _shuffle(self, opcode: str, operands: tuple[str, ...]) -> None:
        result, source, lane, clamp, members = operands
        if int(members, 0) & 0xFFFFFFFF != 0xFFFFFFFF or "|" in result:
            raise self._unsupported("a shuffle of a part of the warp, or with a predicate")
        values = ", ".join(self._value(operand, "u32") for operand in (source, lane, clamp))
        self._assign(result, f"M.shuffle({SHUFFLES[opcode]!r}, {values}, {self.mask})", "b32")

    def _control(self, opcode: str, operands: tuple[str, ...]) -> None:
        taken = "True" if self.instruction.predicate is None else self.mask
        if opcode == "ret":
            self.lines.append(f"return {taken}, {EXIT}")
        elif opcode.startswith("bra"):
            self.lines.append(f"return {taken}, {self.kernel.labels[operands[0]]}")
        elif opcode == "cp.async.commit_group":
            self.lines.append(f"M.commit({self.mask})")
        elif opcode == "cp.async.wait_group":
            self.lines.append(f"M.wait({int(operands[0], 0)}, {self.mask})")
        elif opcode == "bar.sync":
            if operands != ("0",):
                raise self._unsupported("a barrier of a part of the program")
            self.lines.append(f"M.barrier({self.mask})")
        else:
            if int(operands[0], 0) & 0xFFFFFFFF != 0xFFFFFFFF:
                raise self._unsupported("a barrier of a part of the warp")
            self.lines.append(f"M.warp_barrier({self.mask})")


def _parts(operand: str) -> list[str]:
    return split(operand.strip("{} "))

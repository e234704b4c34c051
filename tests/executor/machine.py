"""Runs some programs of a launch together, all their threads in lockstep, and checks that they synchronise."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .counters import Counters
from .memory import GlobalMemory, SharedMemory, Threads, ViolationError
from .ptx import TYPES, Instruction, Kernel
from .tensor_cores import WARP, fragments, multiply, source_lanes
from .translate import EXIT, Block, translate

Array = np.ndarray[Any, Any]


class KernelError(RuntimeError):
    """A kernel does what a GPU would not forgive, or what its result must not depend on."""


class Code:
    """A kernel whose blocks are translated when they are first run."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.shared_grain, self.global_grain = kernel.narrowest("shared"), kernel.narrowest("global")
        self._blocks: dict[tuple[int, bool], Block] = {}

    def block(self, number: int, whole: bool) -> Block:
        if (number, whole) not in self._blocks:
            self._blocks[number, whole] = translate(self.kernel, number, whole)
        return self._blocks[number, whole]

    @property
    def reached(self) -> set[int]:
        """Numbers of the blocks that some thread has been in."""
        return {number for number, _ in self._blocks}

    def with_block(self, number: int, block: list[Instruction]) -> "Code":
        """The same kernel with another block `number`; all the others are translated already."""
        blocks = [*self.kernel.blocks]
        blocks[number] = block
        changed = Code(dataclasses.replace(self.kernel, blocks=blocks))
        changed._blocks = {key: known for key, known in self._blocks.items() if key[0] != number}
        return changed


class _Copies(NamedTuple):
    """Asynchronous copies of one instruction that are under way."""

    lanes: Array
    where: Array
    """In shared memory."""
    source: Array
    size: int
    filled: Array
    """Bytes that come from the source; the others are 0."""
    group: Array
    instruction: Instruction

    def only(self, chosen: Array) -> "_Copies":
        """Those of the threads in bool `chosen`."""
        arrays = {name: getattr(self, name)[chosen] for name in ("lanes", "where", "source", "filled", "group")}
        return self._replace(**arrays)


class Machine:
    """Programs that run together.

    Args:
        code: the kernel.
        parameters: name -> value, as NumPy scalars.
        grid: programs of the launch along x, y and z.
        programs: numbers of those that run here.
        shared: bytes of shared memory of a program.
        memory: the tensors of the launch.
        counters: what is counted on the way, if anything.
    """

    def __init__(
        self,
        code: Code,
        parameters: dict[str, Any],
        grid: tuple[int, int, int],
        programs: Sequence[int],
        shared: int,
        memory: GlobalMemory,
        counters: Counters | None,
    ) -> None:
        self.code, self.parameters, self.global_memory, self.counters = code, parameters, memory, counters
        self.size, self.count = code.kernel.threads, len(programs)
        self.lanes = self.size * self.count
        thread = np.tile(np.arange(self.size), self.count)
        numbers = np.repeat(np.asarray(programs), self.size)
        self.threads = Threads(
            program=numbers.astype(np.int32),
            slot=np.repeat(np.arange(self.count), self.size),
            warp=(thread // WARP).astype(np.int16),
            epoch=np.ones(self.count, np.int32),
        )
        self.shared_memory = SharedMemory(self.threads, shared, code.shared_grain)
        x, y, z = grid
        special = {"%tid.x": thread, "%tid.y": 0, "%tid.z": 0, "%laneid": thread % WARP}
        special |= {"%ntid.x": self.size, "%ntid.y": 1, "%ntid.z": 1, "%nctaid.x": x, "%nctaid.y": y, "%nctaid.z": z}
        special |= {"%ctaid.x": numbers % x, "%ctaid.y": numbers // x % y, "%ctaid.z": numbers // x // y}
        self.special = {name: np.full(self.lanes, value, np.uint32) for name, value in special.items()}
        self.group = np.zeros(self.lanes, np.int32)
        self.copies: list[_Copies] = []
        self.block = self.index = 0

    def run(self) -> None:
        """Run every program to its end: always the first of the blocks in which threads are.

        Raises:
            KernelError: at the first rule that is broken.
            UnsupportedError: at an instruction form that no table knows.
        """
        kernel = self.code.kernel
        # A register that nothing wrote: NaN.
        poison = {kind: np.full(self.lanes, kind != "pred", np.int8) * -1 for kind in set(kernel.registers.values())}
        poison = {kind: value.astype(TYPES[kind]) for kind, value in poison.items()}
        registers = [poison[kind] for kind in kernel.registers.values()]
        at = np.zeros(self.lanes, np.int32)
        try:
            while (alive := at != EXIT).any():
                self.block = int(at[alive].min())
                active = at == self.block
                whole = bool(active.all())
                if self.counters is not None:
                    self.counters.block(self.code.kernel, self.block, active)
                jump = self.code.block(self.block, whole)(registers, self, None if whole else active)
                at[active] = self.block + 1
                if jump is not None:
                    taken, target = jump
                    at[active & taken] = target
            if self.copies:
                raise ViolationError("ends before its asynchronous copies are waited for", self.copies[0].lanes)
        except ViolationError as violation:
            raise KernelError(self._explain(violation)) from None

    def _explain(self, violation: ViolationError) -> str:
        kernel = self.code.kernel
        block = kernel.blocks[self.block]
        instruction = block[min(self.index, len(block) - 1)]
        program = self.threads.program[violation.lanes[0]]
        same = self.threads.program[violation.lanes] == program
        threads = violation.lanes[same] % self.size
        text = f"{kernel.name}, {instruction.place}: {instruction.opcode} {violation.what}"
        text += f" (program {program}, {_ranges(threads)}"
        if violation.addresses is not None:
            address = int(violation.addresses[0])
            in_global = violation.addresses.dtype == np.uint64
            text += f", at {self.global_memory.describe(address) if in_global else f'shared {address:#x}'}"
        return text + ")"

    @property
    def _instruction(self) -> Instruction:
        return self.code.kernel.blocks[self.block][self.index]

    # Synchronisation

    def _together(self, mask: Array | None, size: int, what: str) -> None:
        """Require that of each `size` threads side by side all or none are here."""
        if mask is not None:
            groups = mask.reshape(-1, size)
            partial = groups.any(1) & ~groups.all(1)
            if partial.any():
                raise ViolationError(what, np.flatnonzero(np.repeat(partial, size) & mask))

    def barrier(self, mask: Array | None) -> None:
        self._together(mask, self.size, "is not reached by every thread of the program")
        self.threads.meet(np.ones(self.count, bool) if mask is None else mask[:: self.size])

    def warp_barrier(self, mask: Array | None) -> None:
        self._together(mask, WARP, "is not reached by every thread of the warp")

    def commit(self, mask: Array | None) -> None:
        self.group += 1 if mask is None else mask

    def wait(self, pending: int, mask: Array | None) -> None:
        """Deliver the copies of every thread's groups but the last `pending`; those of no group yet stay under way."""
        left = []
        for copies in self.copies:
            done = copies.group < self.group[copies.lanes] - pending
            if mask is not None:
                done &= mask[copies.lanes]
            if done.any():
                ready = copies.only(done)
                self.shared_memory.end_copy(ready.where, self.fetch(ready), ready.lanes)
            if not done.all():
                left.append(copies.only(~done))
        self.copies = left

    def copy(self, to: Array, source: Array, size: int, filled: Array, mask: Array | None) -> None:
        """`cp.async`: from global to shared memory, zeros past the first `filled` bytes."""
        lanes = self._active(mask)
        if not len(lanes):
            return
        to, source = to[lanes], source[lanes]
        filled = np.broadcast_to(filled, self.lanes)[lanes].astype(np.int64)
        if (filled > size).any():
            raise ViolationError(f"fills more than {size} bytes", lanes[filled > size])
        where = self.shared_memory.begin_copy(to, size, lanes)
        copies = _Copies(lanes, where, source, size, filled, self.group[lanes], self._instruction)
        self.fetch(copies)  # the addresses are checked where the copy begins
        self._count_shared(to, size, lanes)
        self._count_global(source[filled > 0], filled[filled > 0], lanes[filled > 0])
        self.copies.append(copies)

    def fetch(self, copies: _Copies) -> Array:
        """The bytes that copies deliver, (lanes, size)."""
        data = np.zeros((len(copies.lanes), copies.size), np.uint8)
        for count in np.unique(copies.filled[copies.filled > 0]):
            here = copies.filled == count
            source, lanes = copies.source[here], copies.lanes[here]
            data[here, :count] = self.global_memory.access(source, 1, int(count), copies.size, self.threads, lanes)
        return data

    # Memory

    def _active(self, mask: Array | None) -> Array:
        return np.arange(self.lanes) if mask is None else np.flatnonzero(mask)

    def _count_global(self, at: Array, sizes: Array, lanes: Array) -> None:
        if self.counters is not None:
            self.counters.global_(self._instruction, at, sizes, lanes // WARP)

    def _count_shared(self, at: Array, size: int, lanes: Array) -> None:
        if self.counters is not None:
            self.counters.shared(self._instruction, at, size, lanes // WARP)

    def _spread(self, values: Array, lanes: Array) -> Array:
        """Rows of the active threads among those of all."""
        if len(lanes) == self.lanes:
            return values
        out = np.zeros((self.lanes, *values.shape[1:]), values.dtype)
        out[lanes] = values
        return out

    def load_global(self, at: Array, width: int, count: int, mask: Array | None) -> Array:
        lanes = self._active(mask)
        at = at[lanes]
        values = self.global_memory.access(at, width, count, width * count, self.threads, lanes)
        self._count_global(at, np.full(len(lanes), width * count), lanes)
        return self._spread(values, lanes)

    def store_global(self, at: Array, values: list[Array], width: int, mask: Array | None) -> None:
        lanes = self._active(mask)
        at, stacked = at[lanes], self._stack(values, width, lanes)
        size = width * len(values)
        self.global_memory.access(at, width, len(values), size, self.threads, lanes, stacked)
        self._count_global(at, np.full(len(lanes), size), lanes)

    def load_shared(self, at: Array, width: int, count: int, mask: Array | None) -> Array:
        lanes = self._active(mask)
        at = at[lanes]
        values = self.shared_memory.read(at, width, count, lanes)
        self._count_shared(at, width * count, lanes)
        return self._spread(values, lanes)

    def store_shared(self, at: Array, values: list[Array], width: int, mask: Array | None) -> None:
        lanes = self._active(mask)
        at = at[lanes]
        self.shared_memory.write(at, width, self._stack(values, width, lanes), lanes)
        self._count_shared(at, width * len(values), lanes)

    def _stack(self, values: list[Array], width: int, lanes: Array) -> Array:
        return np.stack([np.broadcast_to(value, self.lanes).view(f"u{width}")[lanes] for value in values], 1)

    # Warps

    def shuffle(self, mode: str, values: Array, operand: Array, clamp: Array, mask: Array | None) -> Array:
        self._together(mask, WARP, "is not reached by every thread of the warp")
        values, operand, clamp = (np.broadcast_to(x, self.lanes).reshape(-1, WARP) for x in (values, operand, clamp))
        lane = np.broadcast_to(np.arange(WARP), values.shape)
        source = source_lanes(mode, lane, operand.astype(np.int64), clamp.astype(np.int64))
        return np.take_along_axis(values, source, 1).reshape(-1)

    def load_matrices(self, at: Array, count: int, transposed: bool, mask: Array | None) -> Array:
        """`ldmatrix`: uint32 (count, lanes)."""
        self._together(mask, WARP, "is not reached by every thread of the warp")
        lanes = self._active(mask).reshape(-1, WARP)
        rows = lanes[:, : 8 * count].reshape(-1)
        addresses = at[rows]
        halves = self.shared_memory.read(addresses, 2, 8, rows).reshape(-1, count, 8, 8)
        self._count_shared(addresses, 16, rows)
        out = np.zeros((count, self.lanes), np.uint32)
        out[:, lanes.reshape(-1)] = fragments(halves, transposed).reshape(count, -1)
        return out

    def multiply(self, kind: str, a: list[Array], b: list[Array], c: list[Array], mask: Array | None) -> list[Array]:
        self._together(mask, WARP, "is not reached by every thread of the warp")
        return multiply(kind, a, b, [np.broadcast_to(register, self.lanes) for register in c])


def _ranges(threads: Array) -> str:
    """Sorted numbers of threads in words."""
    parts = np.split(threads, np.flatnonzero(np.diff(threads) != 1) + 1)
    words = [f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts]
    more = f" and {len(words) - 4} more ranges" if len(words) > 4 else ""
    return f"thread{'s' if len(threads) > 1 else ''} {', '.join(words[:4])}{more}"

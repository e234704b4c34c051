"""What a launch does, counted while it is executed: instructions by pipe, sectors, bank conflicts, bytes.

Counts are of PTX: what the assembler makes of it may be fewer instructions, but memory is accessed as counted here.
"""

import collections
import dataclasses
from typing import Any

import numpy as np

from .instructions import PRODUCTS, pipe
from .ptx import Instruction, Kernel
from .tensor_cores import INNER, WARP

Array = np.ndarray[Any, Any]

#: Bytes of a sector, the least that global memory moves; of a bank of shared memory; and all its banks.
SECTOR, BANK, BANKS = 32, 4, 32

#: Where the number of a warp stands above an address, or that of a cycle above a word of shared memory.
_WARP_SHIFT, _WORD_BITS = 48, 20


@dataclasses.dataclass
class Traffic:
    """Accesses of one instruction, by whole warps."""

    requests: int = 0
    bytes: int = 0
    """That threads ask for."""
    moved: int = 0
    """Sectors of global memory, or cycles of shared memory."""
    least: int = 0
    """The same if the bytes asked for lay side by side, or without bank conflicts."""

    def add(self, other: "Traffic") -> None:
        self.requests += other.requests
        self.bytes += other.bytes
        self.moved += other.moved
        self.least += other.least

    @property
    def excess(self) -> float:
        """How many times the least."""
        return self.moved / self.least if self.least else 1.0


class Counters:
    """Counts of one or more launches."""

    def __init__(self) -> None:
        self.pipes: collections.Counter[str] = collections.Counter()
        """Instructions of a warp, by pipe."""
        self.tensor_flops = 0
        """Floating-point operations of `mma` instructions."""
        self.traffic: dict[tuple[str, str, str], Traffic] = {}
        """By space, place in the source, and opcode."""
        self._of_block: dict[tuple[int, int], tuple[collections.Counter[str], int]] = {}

    def total(self, space: str, opcode: str = "") -> Traffic:
        """Of all instructions on `"global"` or `"shared"` memory whose opcode begins with `opcode`."""
        total = Traffic()
        for (its_space, _, its_opcode), traffic in self.traffic.items():
            if its_space == space and its_opcode.startswith(opcode):
                total.add(traffic)
        return total

    def worst(self, space: str, count: int) -> list[tuple[str, str, Traffic]]:
        """Place, opcode and traffic of the instructions that move most above the least, by place."""
        chosen = [(place, opcode, t) for (its, place, opcode), t in self.traffic.items() if its == space]
        chosen = [entry for entry in chosen if entry[2].moved > entry[2].least]
        return sorted(chosen, key=lambda entry: entry[2].least - entry[2].moved)[:count]

    def block(self, kernel: Kernel, number: int, active: Array) -> None:
        """A basic block is run by the threads of bool `active`."""
        key = id(kernel), number
        if key not in self._of_block:
            opcodes = [instruction.opcode for instruction in kernel.blocks[number]]
            pipes = collections.Counter(map(pipe, opcodes))
            flops = sum(2 * 16 * 8 * INNER[PRODUCTS[opcode]] for opcode in opcodes if opcode in PRODUCTS)
            self._of_block[key] = pipes, flops
        pipes, flops = self._of_block[key]
        warps = int(active.reshape(-1, WARP).any(1).sum())
        for name, count in pipes.items():
            self.pipes[name] += count * warps
        self.tensor_flops += flops * warps

    def global_(self, instruction: Instruction, at: Array, sizes: Array, warps: Array) -> None:
        """Threads access `sizes` bytes, at most 16 and aligned, at addresses `at`; `warps` says whose they are."""
        if not len(at):
            return
        key = warps.astype(np.int64) << _WARP_SHIFT | at.astype(np.int64)
        sectors = np.unique(key // SECTOR)  # of each warp: an aligned access lies in one
        # Threads that ask for the same bytes, such as those of a broadcast, need them once.
        asked, of = np.unique(key, return_index=True)
        requests, needed = np.unique(asked >> _WARP_SHIFT, return_index=True)
        needed = np.add.reduceat(sizes[of], needed)
        least = int((-(-needed // SECTOR)).sum())
        self._add("global", instruction, Traffic(len(requests), int(needed.sum()), len(sectors), least))

    def shared(self, instruction: Instruction, at: Array, size: int, warps: Array) -> None:
        """Threads access `size` bytes each at addresses `at` of shared memory.

        A cycle serves one word of each bank: 8 bytes a thread take two cycles at least, half a warp each, and 16 bytes
        four. Threads that ask for the same word are served together.
        """
        if not len(at):
            return
        phases = max(1, size // BANK)
        order = np.arange(len(at)) - np.searchsorted(warps, warps)  # of a thread among those of its warp
        phase = warps * phases + order * phases // WARP
        words = at.astype(np.int64)[:, None] // BANK + np.arange(phases)
        distinct = np.unique((phase[:, None] << _WORD_BITS | words).reshape(-1))
        bank = (distinct >> _WORD_BITS) * BANKS + distinct % BANKS
        of_bank = np.unique(bank, return_counts=True)
        groups, start = np.unique(of_bank[0] // BANKS, return_index=True)
        cycles = np.maximum.reduceat(of_bank[1], start)
        requests = len(np.unique(warps))
        self._add("shared", instruction, Traffic(requests, len(at) * size, int(cycles.sum()), len(groups)))

    def _add(self, space: str, instruction: Instruction, traffic: Traffic) -> None:
        self.traffic.setdefault((space, instruction.place, instruction.opcode), Traffic()).add(traffic)

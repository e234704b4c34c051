"""One row of the report: what a case compiles to on a target, the least it must do, what falls short and why."""

import dataclasses
from typing import Any, NamedTuple

from fastbert_kernels.catalogue import Tiles

from .assembly import MachineCode
from .cases import DEVICES, HEADS, TARGETS, Case
from .limits import ITEMSIZE, PEAKS, Floor, floor
from .occupancy import MULTIPROCESSORS, Occupancy, occupancy


class Shortfall(NamedTuple):
    """Where a kernel is less than it could be."""

    what: str
    why: str | None
    """A key of `REASONS`; None where there is no reason, and then the kernel must not ship."""


#: Why a kernel may fall short, by what the row says.
REASONS = {
    "float32": "its products are exact, or in three parts by small ones: tensor cores would round the operands to TF32",
    "map's edge": "a map's tile may end at any of its two-byte elements; asynchronous copies take 4, 8 or 16 bytes",
    "gathered map": "elements of a map are found through an index, one by one",
    "gfx942 copies": "loads straight to LDS are 32 bits wide there; tiles come through registers",
    "after the product": "a tile is read when a product is done, while the multiprocessor's other program multiplies",
    "map's gradient": "a product starts from its tile, so that it is loaded to registers",
    "in parts": "products in TF32 parts split operands in registers, where a tile that two of them take is loaded to; "
    "with more tiles under way they spill",
    "narrow rows": "a tile has fewer bytes for each thread than one access moves: 16, or 4 of an asynchronous copy",
    "few rows": "tensor cores of the target's own kind take 64 rows and four warps; fewer multiply as on sm_80",
    "odd width": "rows that are no multiple of 16 bytes start anywhere, and so do their tiles",
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What one case compiles to on one target."""

    case: Case
    target: str
    tiles: Tiles
    machine: MachineCode

    @property
    def nvidia(self) -> bool:
        return self.target.startswith("sm_")

    @property
    def occupancy(self) -> Occupancy:
        machine = self.machine
        return occupancy(
            self.target,
            registers=machine.registers,
            shared=machine.shared,
            num_warps=self.tiles["num_warps"],
            tensor_memory=machine.tensor_memory,
        )

    @property
    def floor(self) -> Floor:
        """The least time of a call on the target's GPU."""
        return self._floor(DEVICES[self.target])

    def _floor(self, device: str) -> Floor:
        return floor(self.case.cost(), PEAKS[device], self.case.dtype, self.tiles.get("PRECISION", "ieee"))

    @property
    def issue(self) -> float | None:
        """Microseconds in which the target's GPU can issue the instructions of a call, at least those of a program.

        None for AMD, where kinds of instructions are issued side by side.
        """
        return self.issue_of(loops=True) if self.nvidia else None

    def issue_of(self, loops: bool, heads: int = HEADS) -> float:
        """The same with or without loops. What stands outside of them is counted once for each program, loops once for
        each trip. NVIDIA multiprocessors issue four a clock, one of a warp."""
        programs, trips = self.case.trips(self.tiles, heads)
        looped = sum(loop.code for loop in self.machine.loops)
        of_program = self.machine.code - looped + loops * trips / programs * looped
        peaks = PEAKS[DEVICES[self.target]]
        of_one = max(1.0, programs / peaks.multiprocessors)
        return of_program * max(1.0, of_one * self.tiles["num_warps"] / 4) / peaks.clock * 1e6

    def _is_narrow(self, size: int) -> bool:
        """Whether the smaller tile of rows that an attention kernel loads has under `size` bytes for each thread."""
        if not self.case.traits.attends:
            return False
        rows = min(self.tiles["BLOCK_M"], self.tiles["BLOCK_N"])
        threads = TARGETS[self.target].warp_size * self.tiles["num_warps"]
        return rows * max(16, self.case.width) * ITEMSIZE[self.case.dtype] < size * threads

    def _has_few_rows(self) -> bool:
        """Whether an attention kernel's products are too small for the tensor-core instructions of a group of warps."""
        rows = self.tiles["BLOCK_N" if self.case.traits.by_columns else "BLOCK_M"]
        groups = self.target in ("sm_90", "sm_100") and self.case.traits.attends
        return groups and (rows < 64 or self.tiles["num_warps"] < 4)

    def shortfalls(self) -> list[Shortfall]:
        """All in which this kernel falls short of what the report looks for."""
        machine, case, flags = self.machine, self.case, self.case.flags
        itemsize = ITEMSIZE[case.dtype]
        found = []
        if machine.shared > MULTIPROCESSORS[self.target].program_shared:
            found.append(Shortfall("over the limit of shared memory", None))
        if self.nvidia and (machine.spills or machine.stack):
            found.append(Shortfall("spills", None))
        if machine.own_dots < machine.dots or (machine.dots and not machine.tensor_core):
            # The product of sums has a row for each column.
            few = self._has_few_rows() or ("SUMS" in flags and case.width < 64)
            why = "float32" if case.dtype == "float32" else "few rows" if few else None
            found.append(
                Shortfall("products off the tensor cores", why if machine.tensor_core or why == "float32" else None)
            )
        odd = "odd width" if case.width * itemsize % 16 else None
        edge = None
        if "DPROBS" in flags:
            edge = "map's edge" if itemsize == 2 else "map's gradient"
        elif case.kernel == "feed_forward_backward":
            edge = "after the product"
        elif self.tiles.get("PRECISION") == "tf32x3":
            edge = "in parts"
        if any(not loop.async_copies for loop in machine.loops):
            narrow = "narrow rows" if self._is_narrow(4) else None
            why = (odd or narrow or (edge if edge == "in parts" else None)) if self.nvidia else "gfx942 copies"
            found.append(Shortfall("a loop without asynchronous copies", why))
        elif machine.sync_tiles:
            found.append(
                Shortfall("a loop that waits for a tile", "gathered map" if "COLUMNS" in flags else edge or odd)
            )
        if self.floor.bound == "bandwidth" and not machine.wide_loads + machine.wide_async:
            found.append(Shortfall("no 128-bit load", odd or ("narrow rows" if self._is_narrow(16) else None)))
        return found

    def problems(self) -> list[str]:
        """Why this kernel must not ship; empty when it may."""
        return [shortfall.what for shortfall in self.shortfalls() if shortfall.why is None]

    def reasons(self) -> list[str]:
        """The reasons of what falls short, keys of `REASONS`."""
        return list(dict.fromkeys(shortfall.why for shortfall in self.shortfalls() if shortfall.why is not None))

    def order(self) -> tuple[Any, ...]:
        """Sorts reports by case, then target."""
        return *self.case.order(), list(TARGETS).index(self.target)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data, its case and derived values included."""
        cost = self.case.cost()
        return {
            "name": f"{self.target}: {self.case}",
            **dataclasses.asdict(self),
            "occupancy": self.occupancy._asdict(),
            "cost": dataclasses.asdict(cost),
            "floors": {name: self._floor(name)._asdict() for name in PEAKS},
            "issue": self.issue,
            "shortfalls": [
                shortfall._asdict() | {"because": REASONS.get(shortfall.why or "")} for shortfall in self.shortfalls()
            ],
            "problems": self.problems(),
        }

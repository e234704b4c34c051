"""One row of the report: what a case compiles to on a target, the least it must do, what falls short and why."""

import dataclasses
from typing import Any, NamedTuple

from fastbert_kernels.tiles import Tiles

from .assembly import Machine
from .cases import DEVICES, TARGETS, Case
from .limits import ITEMSIZE, PEAKS, Floor, floor
from .occupancy import MULTIPROCESSORS, Occupancy, occupancy


class Shortfall(NamedTuple):
    """Where a kernel is less than it could be."""

    what: str
    why: str | None
    """The reason, a key of `REASONS`; None where there is none, and then the kernel must not ship."""


#: Why a kernel may fall short, by what the row says.
REASONS = {
    "float32": "products in float32 are exact: tensor cores would round their operands to TF32",
    "odd map": "rows of a map may start anywhere: elements of two bytes, one by one, are too short for asynchronous "
    "copies, which take 4, 8 or 16 bytes",
    "gathered map": "the map's columns are gathered through an index",
    "no async on gfx942": "loads straight to LDS are 32 bits wide there: tiles come through registers",
    "odd width": "rows that are no multiple of 16 bytes start anywhere",
    "narrow rows": "a row is too short to give every thread 16 bytes",
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What one case compiles to on one target."""

    case: Case
    target: str
    tiles: Tiles
    machine: Machine

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

    def floor(self, device: str | None = None) -> Floor:
        """The least time at `cases.LENGTHS` on a GPU, by default the target's."""
        return floor(self.case.cost(), PEAKS[device or DEVICES[self.target]], self.case.dtype)

    @property
    def issue(self) -> float | None:
        """Microseconds in which the target's GPU can issue the instructions of a call at `cases.LENGTHS`.

        Loops are counted once for each trip, what stands outside once for each program. NVIDIA multiprocessors issue
        four instructions a clock; None for AMD, where kinds of instructions are issued side by side.
        """
        if not self.nvidia:
            return None
        programs, trips = self.case.trips(self.tiles)
        looped = sum(loop.code for loop in self.machine.loops)
        issued = (programs * (self.machine.code - looped) + trips * looped) * self.tiles["num_warps"]
        peaks = PEAKS[DEVICES[self.target]]
        return issued / (4 * peaks.multiprocessors * peaks.clock) * 1e6

    def shortfalls(self) -> list[Shortfall]:
        """All in which this kernel falls short of what the report looks for."""
        machine, case = self.machine, self.case
        most = MULTIPROCESSORS[self.target].program_shared
        found = []
        if machine.shared > most:
            found.append(Shortfall(f"{machine.shared} bytes of shared memory, over the {most} there are", None))
        if self.nvidia and (machine.spills or machine.stack):
            found.append(Shortfall(f"{machine.spills} spill instructions, {machine.stack} bytes of stack", None))
        if machine.own_dots < machine.dots:
            what = f"{machine.dots - machine.own_dots} of {machine.dots} products without tensor cores"
            found.append(Shortfall(what, "float32" if case.dtype == "float32" else None))
        elif machine.dots and not machine.tensor_core:
            found.append(Shortfall("no tensor-core instruction", None))
        found += self._slow_loops()
        wide = machine.wide_loads + machine.wide_async
        if self.floor().bound == "bandwidth" and not wide:
            found.append(Shortfall("no 128-bit load", "odd width" if self._odd else None))
        return found

    @property
    def _odd(self) -> bool:
        """Whether rows of the case's width are no multiple of 16 bytes."""
        return self.case.width * ITEMSIZE[self.case.dtype] % 16 != 0

    def _slow_loops(self) -> list[Shortfall]:
        """Loops that wait for what they load."""
        found = []
        loops = self.machine.loops
        if any(not loop.async_copies for loop in loops):
            found.append(Shortfall("a loop without asynchronous copies", None if self.nvidia else "no async on gfx942"))
        elif self.case.attends and any(loop.loads for loop in loops):
            flags = self.case.flags
            why = None
            if "COLUMNS" in flags:
                why = "gathered map"
            elif "DPROBS" in flags and not self.case.aligned:
                why = "odd map"
            found.append(Shortfall("a loop with loads that are not asynchronous", why))
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
            "floors": {name: floor(cost, peaks, self.case.dtype)._asdict() for name, peaks in PEAKS.items()},
            "issue": self.issue,
            "shortfalls": [
                shortfall._asdict() | {"because": REASONS.get(shortfall.why or "")} for shortfall in self.shortfalls()
            ],
            "problems": self.problems(),
        }

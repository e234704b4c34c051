"""Shared and global memory of some programs of a launch, with the checks that a GPU leaves out.

Addresses of global memory are the executor's own: each tensor of the launch has its own 2^40 bytes of them, so that an
access past one tensor's end never lands in another. Addresses of shared memory start at 0 in each program.
"""

import ctypes
import dataclasses
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

#: Bits of an address within a tensor.
REGION_BITS = 40

#: In place of a reader's number: several have read.
_SEVERAL = -2
_NOBODY = -1


class ViolationError(Exception):
    """A rule of memory or of synchronisation is broken.

    Args:
        what: the rule.
        lanes: the threads that break it, as indices into those that run together.
        addresses: one for each of them, where the rule is about memory.
    """

    def __init__(self, what: str, lanes: Array, addresses: Array | None = None) -> None:
        super().__init__(what)
        self.what, self.lanes, self.addresses = what, lanes, addresses


@dataclasses.dataclass(frozen=True)
class Threads:
    """The threads that run together, those of a program side by side."""

    program: Array
    """int32, number in the launch."""
    slot: Array
    """int64, number among the programs that run together."""
    warp: Array
    """int16, number in the program."""
    epoch: Array
    """int32, for each of the programs that run together: barriers it has passed, and 1."""

    def meet(self, slots: Array) -> None:
        """The programs marked in bool `slots` pass a barrier."""
        self.epoch[:] += slots


class _History:
    """Who touched each grain of memory last, by a program's epochs: the time between two barriers."""

    def __init__(self, grains: int) -> None:
        self.write_epoch, self.read_epoch = np.zeros(grains, np.int32), np.zeros(grains, np.int32)
        self.writer, self.reader = np.zeros(grains, np.int16), np.zeros(grains, np.int16)

    def read(self, grains: Array, epoch: Array, warp: Array) -> Array:
        """Note reads. Returns which are of what another warp has written in this epoch."""
        others = (self.read_epoch[grains] == epoch) & (self.reader[grains] != warp)
        self.reader[grains] = np.where(others, _SEVERAL, warp)
        # Of several warps in this one access the last stands there.
        clash = self.reader[grains] != warp
        if clash.any():
            self.reader[grains[clash]] = _SEVERAL
        self.read_epoch[grains] = epoch
        return (self.write_epoch[grains] == epoch) & (self.writer[grains] != warp)

    def write(self, grains: Array, epoch: Array, warp: Array) -> tuple[Array, Array]:
        """Note writes. Returns which are of what another warp has read, and has written, in this epoch."""
        read = (self.read_epoch[grains] == epoch) & (self.reader[grains] != warp)
        written = (self.write_epoch[grains] == epoch) & (self.writer[grains] != warp)
        self.write_epoch[grains], self.writer[grains] = epoch, warp
        return read, written


def _require(holds: Array, what: str, lanes: Array, at: Array) -> None:
    """Raise unless all hold, (lanes, n)."""
    if not holds.all():
        bad = ~holds.all(1)
        raise ViolationError(what, lanes[bad], at[bad])


_READ_WRITTEN = "reads what another warp wrote since the last barrier"
_WRITTEN_READ = "writes what another warp read since the last barrier"
_WRITTEN_TWICE = "writes what another warp wrote since the last barrier"


class SharedMemory:
    """Shared memory, each program's behind another's.

    Args:
        threads: those that run together.
        size: bytes of a program.
        grain: bytes of the kernel's narrowest access, by which accesses are noted.
    """

    def __init__(self, threads: Threads, size: int, grain: int) -> None:
        self.threads, self.grain = threads, grain
        self.size = -(-max(size, 16) // 16) * 16
        size = len(threads.epoch) * self.size
        self.bytes = np.full(size, 0xFF, np.uint8)  # NaN until written
        self.history = _History(size // grain)
        self.under_way = np.zeros(size // grain, bool)

    def read(self, at: Array, width: int, count: int, lanes: Array) -> Array:
        """Elements (lanes, count) of `width` bytes at uint32 addresses (lanes,)."""
        where = self._locate(at, width * count, lanes)
        grains, epoch, warp = self._grains(where, width * count, lanes)
        _require(~self.under_way[grains], "reads what an asynchronous copy may not have delivered", lanes, at)
        _require(~self.history.read(grains, epoch, warp), _READ_WRITTEN, lanes, at)
        _require(self.history.write_epoch[grains] != 0, "reads shared memory that nothing wrote", lanes, at)
        return self.bytes.view(f"u{width}")[(where // width)[:, None] + np.arange(count)]

    def write(self, at: Array, width: int, values: Array, lanes: Array) -> None:
        """Write elements (lanes, count)."""
        where = self._locate(at, width * values.shape[1], lanes)
        view = self.bytes.view(f"u{width}")
        index = (where // width)[:, None] + np.arange(values.shape[1])
        self._written(where, width * values.shape[1], lanes, at, same=bool((view[index] == values).all()))
        view[index] = values
        # Of the lanes of one warp any may win: they write what each has of one sum, which may differ in the last bit.
        lost = (view[index] != values).any(1)
        if lost.any():
            grains, _, warp = self._grains(where, width * values.shape[1], lanes)
            own = ~lost[:, None] | (self.history.writer[grains] == warp)
            _require(own, "writes another value than another warp to one address", lanes, at)

    def begin_copy(self, at: Array, size: int, lanes: Array) -> Array:
        """An asynchronous copy writes here from now on. Returns where, for `end_copy`."""
        where = self._locate(at, size, lanes)
        self._written(where, size, lanes, at, same=False)
        self.under_way[self._grains(where, size, lanes)[0]] = True
        self.bytes[where[:, None] + np.arange(size)] = 0xFF
        return where

    def end_copy(self, where: Array, data: Array, lanes: Array) -> None:
        """Deliver bytes (lanes, size) to the thread that waits for them; others see them past the next barrier."""
        size = data.shape[1]
        self.bytes[where[:, None] + np.arange(size)] = data
        grains, epoch, warp = self._grains(where, size, lanes)
        self.under_way[grains] = False
        self.history.write(grains, epoch, warp)

    def _locate(self, at: Array, size: int, lanes: Array) -> Array:
        inside = at.astype(np.int64) + size <= self.size
        _require(inside[:, None], f"is out of the {self.size} bytes of shared memory", lanes, at)
        _require((at % size == 0)[:, None], f"is misaligned: {size} bytes", lanes, at)
        return at.astype(np.int64) + self.threads.slot[lanes] * self.size

    def _grains(self, where: Array, size: int, lanes: Array) -> tuple[Array, Array, Array]:
        return _grains_of(where, size, self.grain, self.threads, lanes)

    def _written(self, where: Array, size: int, lanes: Array, at: Array, same: bool) -> None:
        """Check and note a write; `same` when it changes nothing, which warps may do together."""
        grains, epoch, warp = self._grains(where, size, lanes)
        _require(~self.under_way[grains], "writes where an asynchronous copy is under way", lanes, at)
        read, written = self.history.write(grains, epoch, warp)
        _require(~read, _WRITTEN_READ, lanes, at)
        _require(~written | same, _WRITTEN_TWICE, lanes, at)


def _grains_of(where: Array, size: int, grain: int, threads: Threads, lanes: Array) -> tuple[Array, Array, Array]:
    """Grains (lanes, n) of accesses, and epoch and warp of each."""
    grains = (where // grain)[:, None] + np.arange(-(-size // grain))
    epoch = np.broadcast_to(threads.epoch[threads.slot[lanes]][:, None], grains.shape)
    return grains, epoch, np.broadcast_to(threads.warp[lanes][:, None], grains.shape)


class GlobalMemory:
    """The tensors of a launch. An element that one program writes is no other program's to read or write.

    Args:
        tensors: address, bytes and name of each. Those that overlap, such as views of one tensor, are one region.
        grain: bytes of the kernel's narrowest access, in which owners are noted.
    """

    def __init__(self, tensors: list[tuple[int, int, str]], grain: int) -> None:
        spans: list[tuple[int, int, str]] = []
        for start, size, name in sorted(t for t in tensors if t[1]):
            if spans and start < spans[-1][1]:
                spans[-1] = (spans[-1][0], max(spans[-1][1], start + size), f"{spans[-1][2]}/{name}")
            else:
                spans.append((start, start + size, name))
        self.grain, self.spans = grain, spans
        # From a multiple of 16 to another, so that elements of every width can be indexed: no more of it is touched.
        self.starts = [start - start % 16 for start, *_ in spans]
        sizes = [-(-(end - start) // 16) * 16 for (_, end, _), start in zip(spans, self.starts, strict=True)]
        self.bytes = [
            np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start))
            for start, size in zip(self.starts, sizes, strict=True)
        ]
        self.writers, self.readers = ([np.full(size // grain, _NOBODY, np.int32) for size in sizes] for _ in range(2))
        self.histories = [_History(size // grain) for size in sizes]

    def address(self, pointer: int) -> int:
        """The executor's address for a pointer into one of the tensors; 0 for any other."""
        for number, (start, end, _) in enumerate(self.spans):
            if start <= pointer < end:
                return (number + 1 << REGION_BITS) + pointer - self.starts[number]
        return 0

    def describe(self, address: int) -> str:
        """An address in words."""
        number = (address >> REGION_BITS) - 1
        if not 0 <= number < len(self.spans):
            return f"{address:#x}"
        start, end, name = self.spans[number]
        return f"{name} + {(address & (1 << REGION_BITS) - 1) + self.starts[number] - start} of {end - start} bytes"

    def access(
        self, at: Array, width: int, count: int, align: int, threads: Threads, lanes: Array, values: Array | None = None
    ) -> Array:
        """Read elements (lanes, count) at uint64 addresses (lanes,), or write `values`.

        Args:
            align: what addresses must be multiples of.
        """
        misaligned = at % np.uint64(align) != 0
        if misaligned.any():
            raise ViolationError(f"is misaligned: {align} bytes", lanes[misaligned], at[misaligned])
        region = (at >> np.uint64(REGION_BITS)).astype(np.int64) - 1
        offset = (at & np.uint64((1 << REGION_BITS) - 1)).astype(np.int64)
        out = np.empty((len(at), count), f"u{width}")
        for number in np.unique(region):
            here = np.flatnonzero(region == number)
            chosen = None if values is None else values[here]
            out[here] = self._within(int(number), offset[here], at[here], width, count, threads, lanes[here], chosen)
        return out

    def _within(
        self, number: int, offset: Array, at: Array, width: int, count: int, threads: Threads, lanes: Array, values: Any
    ) -> Array:
        """The accesses to one region."""
        outside = np.ones(len(at), bool)
        if 0 <= number < len(self.spans):
            start, end, _ = self.spans[number]
            base = self.starts[number]
            outside = (offset < start - base) | (offset + width * count > end - base)
        if outside.any():
            what = "reads" if values is None else "writes"
            raise ViolationError(f"{what} outside the tensors of the launch", lanes[outside], at[outside])
        grains, epoch, warp = _grains_of(offset, width * count, self.grain, threads, lanes)
        self._own(number, grains, threads.program[lanes], lanes, at, values is not None)
        view = self.bytes[number].view(f"u{width}")
        index = (offset // width)[:, None] + np.arange(count)
        if values is None:
            _require(~self.histories[number].read(grains, epoch, warp), _READ_WRITTEN, lanes, at)
            return view[index]
        read, written = self.histories[number].write(grains, epoch, warp)
        _require(~read, _WRITTEN_READ, lanes, at)
        # Warps may write the same together.
        _require(~written | (view[index] == values).all(), _WRITTEN_TWICE, lanes, at)
        view[index] = values
        _require(view[index] == values, "writes another value than another thread to one address", lanes, at)
        return values

    def _own(self, number: int, grains: Array, programs: Array, lanes: Array, at: Array, write: bool) -> None:
        """Check and note which programs touch which grains."""
        writers, readers = self.writers[number], self.readers[number]
        own = np.broadcast_to(programs[:, None], grains.shape)
        what = f"{'writes' if write else 'reads'} global memory that another program"
        known, before = writers[grains], readers[grains]
        _require((known == _NOBODY) | (known == own), f"{what} writes", lanes, at)
        if write:
            writers[grains] = own
            _require(writers[grains] == own, f"{what} writes", lanes, at)
            _require((before == _NOBODY) | (before == own), f"{what} reads", lanes, at)
            return
        readers[grains] = np.where((before == _NOBODY) | (before == own), own, _SEVERAL)
        # Of several programs in this one access the last stands there.
        clash = (readers[grains] != own) & (readers[grains] != _SEVERAL)
        if clash.any():
            readers[grains[clash]] = _SEVERAL

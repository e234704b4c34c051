"""How many warps of a kernel one multiprocessor holds at a time, from what a program needs and what there is."""

import dataclasses
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Multiprocessor:
    """What programs share: of one multiprocessor (NVIDIA) or compute unit (AMD)."""

    warps: int
    programs: int
    registers: int
    """Of 32 bits, for each lane of a warp, of all warps together."""
    register_step: int
    """Registers of a lane are handed out in multiples of this."""
    warp_step: int
    """Schedulers with register files of their own: warps come in multiples of this."""
    shared: int
    """Bytes of shared memory."""
    shared_step: int
    program_shared: int
    """Bytes that one program may have."""
    reserved: int = 0
    """Bytes of shared memory taken from each program."""
    tensor_memory: int = 0
    """Columns of tensor memory."""


def _nvidia(
    shared: int, program_shared: int, warps: int = 64, programs: int = 32, tensor_memory: int = 0
) -> Multiprocessor:
    return Multiprocessor(
        warps=warps,
        programs=programs,
        registers=65536 // 32,
        register_step=8,
        warp_step=4,
        shared=shared * 1024,
        shared_step=128,
        program_shared=program_shared * 1024,
        reserved=1024,
        tensor_memory=tensor_memory,
    )


#: CUDA C++ Programming Guide, technical specifications by compute capability; LLVM's AMDGPU usage guide for gfx942.
#: Programs on sm_80 keep to the 99 KiB of those that take its tiles, of the 163 of its own.
MULTIPROCESSORS: dict[str, Multiprocessor] = {
    "sm_80": _nvidia(164, 99),
    "sm_86": _nvidia(100, 99, warps=48, programs=16),
    "sm_89": _nvidia(100, 99, warps=48, programs=24),
    "sm_90": _nvidia(228, 227),
    "sm_100": _nvidia(228, 227, tensor_memory=512),
    "sm_120": _nvidia(100, 99, warps=48, programs=24),
    "gfx942": Multiprocessor(
        warps=32,
        programs=16,
        registers=4 * 512,
        register_step=8,
        warp_step=4,
        shared=64 * 1024,
        shared_step=512,
        program_shared=64 * 1024,
    ),
}


class Occupancy(NamedTuple):
    """Warps of one kernel that a multiprocessor holds at a time."""

    warps: int
    share: float
    """Of the most it can hold."""
    limit: str
    """What there is no more of: "registers", "shared", "tensor memory", "warps" or "programs"."""


def occupancy(target: str, *, registers: int, shared: int, num_warps: int, tensor_memory: int = 0) -> Occupancy:
    """Occupancy of a kernel.

    Args:
        target: a key of `MULTIPROCESSORS`.
        registers: of a thread.
        shared: bytes of shared memory of a program.
        num_warps: warps of a program.
        tensor_memory: columns of tensor memory of a program.
    """
    there = MULTIPROCESSORS[target]
    steps = -(-max(registers, 1) // there.register_step) * there.register_step
    warps = there.registers // steps // there.warp_step * there.warp_step
    bytes_ = -(-(shared + there.reserved) // there.shared_step) * there.shared_step
    programs = {
        "warps": there.warps // num_warps,
        "programs": there.programs,
        "registers": warps // num_warps,
    }
    if bytes_:
        programs["shared"] = there.shared // bytes_
    if tensor_memory:
        programs["tensor memory"] = there.tensor_memory // tensor_memory
    limit = min(programs, key=lambda name: programs[name])
    resident = programs[limit] * num_warps
    return Occupancy(resident, resident / there.warps, limit)

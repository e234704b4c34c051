"""Compiling a case for a GPU that is not here, as its launch there would, and reading the machine code."""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.compiler import ASTSource, make_backend

from fastbert_kernels.backend import INTERPRETED
from fastbert_kernels.catalogue import Tiles

from .cases import COMPILED, TARGETS, Case, arguments, launch_tiles


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop that reads global memory. Counts are of the instructions of one trip."""

    tensor_core: int
    async_copies: int
    loads: int
    code: int
    """Instructions in all."""


@dataclasses.dataclass(frozen=True)
class MachineCode:
    """What a kernel compiles to. Counts are of instructions in the machine code."""

    registers: int
    """Registers of a thread, accumulation registers of AMD included."""
    spills: int
    """NVIDIA: STL and LDL instructions; AMD: spilled vector registers."""
    stack: int
    """Bytes of local memory of a thread."""
    shared: int
    """Bytes of shared memory of a program."""
    tensor_memory: int
    """Columns of tensor memory of a program; sm_100."""
    dots: int
    """Matrix products in the compiler's last intermediate form."""
    own_dots: int
    """Those of them that run on tensor cores in the way of the target's own generation."""
    tensor_core: int
    """HGMMA (sm_90), UTCHMMA (sm_100), HMMA (other NVIDIA, and small products of these two) or MFMA (gfx942)."""
    async_copies: int
    """From global to shared memory: LDGSTS, UTMALDG and UBLKCP; on AMD loads straight to LDS."""
    wide_async: int
    """Those of them that copy 128 bits a thread, or a whole tile."""
    loads: int
    """Loads of global memory of any width, asynchronous copies not included."""
    wide_loads: int
    """128-bit loads of global memory."""
    stores: int
    """Stores to global memory of any width."""
    wide_stores: int
    """128-bit stores to global memory."""
    exp2: int
    """MUFU.EX2, or v_exp_f32."""
    transcendental: int
    """All that the special-function units compute: exp2, log2, reciprocals, roots."""
    code: int
    """Instructions in all."""
    loops: tuple[Loop, ...]
    """Those that read global memory, in their order."""
    sync_tiles: int
    """Loads of tiles inside loops that the compiler did not make asynchronous."""


def compile_case(case: Case, target: str, tiles: Tiles | None = None) -> MachineCode:
    """Compile one case for one target, specialised by the launcher's own code, and read what came out.

    Args:
        case: the configuration.
        target: a key of `TARGETS`.
        tiles: tile sizes and launch options to try instead of the shipped ones.

    Raises:
        RuntimeError: when Triton's interpreter is on, under which there is nothing to compile.
    """
    require_compiler()
    kernel = COMPILED[case.kernel]
    tiles = launch_tiles(case, target) if tiles is None else tiles
    given = arguments(case, tiles)
    # Triton is about to change the default of enable_fp_fusion; the kernels are launched with it.
    options = {"enable_fp_fusion": True} | {name: value for name, value in tiles.items() if name not in given}
    backend = make_backend(TARGETS[target])
    bound, specialization, _ = _binder(case.kernel, target)(**given, **options)
    packed, signature, constexprs, attrs = kernel._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(kernel, signature, constexprs, attrs)
    compiled = triton.compile(source, target=TARGETS[target], options=packed.__dict__)
    return machine_code(compiled, target)


def machine_code(compiled: Any, target: str) -> MachineCode:
    """What a kernel that Triton compiled for a target consists of."""
    read = _read_nvidia if target.startswith("sm_") else _read_amd
    counts = read(compiled) | _read_ttgir(compiled.asm["ttgir"], target)
    return MachineCode(shared=compiled.metadata.shared, **counts)


@functools.cache
def _binder(kernel: str, target: str) -> Any:
    """The launcher's own function from arguments to their specialization."""
    fn = COMPILED[kernel]
    return triton.runtime.jit.create_function_from_signature(fn.signature, fn.params, make_backend(TARGETS[target]))


def require_compiler() -> None:
    """Raise RuntimeError when kernels were defined for the interpreter."""
    if INTERPRETED:
        raise RuntimeError(
            "kernels cannot be compiled under Triton's interpreter: unset TRITON_INTERPRET before fastbert_kernels is "
            "imported"
        )


def compile_all(
    jobs: list[tuple[Case, str, Tiles]], workers: int | None = None
) -> Iterator[tuple[int, MachineCode | Exception]]:
    """Compile cases in processes of their own, in the order in which they finish.

    Args:
        jobs: a case, a target and the tiles.
        workers: processes; default one for every CPU.

    Yields:
        The number of the job, and its machine code's counts or what its compilation raised.
    """
    require_compiler()
    # Not forked: a process that has run torch has threads.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers or os.cpu_count(), mp_context=context) as pool:
        futures = {pool.submit(compile_case, *job): number for number, job in enumerate(jobs)}
        try:
            for future in concurrent.futures.as_completed(futures):
                error = future.exception()
                if error is not None and not isinstance(error, Exception):
                    raise error
                yield futures[future], future.result() if error is None else error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _read_ttgir(ttgir: str, target: str) -> dict[str, Any]:
    """What the compiler's last intermediate form tells better than machine code does."""
    own = {"sm_90": r"ttng\.warp_group_dot\b", "sm_100": r"ttng\.tc_gen5_mma\b"}
    # What the other targets, and products without tensor cores, have is told by the layout of its result.
    mma = own.get(target, r"\btt\.dot\b.*-> tensor<[^>]*#mma\d*>")
    every = rf"\btt\.dot\b|{'|'.join(own.values())}"
    loops = re.findall(r"^( +)(?:%\S+ = )?scf\.for (.*?)^\1\}", ttgir, re.MULTILINE | re.DOTALL)
    tile = r"(?:\btt\.load|buffer_load)\b.* tensor<\d+x\d+x"
    return {
        "dots": len(re.findall(every, ttgir)),
        "own_dots": len(re.findall(mma, ttgir)),
        "sync_tiles": sum(len(re.findall(tile, body)) for _, body in loops),
    }


@dataclasses.dataclass(frozen=True)
class _Listing:
    """Instructions, and where each loop starts and ends: at the target of a jump back, and at the jump."""

    instructions: list[str]
    loops: list[tuple[int, int]]

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, instruction)) for instruction in self.instructions)


def _listing(text: str, label: str, instruction: str, jump: str, end: str) -> _Listing:
    """Parse assembly.

    Args:
        text: the assembly.
        label: pattern of a line that is a label, its name in a group.
        instruction: pattern of a line that is an instruction: a group from the mnemonic on.
        jump: pattern of an instruction that jumps: a group with the label's name.
        end: pattern of an instruction that ends the kernel, on a condition where a loop is around all of it. What
            stands behind the last one are waits moved out of the way, which jump back too but are not loops.
    """
    labels: dict[str, int] = {}
    instructions: list[str] = []
    loops: list[tuple[int, int]] = []
    body: list[tuple[int, int]] = []
    for line in text.splitlines():
        if found := re.match(label, line):
            labels[found[1]] = len(instructions)
        elif found := re.match(instruction, line):
            back = re.match(jump, found[1])
            if back and back[1] in labels:
                loops.append((labels[back[1]], len(instructions)))
            if re.match(end, line):
                body = list(loops)
            instructions.append(found[1])
    return _Listing(instructions, body)


def _loops(listing: _Listing, tensor_core: str, async_copy: str, load: str) -> tuple[Loop, ...]:
    """The innermost of the loops that read global memory."""
    read = {}
    for start, end in listing.loops:
        body = _Listing(listing.instructions[start : end + 1], [])
        loop = Loop(body.count(tensor_core), body.count(async_copy), body.count(load), len(body.instructions))
        if loop.async_copies or loop.loads:
            read[start, end] = loop
    inner = [a for a in read if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in read)]
    return tuple(read[span] for span in sorted(inner))


def _read_nvidia(compiled: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin)
        sass = _tool("nvdisasm", "-c", cubin)
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    # An instruction is an offset comment, an optional predicate, and the mnemonic.
    listing = _listing(
        sass,
        label=r"(\.L\w+):",
        instruction=r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z].*)",
        jump=r"BRA\b.*\((\.L\w+)\)",
        end=r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?EXIT\b",
    )
    tensor_core = r"(?:HMMA|HGMMA|UTC\w*MMA)\b"
    async_copy = r"(?:LDGSTS|UTMALDG|UBLKCP)\b"
    return {
        "registers": resources["REG"],
        "spills": listing.count(r"(?:STL|LDL)\b"),
        "stack": resources["STACK"],
        "tensor_memory": getattr(compiled.metadata, "tmem_size", None) or 0,
        "tensor_core": listing.count(tensor_core),
        "async_copies": listing.count(async_copy),
        "wide_async": listing.count(r"LDGSTS\b\S*\.128\b|UTMALDG\b|UBLKCP\b"),
        "loads": listing.count(r"LDG\b"),
        "wide_loads": listing.count(r"LDG\b\S*\.128\b"),
        "stores": listing.count(r"STG\b"),
        "wide_stores": listing.count(r"STG\b\S*\.128\b"),
        "exp2": listing.count(r"MUFU\.EX2\b"),
        "transcendental": listing.count(r"MUFU\b"),
        "code": len(listing.instructions),
        "loops": _loops(listing, tensor_core, async_copy, r"LDG\b"),
    }


def _tool(name: str, *args: str | Path) -> str:
    """Output of one of the CUDA tools in Triton's wheel."""
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *args], check=True, capture_output=True, text=True).stdout


def _read_amd(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    metadata = {name: int(value) for name, value in re.findall(r"^\s*-?\s*\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
    listing = _listing(
        text,
        label=r"(\.LBB\w+):",
        instruction=r"\t((?:s|v|ds|global|buffer|flat|scratch)_.*)",
        jump=r"s_c?branch\w* (\.LBB\w+)",
        end=r"\ts_endpgm\b",
    )
    memory, to_lds = r"(?:global|buffer|flat)_{}_\w+", r"(?:global_load_lds|buffer_load\w+.*\blds\b)"
    load = rf"(?!{to_lds}){memory.format('load')}"
    store = memory.format("store")
    return {
        "registers": metadata["vgpr_count"],
        "spills": metadata["vgpr_spill_count"],
        "stack": metadata["private_segment_fixed_size"],
        "tensor_memory": 0,
        "tensor_core": listing.count(r"v_mfma_"),
        "async_copies": listing.count(to_lds),
        "wide_async": listing.count(rf"(?={to_lds})\S*x4\b"),
        "loads": listing.count(load),
        "wide_loads": listing.count(load + r"x4\b"),
        "stores": listing.count(store),
        "wide_stores": listing.count(store + r"x4\b"),
        "exp2": listing.count(r"v_exp_f32"),
        "transcendental": listing.count(r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos)_"),
        "code": len(listing.instructions),
        "loops": _loops(listing, r"v_mfma_", to_lds, load),
    }

"""What the kernels compile to, without a GPU: registers, spills, shared memory and instructions on four targets.

`python -m fastbert_kernels.static` compiles every kernel ahead of time, specialised by the launcher's own code on
arguments like those the host passes, and reads the machine code. It fails when an NVIDIA kernel spills registers, when
a half-precision product runs without tensor cores, or when a kernel asks for more shared memory than there is.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from . import column_sums, embedding, layer_norm
from .attention_kernels import attention_backward_dkv, attention_backward_dq, attention_forward
from .backend import INTERPRETED
from .bias_gelu import ACTIVATIONS, _bias_activation_backward, _bias_activation_forward
from .tiles import BACKWARD_ELEMENTS, FORWARD_ELEMENTS, Tiles, attention_table, column_tiles, row_tiles

TARGETS: dict[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

KERNELS: dict[str, Any] = {
    "attention_forward": attention_forward,
    "attention_backward_dq": attention_backward_dq,
    "attention_backward_dkv": attention_backward_dkv,
    "bias_activation_forward": _bias_activation_forward,
    "bias_activation_backward": _bias_activation_backward,
    "add_layer_norm_forward": layer_norm._add_layer_norm_forward,
    "add_layer_norm_backward": layer_norm._add_layer_norm_backward,
    "embed_forward": embedding._embed_forward,
    "embed_backward": embedding._embed_backward,
    "column_sums": column_sums._column_sums,
}

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
HEAD_DIMS = (8, 32, 48, 64, 80, 96, 128)

#: The dtype of each pointer argument; None is the case's own. Absent tensors are never read: any dtype will do.
_POINTERS: dict[str, torch.dtype | None] = {
    **dict.fromkeys(("qkv_ptr", "out_ptr", "probs_ptr", "dout_ptr", "dprobs_ptr", "dqkv_ptr", "head_mask_ptr")),
    **dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "norm_bias_ptr", "y_ptr", "dy_ptr", "dz_ptr", "dx_ptr")),
    **dict.fromkeys(("word_table_ptr", "position_table_ptr", "token_type_table_ptr", "bias_ptr")),
    **dict.fromkeys(
        ("stats_ptr", "delta_ptr", "dhead_mask_ptr", "mean_ptr", "rstd_ptr", "partials_ptr"), torch.float32
    ),
    **dict.fromkeys(("cu_seqlens_ptr", "columns_ptr"), torch.int32),
    **dict.fromkeys(("seed_ptr", "words_ptr", "positions_ptr", "token_types_ptr"), torch.int64),
}

#: Scalars that no problem size changes.
_SCALARS: dict[str, int | float] = {
    "masked_below": -1e30,
    "scale": 0.125,
    "stream": 7,
    "keep_threshold": 214748364,
    "keep_scale": 1.1,
    "eps": 1e-12,
    "vocab_rows": 30522,
    "position_rows": 512,
    "token_type_rows": 2,
}

#: Sizes, by whether they are multiples of 16, which the launcher tells the compiler. The bias has one head for all.
_SIZES: dict[bool, dict[str, int]] = {
    aligned: {
        "tokens": batch * seq,
        "count": batch * seq,
        "rows": batch * seq,
        "batch": batch,
        "heads": heads,
        "max_seqlen": seq,
        "probs_seq": seq,
        "bias_batch_stride": seq * seq,
        "bias_head_stride": 0,
        "bias_row_stride": seq,
    }
    for aligned, batch, heads, seq in ((False, 11, 12, 509), (True, 16, 16, 512))
}

#: Compile-time switches of the kernels, without their HAS_.
_FLAGS = (
    *("CU_SEQLENS", "COLUMNS", "BIAS", "HEAD_MASK", "DROPOUT", "PROBS", "DPROBS"),
    *("RESIDUAL", "WORD_TABLE"),
)

#: Bytes of shared memory that one program may have. The sm_80 row serves smaller GPUs of its family, which have less
#: than the 163 KiB of the first.
_SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel in one configuration that the host code can launch."""

    kernel: str
    """A key of `KERNELS`."""
    dtype: str
    """A key of `DTYPES`, of the activations and weights."""
    width: int
    """head_dim of an attention kernel, features of the others."""
    flags: tuple[str, ...] = ()
    """Which HAS_ switches are on, without the HAS_."""
    activation: str | None = None
    """The activation, for the kernels that have one."""
    aligned: bool = False
    """Whether tokens, heads and sequence lengths are multiples of 16."""

    def __str__(self) -> str:
        words = [self.kernel, self.dtype, str(self.width), self.activation, "+".join(self.flags).lower()]
        return " ".join([word for word in words if word] + ["aligned"] * self.aligned)


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """What one case compiles to on one target. Counts are of instructions in the machine code."""

    case: Case
    target: str
    tiles: Tiles
    registers: int
    """Registers of a thread, accumulation registers of AMD included."""
    spills: int
    """NVIDIA: STL and LDL instructions; AMD: spilled vector registers."""
    stack: int
    """Bytes of local memory of a thread."""
    shared: int
    """Bytes of shared memory of a program."""
    tensor_core: int
    """HMMA (sm_80), HGMMA (sm_90), UTCHMMA (sm_100) or MFMA (gfx942)."""
    mma_sync: int
    """HMMA on any NVIDIA target: on sm_90 and sm_100 the older and slower path."""
    async_copies: int
    """LDGSTS and UTMALDG; on AMD loads straight to LDS."""
    wide_loads: int
    """128-bit loads of global memory."""
    loads: int
    """Loads of global memory of any width, asynchronous ones not included."""
    wide_stores: int
    """128-bit stores to global memory."""
    stores: int
    """Stores to global memory of any width."""
    exp2: int
    """MUFU.EX2, or v_exp_f32."""
    code: int
    """Instructions in all."""

    @property
    def has_dot(self) -> bool:
        """Whether the kernel multiplies matrices."""
        return self.case.kernel.startswith("attention_")

    @property
    def warps_per_sm(self) -> int | None:
        """Warps that one NVIDIA multiprocessor can hold at a time, of 64; None on AMD."""
        if not self.target.startswith("sm_"):
            return None
        warps = self.tiles["num_warps"]
        registers = -(-self.registers // 8) * 8 * 32 * warps
        shared = self.shared + 1024  # what the driver reserves for each program
        programs = min(32, 64 // warps, 65536 // registers, (_SHARED_LIMIT[self.target] + 1024) // shared)
        return programs * warps

    def problems(self) -> list[str]:
        """Why this kernel must not ship; empty when it may."""
        found = []
        if self.shared > _SHARED_LIMIT[self.target]:
            found.append(f"{self.shared} bytes of shared memory, over the {_SHARED_LIMIT[self.target]} there are")
        if self.target.startswith("sm_") and self.spills:
            found.append(f"{self.spills} spill instructions")
        if self.has_dot and self.case.dtype != "float32" and not self.tensor_core:
            found.append("no tensor-core instruction")
        return found

    def to_json(self) -> dict[str, Any]:
        """The report as plain data, its case and derived values included."""
        return dataclasses.asdict(self) | {"warps_per_sm": self.warps_per_sm, "problems": self.problems()}


def cases(full: bool) -> list[Case]:
    """The configurations to compile.

    Args:
        full: every dtype, head_dim and activation, with the switches that tell; else a representative part: bfloat16,
            head_dim 64 and 32, 384 and 768 features, inference, training, probabilities, and a bias mask.
    """
    return list(dict.fromkeys(_all_cases() if full else _representative_cases()))


def _attention_cases(dtype: str, head_dim: int, *switches: str, aligned: bool = False) -> Iterator[Case]:
    """The three attention kernels; PROBS stands for probabilities asked for and, in the backward pass, used."""
    for kernel in ("attention_forward", "attention_backward_dq", "attention_backward_dkv"):
        flags = (flag.replace("PROBS", "PROBS" if kernel == "attention_forward" else "DPROBS") for flag in switches)
        yield Case(kernel, dtype, head_dim, tuple(flags), aligned=aligned)


def _representative_cases() -> Iterator[Case]:
    for head_dim in (64, 32):
        yield Case("attention_forward", "bfloat16", head_dim, ("CU_SEQLENS",))
        yield from _attention_cases("bfloat16", head_dim, "CU_SEQLENS", "DROPOUT")
    yield from _attention_cases("bfloat16", 64, "CU_SEQLENS", "DROPOUT", "PROBS")
    yield from _attention_cases("bfloat16", 64, "BIAS")
    for features in (384, 768):
        for direction in ("forward", "backward"):
            norm = ("BIAS", "RESIDUAL", "DROPOUT")
            yield Case(f"add_layer_norm_{direction}", "bfloat16", features, norm)
            yield Case(f"embed_{direction}", "bfloat16", features, ("WORD_TABLE", "DROPOUT"))
    yield Case("add_layer_norm_forward", "bfloat16", 768, ("BIAS", "RESIDUAL"))
    yield Case("embed_forward", "bfloat16", 768, ("WORD_TABLE",))
    for kernel in ("bias_activation_forward", "bias_activation_backward"):
        yield Case(kernel, "bfloat16", 768, ("BIAS",), activation="gelu")
    yield Case("column_sums", "bfloat16", 768)


def _subsets(*flags: str) -> Iterator[tuple[str, ...]]:
    for on in itertools.product((False, True), repeat=len(flags)):
        yield tuple(itertools.compress(flags, on))


#: Features of the row kernels in the full sweep: small, BERT's, odd, and the widest.
_ROW_WIDTHS = (37, 384, 768, 1023, 1024, 4096)

#: Switches of the attention kernels that stand for the rest: none, each kind of extra work, and all of it.
_TELLING = ((), ("DROPOUT",), ("PROBS",), ("BIAS", "HEAD_MASK", "DROPOUT", "PROBS"))


def _all_cases() -> Iterator[Case]:
    for dtype, head_dim in itertools.product(DTYPES, HEAD_DIMS):
        # Every set of switches where registers are scarcest; elsewhere, and for the twin dtype, the telling ones.
        every = dtype == "bfloat16" and head_dim in (64, 128)
        for switches in _subsets("BIAS", "HEAD_MASK", "DROPOUT", "PROBS") if every else _TELLING:
            # The model packs where there is no bias, and only packed tokens have columns, read with PROBS alone.
            packed = () if "BIAS" in switches else ("CU_SEQLENS", "COLUMNS") if "PROBS" in switches else ("CU_SEQLENS",)
            yield from _attention_cases(dtype, head_dim, *packed, *switches)
        yield from _attention_cases(dtype, head_dim, "CU_SEQLENS", "DROPOUT", "PROBS")
        yield from _attention_cases(dtype, head_dim, "CU_SEQLENS", "COLUMNS", "BIAS", "HEAD_MASK", "DROPOUT", "PROBS")
        yield from _attention_cases(dtype, head_dim, "BIAS", "DROPOUT", "PROBS", aligned=True)
    for dtype, features in itertools.product(DTYPES, _ROW_WIDTHS):
        for switches in (("BIAS", "RESIDUAL"), ("BIAS", "RESIDUAL", "DROPOUT"), ()):
            yield Case("add_layer_norm_forward", dtype, features, switches)
            yield Case("add_layer_norm_backward", dtype, features, switches)
        for switches in (("WORD_TABLE", "DROPOUT"), ()):
            yield Case("embed_forward", dtype, features, switches)
            yield Case("embed_backward", dtype, features, switches)
    for dtype, features in itertools.product(DTYPES, (37, 768)):
        for activation in ACTIVATIONS:
            yield Case("bias_activation_forward", dtype, features, ("BIAS",), activation)
            yield Case("bias_activation_backward", dtype, features, ("BIAS",), activation)
        yield Case("column_sums", dtype, features)


def launch_tiles(case: Case, target: str) -> Tiles:
    """The tiles and compile options with which the host launches a case."""
    if case.kernel.startswith("attention_"):
        kernel = case.kernel.removeprefix("attention_")
        maps = not {"BIAS", "PROBS", "DPROBS"}.isdisjoint(case.flags)
        return attention_table(target, kernel, DTYPES[case.dtype].itemsize, case.width, maps)
    if case.kernel.startswith("bias_activation_"):
        return column_tiles(case.width)
    if case.kernel == "column_sums":
        return column_sums.TILES
    return row_tiles(case.width, FORWARD_ELEMENTS if case.kernel.endswith("_forward") else BACKWARD_ELEMENTS)


def arguments(case: Case, target: str) -> dict[str, Any]:
    """A launch of the case by argument name, like the host's: unallocated tensors, sizes, switches, tiles.

    Raises:
        KeyError: for an argument of the kernel that no table here knows, or a switch that the kernel does not have.
    """
    kernel, dtype = KERNELS[case.kernel], DTYPES[case.dtype]
    known: dict[str, Any] = {f"HAS_{flag}": False for flag in _FLAGS}
    known |= {f"HAS_{flag}": True for flag in case.flags}
    known |= {"HEAD_DIM": case.width, "BLOCK_D": max(16, triton.next_power_of_2(case.width))}
    known |= {"features": case.width, "ACTIVATION": case.activation}
    known |= _SCALARS | _SIZES[case.aligned] | launch_tiles(case, target)
    for name, fixed in _POINTERS.items():
        known[name] = torch.empty(1, dtype=fixed or dtype, device="meta")
    if case.kernel.startswith("attention_"):
        known["bias_ptr"] = torch.empty(1, dtype=torch.float32, device="meta")  # an additive mask, not a parameter
    unknown = [name for name in kernel.arg_names if name not in known]
    unknown += [f"HAS_{flag}" for flag in case.flags if f"HAS_{flag}" not in kernel.arg_names]
    if unknown:
        raise KeyError(f"{case.kernel}: static.py does not know {', '.join(unknown)}: add it to the argument tables")
    return {name: known[name] for name in kernel.arg_names}


def compile_case(case: Case, target: str, tiles: Tiles | None = None) -> KernelReport:
    """Compile one case for one target, as its launch on that GPU would, and read what came out.

    Args:
        case: the configuration.
        target: a key of `TARGETS`.
        tiles: tile sizes and launch options to try instead of the table's.

    Raises:
        RuntimeError: when Triton's interpreter is on, under which there is nothing to compile.
    """
    _require_compiler()
    kernel = KERNELS[case.kernel]
    tiles = launch_tiles(case, target) if tiles is None else tiles
    given = arguments(case, target)
    given |= {name: value for name, value in tiles.items() if name in given}
    # Triton is about to change the default of enable_fp_fusion; the kernels were measured with it.
    options = {"enable_fp_fusion": True} | {name: value for name, value in tiles.items() if name not in given}
    backend = make_backend(TARGETS[target])
    bound, specialization, _ = _binder(case.kernel, target)(**given, **options)
    packed, signature, constexprs, attrs = kernel._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(kernel, signature, constexprs, attrs)
    compiled = triton.compile(source, target=TARGETS[target], options=packed.__dict__)
    read = _read_nvidia if target.startswith("sm_") else _read_amd
    return KernelReport(case=case, target=target, tiles=tiles, shared=compiled.metadata.shared, **read(compiled))


@functools.cache
def _binder(kernel: str, target: str) -> Any:
    """The launcher's own function from arguments to their specialization."""
    fn = KERNELS[kernel]
    return triton.runtime.jit.create_function_from_signature(fn.signature, fn.params, make_backend(TARGETS[target]))


def _require_compiler() -> None:
    if INTERPRETED:
        raise RuntimeError(
            "kernels cannot be compiled under Triton's interpreter: unset TRITON_INTERPRET before fastbert_kernels is "
            "imported"
        )


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def _read_nvidia(compiled: Any) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin)
        sass = _tool("nvdisasm", "-c", cubin)
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    # An instruction is an offset comment, an optional predicate, and the mnemonic.
    opcodes = "\n".join(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE))
    hmma = _count(r"(?m)^HMMA\b", opcodes)
    return {
        "registers": resources["REG"],
        "spills": _count(r"(?m)^(?:STL|LDL)\b", opcodes),
        "stack": resources["STACK"],
        "tensor_core": {80: hmma, 90: _count(r"(?m)^HGMMA\b", opcodes)}.get(
            compiled.metadata.target.arch, _count(r"(?m)^UTC\w*MMA\b", opcodes)
        ),
        "mma_sync": hmma,
        "async_copies": _count(r"(?m)^(?:LDGSTS|UTMALDG)\b", opcodes),
        "wide_loads": _count(r"(?m)^LDG\b.*\.128\b", opcodes),
        "loads": _count(r"(?m)^LDG\b", opcodes),
        "wide_stores": _count(r"(?m)^STG\b.*\.128\b", opcodes),
        "stores": _count(r"(?m)^STG\b", opcodes),
        "exp2": _count(r"(?m)^MUFU\.EX2\b", opcodes),
        "code": opcodes.count("\n") + 1,
    }


def _tool(name: str, *args: str | Path) -> str:
    """Output of one of the CUDA tools in Triton's wheel."""
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *args], check=True, capture_output=True, text=True).stdout


def _read_amd(compiled: Any) -> dict[str, int]:
    text = compiled.asm["amdgcn"]
    metadata = {name: int(value) for name, value in re.findall(r"^\s*-?\s*\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
    vector_memory = r"\b(?:global|buffer|flat)_{}_\w+"
    return {
        "registers": metadata["vgpr_count"],
        "spills": metadata["vgpr_spill_count"],
        "stack": metadata["private_segment_fixed_size"],
        "tensor_core": _count(r"\bv_mfma_\w+", text),
        "mma_sync": 0,
        "async_copies": _count(r"\b(?:global_load_lds|buffer_load)_\w+.*\blds\b", text),
        "wide_loads": _count(vector_memory.format("load") + r"x4\b", text),
        "loads": _count(vector_memory.format("load"), text),
        "wide_stores": _count(vector_memory.format("store") + r"x4\b", text),
        "stores": _count(vector_memory.format("store"), text),
        "exp2": _count(r"\bv_exp_f32\w*", text),
        "code": _count(r"(?m)^\t(?:s|v|ds|global|buffer|flat|scratch)_\w+", text),
    }


def _job(case: Case, target: str) -> KernelReport:
    return compile_case(case, target)


def compile_all(
    jobs: list[tuple[Case, str]], workers: int | None = None
) -> Iterator[tuple[Case, str, KernelReport | Exception]]:
    """Compile cases in processes of their own, in the order in which they finish.

    Args:
        jobs: pairs of a case and a target.
        workers: processes; default one for every CPU.

    Yields:
        The case, the target, and its report or what its compilation raised.
    """
    _require_compiler()
    # Not forked: a process that has run torch has threads.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers or os.cpu_count(), mp_context=context) as pool:
        futures = {pool.submit(_job, *job): job for job in jobs}
        for future in concurrent.futures.as_completed(futures):
            error = future.exception()
            if error is not None and not isinstance(error, Exception):
                raise error
            yield *futures[future], future.result() if error is None else error


_COLUMNS = {
    "tile": lambda r: "x".join(str(r.tiles[key]) for key in ("BLOCK_M", "BLOCK_N")),
    "warps": lambda r: str(r.tiles["num_warps"]),
    "stages": lambda r: str(r.tiles["num_stages"]),
    "regs": lambda r: str(r.registers),
    "spills": lambda r: f"[red]{r.spills}[/]" if r.spills else "0",
    "stack": lambda r: str(r.stack),
    "shared": lambda r: f"{r.shared / 1024:g}K",
    "warps/SM": lambda r: "" if r.warps_per_sm is None else str(r.warps_per_sm),
    "tensor": lambda r: str(r.tensor_core) if r.has_dot else "",
    "async": lambda r: str(r.async_copies),
    "ld128": lambda r: f"{r.wide_loads}/{r.loads}",
    "st128": lambda r: f"{r.wide_stores}/{r.stores}",
    "exp2": lambda r: str(r.exp2),
    "code": lambda r: str(r.code),
}


def table(reports: list[KernelReport]) -> Table:
    """The reports as a table, one row each, by kernel, case and target."""
    out = Table(title="Compiled kernels", caption="ld128, st128: 128-bit accesses of global memory, of all")
    for name in ("kernel", "case", "target"):
        out.add_column(name, no_wrap=True)
    for name in _COLUMNS:
        out.add_column(name, justify="right", no_wrap=True)
    last = ""
    for r in sorted(reports, key=_order):
        if last and r.case.kernel != last:
            out.add_section()
        name = "" if r.case.kernel == last else r.case.kernel
        last = r.case.kernel
        style = "bold red" if r.problems() else None
        words = str(r.case).removeprefix(f"{r.case.kernel} ")
        out.add_row(name, words, r.target, *(column(r) for column in _COLUMNS.values()), style=style)
    return out


def _order(report: KernelReport) -> tuple[Any, ...]:
    case = report.case
    return list(KERNELS).index(case.kernel), case.dtype, case.width, str(case), list(TARGETS).index(report.target)


def main(argv: list[str] | None = None) -> int:
    """The command line; see `python -m fastbert_kernels.static --help`. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastbert_kernels.static", description=__doc__)
    parser.add_argument("--full", action="store_true", help="every configuration that ships, not a representative part")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the reports to a file")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this target; may be repeated")
    parser.add_argument("--kernel", default="", metavar="TEXT", help="only kernels whose name contains this")
    options = parser.parse_args(argv)
    # Wide enough for a row a line where the output is a file.
    console = Console(width=None if sys.stdout.isatty() else 220)
    try:
        _require_compiler()
    except RuntimeError as error:
        console.print(str(error), style="bold red")
        return 2

    chosen = [case for case in cases(options.full) if options.kernel in case.kernel]
    jobs = list(itertools.product(chosen, options.target or TARGETS))
    reports: list[KernelReport] = []
    failures: list[str] = []
    bar = Progress(TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console)
    with bar:
        task = bar.add_task("", total=len(jobs))
        for case, target, result in compile_all(jobs):
            if isinstance(result, KernelReport):
                reports.append(result)
                failures += [f"{target}: {case}: {problem}" for problem in result.problems()]
            else:
                failures.append(f"{target}: {case}: {type(result).__name__}: {result}")
            bar.advance(task)
    console.print(table(reports))
    for failure in failures:
        console.print(failure, style="red", markup=False, highlight=False)
    if options.json is not None:
        ordered = [report.to_json() for report in sorted(reports, key=_order)]
        options.json.write_text(json.dumps({"reports": ordered, "failures": failures}, indent=1) + "\n")
    console.print(f"{len(reports)} kernels compiled, {len(failures)} problems", style="red" if failures else "green")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""What the model of `bench.static` says of a launch with the shipped tiles and with others: microseconds of a call.

    python -m bench.gpu.modelled sm_90 attention_forward bfloat16 64 --up-to 32

prints a line of JSON for each; with `--variants`, for each of the kernels of `attention_variants.py` instead. The model
is the report's: the larger of the floor and the time in which a GPU can issue the instructions. Kernels are compiled by
the host code itself, on a stand-in for the GPU: what is compiled here, a launch on the GPU finds in Triton's cache.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer

from bench.stand_in import as_on_a_gpu
from bench.static.assembly import machine_code
from bench.static.cases import Case
from bench.static.report import Report
from fastbert.tuning.neighbours import neighbours, shipped_tiles
from fastbert.tuning.problems import COMPILED, Sizes, lengths_of, timed_problem, timed_switches
from fastbert.tuning.tuner import compiled_of, loaded, reason_of, run_of
from fastbert_kernels.catalogue import Launch, Tiles, dtype_name
from fastbert_kernels.tuned import in_force

from .attention_variants import CONTENDERS, SHIPPED, attend, attention_variant, drawn_call, variant_tiles

#: Switches of a launch in training, as `Case` has them; what `timed_switches` gives last.
_FLAGS: dict[str, tuple[str, ...]] = {
    "attention_forward": ("CU_SEQLENS", "DROPOUT"),
    "attention_backward_dq": ("CU_SEQLENS", "DROPOUT"),
    "attention_backward_dkv": ("CU_SEQLENS", "DROPOUT"),
    "add_layer_norm_forward": ("BIAS", "RESIDUAL", "DROPOUT"),
    "add_layer_norm_backward": ("BIAS", "DROPOUT"),
    "embed_forward": ("WORD_TABLE", "TOKEN_TYPES", "DROPOUT"),
    "embed_backward": ("DROPOUT",),
    "bias_activation_forward": ("BIAS",),
    "bias_activation_backward": ("BIAS",),
    "feed_forward_forward": ("PRE",),
    "feed_forward_backward": (),
}
#: The kernels that are launched in the same backward pass, and timed together.
TOGETHER = {"attention_backward_dq": "attention_backward_dkv", "attention_backward_dkv": "attention_backward_dq"}
#: Of the calls that are modelled, and timed: long sequences, and a sentence's.
SIZES = Sizes(lengths=(512, 30), tokens=32768, heads=12)
#: Nothing is compiled for the number of tokens.
_COMPILED_SIZES = dataclasses.replace(SIZES, tokens=1024)


def modelled(launch: Launch, target: str) -> Iterator[dict[str, Any]]:
    """A row for the shipped tiles and for each of their neighbours.

    Args:
        launch: one of those of `_FLAGS`.
        target: a key of `bench.static.cases.TARGETS`.
    """
    shipped = shipped_tiles(launch, target)
    for tiles in [shipped, *neighbours(launch, target, shipped)]:
        row = {"launch": str(launch), "tiles": tiles, "shipped": tiles == shipped, "modelled_us": None, "problem": None}
        try:
            row |= _of(launch, target, tiles)
        except Exception as failure:  # tiles that do not compile are a row
            row["problem"] = reason_of(failure)
        yield row


def _of(launch: Launch, target: str, tiles: Tiles) -> dict[str, Any]:
    device = torch.device("cpu")
    with as_on_a_gpu(target), in_force(device, {launch: tiles}):
        COMPILED[launch.kernel].device_caches.clear()  # what is in it after the launch is what was launched
        length = lengths_of(launch, SIZES.lengths)[0]
        problem = timed_problem(launch, timed_switches(launch)[-1], length, _COMPILED_SIZES, device)
        run_of(problem, launch.traits.backward)()
        (compiled,) = loaded(launch.kernel).values()
    activation = "gelu" if "activation" in launch.kernel or "feed_forward" in launch.kernel else None
    batch = SIZES.tokens // length, length
    case = Case(launch.kernel, dtype_name(launch.dtype), launch.width, _FLAGS[launch.kernel], activation, batch=batch)
    report = Report(case, target, tiles, machine_code(compiled, target))
    return _said(report) | {"problem": ", ".join(report.problems()) or None}


def _said(report: Report) -> dict[str, Any]:
    return {
        "modelled_us": max(report.floor.microseconds, report.issue or 0.0),
        "floor_us": report.floor.microseconds,
        "issue_us": report.issue,
        "registers": report.machine.registers,
        "spills": report.machine.spills,
    }


def modelled_variants(launch: Launch, target: str) -> Iterator[dict[str, Any]]:
    """A row for the shipped kernel and for each of the variants, without dropout and with it.

    Args:
        launch: one of `attention_forward`.
        target: a key of `bench.static.cases.TARGETS`.
    """
    for dropout in (False, True):
        for variant in CONTENDERS:
            row = {"launch": str(launch), "variant": variant, "dropout": dropout, "modelled_us": None, "problem": None}
            try:
                row |= _of_variant(launch, target, variant, dropout)
            except Exception as failure:  # what does not compile is a row
                row["problem"] = reason_of(failure)
            yield row


def _of_variant(launch: Launch, target: str, variant: str, dropout: bool) -> dict[str, Any]:
    device, tiles = torch.device("cpu"), variant_tiles(variant, launch, target)
    length = lengths_of(launch, SIZES.lengths)[0]
    lengths = (length,) * (_COMPILED_SIZES.tokens // length)
    kernel: Any = COMPILED[launch.kernel] if variant == SHIPPED else attention_variant
    with as_on_a_gpu(target), in_force(device, {launch: tiles}):
        kernel.device_caches.clear()
        attend(variant, drawn_call(lengths, SIZES.heads, launch.width, launch.dtype, dropout, device), tiles)
        (compiled,) = compiled_of(kernel).values()
    flags = ("CU_SEQLENS", "ORDER", *("DROPOUT",) * dropout)
    case = Case(launch.kernel, dtype_name(launch.dtype), launch.width, flags, batch=(SIZES.tokens // length, length))
    report = Report(case, target, tiles, machine_code(compiled, target))
    spills = "spills" if report.machine.spills or report.machine.stack else None
    return _said(report) | {"resident": report.occupancy.warps // tiles["num_warps"], "problem": spills}


def main(
    target: Annotated[str, typer.Argument(help="The GPU's: sm_80, sm_90, ...")],
    kernel: Annotated[str, typer.Argument(help="A kernel of fastbert_kernels.catalogue.")],
    dtype: Annotated[str, typer.Argument(help="bfloat16, float16 or float32.")],
    width: Annotated[int, typer.Argument(help="What the kernel's tiles are chosen by.")],
    up_to: Annotated[int | None, typer.Option(help="Of attention: the class of short sequences.")] = None,
    variants: Annotated[bool, typer.Option("--variants", help="Of attention_forward: other kernels.")] = False,
) -> None:
    """Print a line of JSON for the shipped tiles, and for each of their neighbours; or for each variant."""
    of = modelled_variants if variants else modelled
    for row in of(Launch(kernel, getattr(torch, dtype), width, up_to=up_to), target):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    typer.run(main)

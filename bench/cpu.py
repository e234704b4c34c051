"""Models on a CPU against their peers, interleaved in one run: `python -m bench.cpu` (or `make bench`).

Outputs, and gradients when training, are compared before anything is timed. The figures are ratios of this run on this
machine and say nothing about a GPU.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from bench.models import CONFIGS, run
from fastbert.benchmark.contenders import named as named_contenders
from fastbert.benchmark.provenance import facts
from fastbert.benchmark.results import Results, show
from fastbert.benchmark.workloads import CPU_WORKLOADS
from fastbert.benchmark.workloads import named as named_workloads
from fastbert.inputs import InputError, parse_dtype

PEERS = ("fastbert", "fastbert-auto", "eager", "sdpa", "compile", "compile-freezing", "onnxruntime", "openvino")

#: The model that everything is measured with where nothing is asked for; with others, and in bfloat16, only the two
#: forward passes: compiling a peer takes longer than timing it.
MODEL = "minilm"
FORWARD = ("full", "ragged")


def main(
    workload: Annotated[list[str] | None, typer.Option(help="A workload; may be repeated. Default: all.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="A contender; may be repeated. Default: all.")] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float32, bfloat16; may be repeated. Default: float32, and a part in bfloat16."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help=f"A model's shape: {', '.join(CONFIGS)}; may be repeated. Default: {MODEL}."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Time for each workload, once three rounds are done.")] = 3.0,
    json_file: Annotated[Path, typer.Option("--json", help="Where the results go.")] = Path("bench-output/cpu.json"),
) -> None:
    """Time forward passes and training steps on full and ragged batches."""
    try:
        workloads = named_workloads(workload or (), CPU_WORKLOADS)
        contenders = named_contenders(peer or PEERS)
        dtypes = [parse_dtype(name) for name in dtype or ("float32", "bfloat16")]
        models = model or [MODEL]
        for unknown in (name for name in models if name not in CONFIGS):
            raise InputError(f"unknown model {unknown!r}: choose from {', '.join(CONFIGS)}")
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    device = torch.device("cpu")
    results = Results(facts(device))
    chosen = workload or dtype
    plan = [(name, w, d) for name in models for d in dtypes for w in workloads if chosen or _measured(name, w.name, d)]
    run(plan, contenders, device, results, json_file, seconds=seconds, rounds=(3, 40))
    console = Console()
    show(console, results.groups())
    about = results.facts
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    console.print(f"{about['device']}, {about['threads']} threads; {versions}; {json_file}", soft_wrap=True)
    if any(group.ours is None for group in results.groups()):
        raise typer.Exit(1)


def _measured(model: str, workload: str, dtype: torch.dtype) -> bool:
    """Whether something is measured where nothing is asked for."""
    return (model == MODEL and dtype == torch.float32) or (
        workload in FORWARD and (model == MODEL or dtype == torch.float32)
    )


if __name__ == "__main__":
    typer.run(main)

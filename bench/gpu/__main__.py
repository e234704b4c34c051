"""The command line: `python -m bench.gpu --help`."""

import io
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from bench.floors import Machine
from bench.models import CONFIGS
from fastbert.benchmark.contenders import named as named_contenders
from fastbert.benchmark.workloads import GPU_WORKLOADS
from fastbert.benchmark.workloads import named as named_workloads
from fastbert.inputs import InputError

from .candidates import CANDIDATES
from .commands import TESTS, TUNING
from .kernels import COMPILED, DEVICE, KERNELS
from .models import MODELS, PARITY, PEERS
from .ops import OPS, SANITIZER
from .sections import LostDeviceError, Plan, Section, run

#: In the order that matters when time is short.
SECTIONS: dict[str, Section] = {
    "device": DEVICE,
    "ops": OPS,
    "sanitizer": SANITIZER,
    "parity": PARITY,
    "kernels": KERNELS,
    "candidates": CANDIDATES,
    "models": MODELS,
    "tune": TUNING,
    "compiled": COMPILED,
    "tests": TESTS,
}
#: Columns of what is not printed on a terminal.
WIDTH = 140


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    section: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(SECTIONS)}. Default: all.")] = None,
    workload: Annotated[list[str] | None, typer.Option(help="Of the section models. Default: all.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="Of the section models. Default: all but the slowest.")] = None,
    model: Annotated[list[str] | None, typer.Option(help=f"{', '.join(CONFIGS)}. Default: base.")] = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="Nothing new is begun after this time.")] = 8.5,
) -> None:
    """Measure on the GPU; what is done is kept, and the same command again goes on from there.

    Exit code 0: nothing is wrong; 1: something is; 2: the run cannot be done; 143: it was ended from outside.
    """
    begin = time.perf_counter()
    try:
        sections, models = list(section or SECTIONS), list(model or ("base",))
        for given, known, what in ((sections, SECTIONS, "section"), (models, CONFIGS, "model")):
            for name in given:
                if name not in known:
                    raise InputError(f"unknown {what} {name!r}: choose from {', '.join(known)}")
        named_workloads(workload or (), GPU_WORKLOADS)
        peers = named_contenders(peer or PEERS)
        if not torch.cuda.is_available():
            raise InputError("no GPU here: torch.cuda.is_available() is False; `make bench` measures on a CPU")
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    signal.signal(signal.SIGTERM, _end)
    machine = Machine(torch.device("cuda", torch.cuda.current_device()))
    plan = Plan(out, list(workload or ()), peers, models, begin + 60 * minutes, machine)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    right = True
    for i, name in enumerate(sections):
        now = time.perf_counter()
        shares = [SECTIONS[later].share for later in sections[i:]]
        plan.until = now + max(0.0, plan.deadline - now) * shares[0] / sum(shares)
        try:
            right &= run(name, SECTIONS[name], plan, console)
        except LostDeviceError as lost:
            console.print(f"the GPU takes no more calls, after {lost}", style="red", markup=False, soft_wrap=True)
            _again(plan)
        except Exception as failure:  # the sections after it still tell something
            console.print(f"{name} failed: {type(failure).__name__}: {failure}", style="red", markup=False)
            right = False
        except (KeyboardInterrupt, SystemExit):
            console.print(f"ended in {name}: what is done is kept", style="yellow", markup=False)
            console.print("next: the same command again, which goes on from there", style="bold")
            raise
    console.print(f"{time.perf_counter() - begin:.0f} s in all", markup=False)
    if not right:
        raise typer.Exit(1)


def _end(*about: Any) -> None:
    raise SystemExit(143)


def _again(plan: Plan) -> None:
    """Go on in a process that has the GPU anew; the step that lost it is kept as failed."""
    minutes = max(0.01, (plan.deadline - time.perf_counter()) / 60)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "bench.gpu", *sys.argv[1:], "--minutes", f"{minutes:.2f}"])


if __name__ == "__main__":
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)  # in a file, too, what was printed is there when the run is killed
    typer.run(main)

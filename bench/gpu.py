"""The GPU run, whole in one command: `python -m bench.gpu --out DIR`.

Sections, in order: facts and the two measured ceilings; the test suite on the device; real weights against Hugging Face
in three dtypes; kernels against their floors and peers; models against their peers. Each writes its own JSON when it is
done, models after every workload: an interrupted run keeps what is finished, and started again it goes on from there.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.floors import Machine
from bench.kernel_cases import CASES
from bench.kernels import measure
from bench.models import CONFIGS, Item, run
from fastbert.benchmark.contenders import named as named_contenders
from fastbert.benchmark.provenance import facts
from fastbert.benchmark.results import Results, save_json, show
from fastbert.benchmark.workloads import GPU_WORKLOADS
from fastbert.benchmark.workloads import named as named_workloads
from fastbert.cli.common import CHECKPOINT_VARIABLE, LOCAL_CHECKPOINT
from fastbert.inputs import InputError
from fastbert.verify.compare import compare

PEERS = ("fastbert", "fastbert-auto", "fastbert-graphed", "eager", "sdpa", "flash", "compile", "compile-max")
#: Of the section parity.
CHECKPOINT = Path(os.environ.get(CHECKPOINT_VARIABLE, LOCAL_CHECKPOINT))
#: Columns of what is not printed on a terminal.
WIDTH = 140
#: Rounds of a workload of models: fewest and most.
ROUNDS = (10, 200)


@dataclasses.dataclass
class Plan:
    """What a run was asked for, and when it must end."""

    out: Path
    workloads: list[str]
    peers: list[str]
    model: list[str]
    deadline: float
    machine: Machine

    @property
    def device(self) -> torch.device:
        return self.machine.device

    def left(self) -> float:
        """Seconds left."""
        return self.deadline - time.perf_counter()


def device_section(plan: Plan) -> dict[str, Any]:
    """Facts and ceilings."""
    return {"facts": facts(plan.device) | {"ceilings": plan.machine.facts(torch.float32, torch.bfloat16)}}


def tests_section(plan: Plan) -> dict[str, Any]:
    """The test suite, in processes of its own; what it printed last, and how it ended."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
        "-n",
        "8",
        "--dist",
        "loadfile",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=max(30.0, plan.left() / 2)
        )
        code, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        code, output = 124, (late.stdout or b"").decode(errors="replace") if isinstance(late.stdout, bytes) else ""
    lines = output.strip().splitlines()
    return {
        "facts": facts(plan.device),
        "command": " ".join(command[1:]),
        "exit_code": code,
        "seconds": time.perf_counter() - begin,
        "last_lines": lines[-40:],
    }


def parity_section(plan: Plan) -> dict[str, Any]:
    """A real checkpoint against Hugging Face, outputs and gradients, in three dtypes."""
    if not (CHECKPOINT / "config.json").is_file():
        raise InputError(
            f"no checkpoint in {str(CHECKPOINT)!r}: `make demo` fetches one, {CHECKPOINT_VARIABLE} names another"
        )
    reports = [
        compare(str(CHECKPOINT), dtype=dtype, device=str(plan.device), train=True, repeats=0)
        for dtype in ("float32", "bfloat16", "float16")
    ]
    return {"facts": facts(plan.device), "reports": [report.to_dict() for report in reports]}


def kernels_section(plan: Plan) -> dict[str, Any]:
    """Every kernel forward and backward, in bfloat16."""
    rows = []
    for case in track(CASES.values(), "kernels", console=Console(stderr=True)):
        rows += list(measure(case, torch.bfloat16, plan.device, plan.machine, deadline=plan.deadline))
    about = facts(plan.device) | {"ceilings": plan.machine.facts(torch.bfloat16)}
    return {"facts": about, "rows": [dataclasses.asdict(row) for row in rows]}


def models_plan(workloads: list[str], models: list[str]) -> list[Item]:
    """What to run, what the goals are set for first; neighbours share what is compiled for them."""
    chosen = named_workloads(workloads, GPU_WORKLOADS)
    kinds = sorted(chosen, key=lambda workload: workload.task == "finetune")
    return [(model, workload, torch.bfloat16) for model in models for workload in kinds]


def models_section(plan: Plan) -> Results:
    """The models; saves itself after every workload."""
    results = Results(facts(plan.device))
    items = models_plan(plan.workloads, plan.model)
    path = plan.out / "models.json"
    run(items, plan.peers, plan.device, results, path, seconds=3.0, rounds=ROUNDS, deadline=plan.deadline)
    return results


SECTIONS: dict[str, Callable[[Plan], Any]] = {
    "device": device_section,
    "tests": tests_section,
    "parity": parity_section,
    "kernels": kernels_section,
    "models": models_section,
}


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    section: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(SECTIONS)}. Default: all.")] = None,
    workload: Annotated[list[str] | None, typer.Option(help="Of the section models. Default: all.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="Of the section models. Default: all.")] = None,
    model: Annotated[list[str] | None, typer.Option(help=f"{', '.join(CONFIGS)}. Default: base.")] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="Nothing new is begun after this time.")] = 8.5,
) -> None:
    """Measure on the GPU. Exit code 1: something was wrong; 2: the run cannot be done."""
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
    machine = Machine(torch.device("cuda", torch.cuda.current_device()))
    plan = Plan(out, list(workload or ()), peers, models, time.perf_counter() + 60 * minutes, machine)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    ok = True
    for name in sections:
        path = out / f"{name}.json"
        if path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("finished"):
            console.print(f"{name}: finished before, kept in {path}", markup=False)
            continue
        console.rule(name)
        begin = time.perf_counter()
        try:
            content = SECTIONS[name](plan)
        except Exception as failure:  # the sections after it still tell something
            console.print(f"{name} failed: {type(failure).__name__}: {failure}", style="red", markup=False)
            ok = False
            continue
        if isinstance(content, Results):
            show(console, content.groups())
            ok &= all(group.ours is not None for group in content.groups())
        else:
            save_json(path, content | {"finished": True})
            ok &= _tell(console, name, content)
        console.print(f"{name}: {time.perf_counter() - begin:.0f} s, {path}", markup=False)
    if not ok:
        raise typer.Exit(1)


def _tell(console: Console, section: str, content: dict[str, Any]) -> bool:
    """Print a section's result; whether all of it is right."""
    if section == "tests":
        console.print("\n".join(content["last_lines"]), markup=False)
        return bool(content["exit_code"] == 0)
    if section == "parity":
        checks = [check for report in content["reports"] for check in report["outputs"] + report["gradients"]]
        broken = [check for check in checks if not check["ok"]]
        console.print(f"{len(checks) - len(broken)} of {len(checks)} tensors within their bounds")
        console.print_json(data=broken) if broken else None
        return not broken
    if section == "kernels":
        console.print(_kernel_table(content["rows"]))
        return all(row["times"] for row in content["rows"] if row["contender"] == "fastbert")
    console.print_json(data=content["facts"])
    return True


def _kernel_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("kernel", "case", "contender"):
        table.add_column(name, overflow="fold")
    for name in ("median us", "20-80%", "TFLOP/s", "GB/s", "T/Floor", "/ fastbert"):
        table.add_column(name, justify="right", no_wrap=True)
    ours: dict[tuple[str, str], float] = {
        (row["kernel"], row["case"]): row["times"]["median"]
        for row in rows
        if row["contender"] == "fastbert" and row["times"]
    }
    for row in rows:
        cells = [row["kernel"], row["case"], row["contender"]]
        if row["times"] is None:
            table.add_row(*cells[:2], f"{row['contender']}: {row['problem'][:60]}")
            continue
        times, mine = row["times"], ours.get((row["kernel"], row["case"]))
        table.add_row(
            *cells,
            f"{1e6 * times['median']:.1f}",
            f"{1e6 * times['q20']:.1f}-{1e6 * times['q80']:.1f}",
            f"{row['flops'] / times['median'] / 1e12:.0f}",
            f"{row['bytes'] / times['median'] / 1e9:.0f}",
            f"{times['median'] / row['floor']:.2f}",
            "-" if mine is None else f"{times['median'] / mine:.2f}x",
        )
    return table


if __name__ == "__main__":
    typer.run(main)

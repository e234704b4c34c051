"""The command line: `python -m bench.static --help`."""

import json
from pathlib import Path
from typing import Annotated

import triton
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastbert_kernels.catalogue import Tiles

from . import baseline, execute, fused
from .alternatives import alternatives
from .assembly import MachineCode, compile_all, require_compiler
from .cases import BATCH, DEVICES, TARGETS, Case, cases, compiles, launch_tiles
from .report import Report
from .table import LEGEND, reasons, table

_Job = tuple[Case, str, Tiles]

app = typer.Typer(add_completion=False)


@app.command()
def main(
    full: Annotated[
        bool, typer.Option("--full", help="Every configuration that ships, which takes hours; not just the main ones.")
    ] = False,
    target: Annotated[
        list[str] | None, typer.Option(help=f"Only this target, of {', '.join(TARGETS)}; may be repeated.")
    ] = None,
    kernel: Annotated[
        str, typer.Option(metavar="TEXT", help="Only cases with these words, e.g. 'attention_forward 64 dropout'.")
    ] = "",
    other_tiles: Annotated[
        bool, typer.Option("--alternatives", help="Compile each case with neighbouring tiles too, the shipped marked.")
    ] = False,
    run: Annotated[
        bool,
        typer.Option("--execute", help="Run the cases' code for sm_80 on this machine too, and count what it does."),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", dir_okay=False, help="Also write everything to a file.")
    ] = None,
    write_baseline: Annotated[
        bool, typer.Option("--write-baseline", help="Accept what the main cases compile to as the new baseline.")
    ] = False,
) -> None:
    """Compile the kernels for GPUs that are not here and report what came out beside the least it could take.

    Exit code 1 where a kernel spills, or falls short of the baseline or of a limit without a reason.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=250)  # a line for each row, in a file or a pipe
    targets = target or list(TARGETS)
    chosen = [case for case in cases(full) if case.matches(kernel)]
    if unknown := [name for name in targets if name not in TARGETS]:
        raise typer.BadParameter(f"unknown target {', '.join(unknown)}: there are {', '.join(TARGETS)}")
    if not chosen:
        raise typer.BadParameter(f"no case has the words {kernel!r}: see the table for what there is")
    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {json_file.parent} to write {json_file.name} to")
    if write_baseline and (full or target or kernel or other_tiles):
        raise typer.BadParameter("--write-baseline takes all the main cases and nothing else")
    try:
        require_compiler()
    except RuntimeError as error:
        console.print(str(error), style="bold red")
        raise typer.Exit(2) from None

    pairs = [(case, name) for case in chosen for name in targets if compiles(case, name)]
    pairs.sort(key=lambda pair: pair[0].order())
    jobs: list[_Job] = [
        (case, name, tiles)
        for case, name in pairs
        for tiles in (alternatives(case, name) if other_tiles else [launch_tiles(case, name)])
    ]
    reports, failures = _compile(jobs)
    shipped = [report for report in reports if report.tiles == launch_tiles(report.case, report.target)]
    failures += [f"{r.target}: {r.case}: {problem}" for r in shipped for problem in r.problems()]
    losses, not_compared = _compare(shipped, write=write_baseline and not failures)

    console.print(table(reports, "What the kernels compile to", shipped if other_tiles else ()))
    console.print(LEGEND.format(batch="{} x {}".format(*BATCH), devices=", ".join(DEVICES[name] for name in targets)))
    for line in [*reasons(reports), *(fused.line(r) for r in shipped if fused.is_estimated(r))]:
        console.print(line)
    if run:
        counted = execute.execute(chosen)
        console.print(execute.table(counted))
        console.print(execute.LEGEND)
        for line in execute.worst(counted):
            console.print(line, markup=False, highlight=False)
    if not_compared:
        console.print(not_compared, style="yellow")
    else:
        console.print(f"compared with {baseline.FILE.name}, of Triton {triton.__version__}")
    for line in failures + losses:
        console.print(line, style="red", markup=False, highlight=False)
    if json_file is not None:
        everything = {
            "triton": triton.__version__,
            "reports": [report.to_json() for report in reports],
            "failures": failures,
            "losses": losses,
            "not_compared": not_compared,
        }
        json_file.write_text(json.dumps(everything, indent=1) + "\n")
    bad = len(failures) + len(losses)
    console.print(f"{len(reports)} kernels compiled, {bad} problems", style="red" if bad else "green")
    raise typer.Exit(1 if bad else 0)


def _compare(reports: list[Report], write: bool) -> tuple[list[str], str | None]:
    """What is worse than in the baseline, and why it was not compared, if it was not. Writes the baseline if asked."""
    if write:
        baseline.write(reports)
    try:
        return baseline.losses(reports), None
    except RuntimeError as error:
        return [], str(error)


def _compile(jobs: list[_Job]) -> tuple[list[Report], list[str]]:
    """Reports in the order of the jobs, and what failed to compile. Shows progress on stderr."""
    machines: dict[int, MachineCode] = {}
    failures: list[str] = []
    console = Console(stderr=True)
    columns = TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(jobs))
        for done, (number, result) in enumerate(compile_all(jobs), start=1):
            case, name, tiles = jobs[number]
            if isinstance(result, MachineCode):
                machines[number] = result
            else:
                failures.append(f"{name}: {case}, {tiles}: {type(result).__name__}: {result}")
            bar.advance(task)
            if not console.is_terminal and done * 10 // len(jobs) > (done - 1) * 10 // len(jobs):
                console.print(f"compiled {done} of {len(jobs)}")
    return [Report(*jobs[number], machines[number]) for number in sorted(machines)], failures


if __name__ == "__main__":
    app(prog_name="python -m bench.static")

"""Tables and pictures of the committed results, and the figures in docs: `python -m bench.report`.

It reads every device under bench/results and writes README.md and the pictures there, and what stands between the two
marks in docs/benchmarking.md. With --check it writes nothing and ends with 1 where these differ from the results.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import curves
from bench.collect import Device, ResultsError, collect
from bench.roofline import roofline
from bench.tables import page, provenance, summary_block
from fastbert.benchmark.plots import speedup_bars

RESULTS = Path("bench/results")
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

SPEEDUP, TIME, MEMORY, ROOFLINE = PICTURES = ("speedup.png", "time.png", "memory.png", "roofline.png")

#: Draws a picture into a file, with a note about where it comes from.
Draw = Callable[[Path], Path]


@dataclasses.dataclass
class Pictures:
    """Of one device.

    Attributes:
        drawn: file name -> what draws it.
        absent: the pictures that cannot be drawn, and why.
    """

    drawn: dict[str, Draw]
    absent: list[str]


def pictures(device: Device) -> Pictures:
    """What can be drawn of a device's results."""
    found = Pictures({}, [])
    groups = [] if device.models is None else device.models.groups()
    about = {} if device.models is None else device.models.facts
    note = _note(device.facts)
    if any(group.ours is not None and group.best_peer is not None for group in groups):
        found.drawn[SPEEDUP] = lambda path: speedup_bars(groups, path, note=note)
    else:
        found.absent.append("ratios to peers (no workload has times of fastbert and of a peer)")
    if times := curves.time_panels(groups):
        found.drawn[TIME] = functools.partial(curves.time_by_tokens, times, note=note)
    else:
        found.absent.append("time against tokens (no task was timed with several numbers of tokens)")
    if memory := curves.memory_panels(groups):
        found.drawn[MEMORY] = functools.partial(curves.memory_by_length, memory, note=note)
    else:
        on_cpu = about.get("device_type") == "cpu"
        why = "nobody counts it on a CPU" if on_cpu else "no task was measured with several lengths"
        found.absent.append(f"memory against sequence length ({why})")
    kernels = device.kernels
    if (
        kernels is not None
        and "copy_bytes" in (kernels.facts.get("ceilings") or {})
        and any(r.times for r in kernels.rows)
    ):
        found.drawn[ROOFLINE] = functools.partial(roofline, kernels, note=_note(kernels.facts))
    else:
        found.absent.append("the roofline of the kernels (no kernel was timed under measured ceilings)")
    return found


def _note(facts: dict[str, Any]) -> str:
    return f"{facts['device']}, {provenance(facts, short=True)}"


def texts(folder: Path, summary: Path, devices: list[Device]) -> dict[Path, str]:
    """What the files that are made of the results must hold.

    Args:
        folder: of the results.
        summary: the page of docs, with both marks.
        devices: what is in the folder.

    Raises:
        ResultsError: when that page cannot be read or has not both marks, once each.
    """
    try:
        around = summary.read_text(encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"cannot read {str(summary)!r}: {error.strerror}") from error
    if around.count(BEGIN) != 1 or around.count(END) != 1 or around.index(BEGIN) > around.index(END):
        raise ResultsError(
            f"{str(summary)!r} needs {BEGIN} and, after it, {END}, once each: the figures go between them"
        )
    found = {device.folder: pictures(device) for device in devices}
    everything = page(
        devices,
        {name: [f"{name}/{picture}" for picture in pictures.drawn] for name, pictures in found.items()},
        {name: pictures.absent for name, pictures in found.items()},
    )
    way = Path(os.path.relpath(folder, summary.parent)).as_posix()
    links = {name: f"{way}/{name}/{SPEEDUP}" for name, pictures in found.items() if SPEEDUP in pictures.drawn}
    block = summary_block(devices, links, f"{way}/README.md")
    before, after = around.split(BEGIN)[0], around.split(END)[1]
    return {folder / "README.md": everything, summary: f"{before}{BEGIN}\n{block}{END}{after}"}


def check(folder: Path, summary: Path) -> list[str]:
    """Where the docs, the tables and the pictures disagree with the results: one line each, none when all is well.

    A picture counts as right when it is there: it is drawn together with the tables.
    """
    devices = collect(folder)
    wrong = [
        f"{path} does not agree with the results"
        for path, text in texts(folder, summary, devices).items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    for device in devices:
        drawn = pictures(device).drawn
        for path in (folder / device.folder / name for name in PICTURES):
            if path.is_file() != (path.name in drawn):
                wrong.append(f"{path} is {'missing' if path.name in drawn else 'not drawn from the results'}")
    return wrong


def write(folder: Path, summary: Path) -> list[Path]:
    """Write tables, pictures and the figures in docs, and say which; pictures that can no longer be drawn go."""
    devices = collect(folder)
    content = texts(folder, summary, devices)
    written = []
    for device in devices:
        drawn = pictures(device).drawn
        for name in PICTURES:
            if name not in drawn:
                (folder / device.folder / name).unlink(missing_ok=True)
        written += [draw(folder / device.folder / name) for name, draw in drawn.items()]
    for path, text in content.items():
        path.write_text(text, encoding="utf-8")
    return [*written, *content]


def main(
    folder: Annotated[Path, typer.Argument(help="Holds a folder of results for each device.")] = RESULTS,
    summary: Annotated[Path, typer.Option(help="Whose figures to fill in.")] = Path("docs/benchmarking.md"),
    only_check: Annotated[bool, typer.Option("--check", help="Write nothing; exit code 1 where files differ.")] = False,
) -> None:
    """Turn results into tables, pictures and the figures in docs. Exit code 2: there is something else than results."""
    try:
        if only_check:
            if wrong := check(folder, summary):
                typer.echo("\n".join(wrong) + "\nrun `python -m bench.report` and commit what it writes", err=True)
                raise typer.Exit(1)
            typer.echo("docs, tables and pictures agree with the results")
        else:
            typer.echo("\n".join(map(str, write(folder, summary))))
    except ResultsError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)

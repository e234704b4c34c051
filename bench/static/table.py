"""The report as a table for people."""

from collections.abc import Callable, Collection

from rich.table import Table

from .report import REASONS, Report

_COLUMNS: dict[str, Callable[[Report], str]] = {
    "tile": lambda r: f"{r.tiles['BLOCK_M']}x{r.tiles['BLOCK_N']}",
    "warps": lambda r: str(r.tiles["num_warps"]),
    "stages": lambda r: str(r.tiles["num_stages"]),
    "regs": lambda r: str(r.machine.registers),
    "spills": lambda r: str(r.machine.spills),
    "shared": lambda r: f"{r.machine.shared / 1024:.1f}K",
    "resident": lambda r: f"{r.occupancy.warps} {r.occupancy.share:.0%}",
    "limit": lambda r: r.occupancy.limit,
    "tensor": lambda r: str(r.machine.tensor_core) if r.machine.dots else "",
    "dots": lambda r: f"{r.machine.own_dots}/{r.machine.dots}" if r.machine.dots else "",
    "async": lambda r: str(r.machine.async_copies),
    "loops": lambda r: _of(sum(loop.async_copies > 0 for loop in r.machine.loops), len(r.machine.loops)),
    "ld128": lambda r: _of(r.machine.wide_loads + r.machine.wide_async, r.machine.loads + r.machine.async_copies),
    "st128": lambda r: _of(r.machine.wide_stores, r.machine.stores),
    "exp2": lambda r: str(r.machine.exp2),
    "mufu": lambda r: str(r.machine.transcendental),
    "code": lambda r: str(r.machine.code),
    "floor us": lambda r: f"{r.floor.microseconds:.1f}",
    "bound": lambda r: r.floor.bound,
    "issue us": lambda r: "" if r.issue is None else f"{r.issue:.1f}",
    "why": lambda r: ", ".join([f"[red]{problem}[/]" for problem in r.problems()] + r.reasons()),
}

_LEFT = ("limit", "bound", "why")

LEGEND = (
    "resident: warps a multiprocessor holds, and of the most it can; limit: what there is no more of. "
    "tensor: tensor-core instructions; dots: products on the target's own tensor cores, of all. "
    "async: copies to shared memory; loops: those with asynchronous copies, of those that read. "
    "ld128, st128: accesses of 128 bits, of all. exp2, mufu: exponentials, all of the special-function units. "
    "floor: the least time of a call with {batch} tokens, or what the case names, on {devices}, and what sets it; "
    "issue: the time in which its instructions can be issued there."
)


def _of(some: int, every: int) -> str:
    return f"{some}/{every}" if every else ""


def table(reports: Collection[Report], title: str, shipped: Collection[Report] = ()) -> Table:
    """Reports as a table, one row each, in the order given, a section for each kernel.

    Args:
        reports: the rows.
        title: of the table.
        shipped: rows to mark as what ships, where others are alternatives.
    """
    out = Table(title=title, title_justify="left", header_style="bold")
    out.add_column("case", no_wrap=True)
    out.add_column("target", no_wrap=True)
    for name in _COLUMNS:
        out.add_column(name, justify="left" if name in _LEFT else "right", no_wrap=name != "why")
    last = ""
    for report in reports:
        if report.case.kernel != last:
            out.add_section()
            out.add_row(f"[bold]{report.case.kernel}[/]")
            last = report.case.kernel
        style = "bold red" if report.problems() else "bold" if report in shipped else None
        name = report.case.words + (" [green]shipped[/]" if report in shipped else "")
        out.add_row(f"  {name}", report.target, *(column(report) for column in _COLUMNS.values()), style=style)
    return out


def reasons(reports: Collection[Report]) -> list[str]:
    """The reasons that rows give, each told in full, in the order of `REASONS`."""
    given = {reason for report in reports for reason in report.reasons()}
    return [f"{reason}: {text}" for reason, text in REASONS.items() if reason in given]

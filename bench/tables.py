"""Committed results as Markdown: one page with everything, and the short tables of docs/benchmarking.md."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.collect import Device, KernelGroup, Kernels, median
from fastbert.benchmark.contenders import CONTENDERS
from fastbert.benchmark.measure import Row
from fastbert.benchmark.plots import cut
from fastbert.benchmark.results import Group, Results
from fastbert.benchmark.timing import Times

_MAIN_VERSIONS = ("torch", "triton", "transformers")

NONE_YET = "No results are committed yet."

_LEGEND = """\
Contenders take turns in one run, and are timed only after what they return was compared with plain PyTorch in float32.
**Ratio** is the contender's median time over fastbert's: under 1, fastbert is the slower one, and the cell says so.
**T/Floor** is a contender's median time over the least time that the work can take at the limits measured on the same
device in the same run: matrix products of the vendor's library at the exact shapes, the bytes of embeddings, norms and
optimizer at the speed of a copy, attention, as any kernel, at the slower of both. Padding is not work. A peer's T/Floor
is the highest ratio that anyone could have against it. **MiB** is what one run allocates at its peak beyond weights,
gradients and optimizer state."""

_INTRODUCTION = """\
Each ratio is a peer's median time over fastbert's in one interleaved run: above 1, fastbert is faster. T/Floor is
fastbert's time over the least that the work can take at the device's own measured limits."""


def summary_block(devices: Sequence[Device], link: Mapping[str, str], page: str) -> str:
    """What the page of docs shows.

    Args:
        devices: the results.
        link: folder of a device -> address of its picture of ratios, where it has one.
        page: address of the page with everything.
    """
    shown = [(device, device.models) for device in devices if device.models is not None]
    if not shown:
        return f"{NONE_YET}\n"
    parts = [_INTRODUCTION]
    for device, results in shown:
        parts.append(f"**{results.facts['device']}**: {provenance(results.facts, short=True)}.{_interrupted(results)}")
        parts.append(_summary(results.groups()))
        if device.folder in link:
            parts.append(f"![Ratios on {results.facts['device']}]({link[device.folder]})")
    parts.append(f"[Every contender, with quantiles, memory and errors]({page}).")
    return "\n\n".join(parts) + "\n"


def page(devices: Sequence[Device], pictures: Mapping[str, Iterable[str]], absent: Mapping[str, Iterable[str]]) -> str:
    """The page with everything.

    Args:
        devices: the results.
        pictures: folder of a device -> addresses of its pictures.
        absent: folder of a device -> which pictures it has not, and why.
    """
    parts = ["# Results", "Written by `python -m bench.report` from the JSON files beside it; not by hand."]
    if not devices:
        parts.append(NONE_YET)
    else:
        parts.append(_LEGEND)
    for device in devices:
        parts.append(f"## {device.facts['device']}")
        parts += [f"![{address}]({address})" for address in pictures[device.folder]]
        parts += [f"Not drawn: {'; '.join(absent[device.folder])}."] if absent[device.folder] else []
        if device.models is not None:
            parts += _models(device.models)
        if device.kernels is not None:
            parts += _kernels(device.kernels)
    return "\n\n".join(parts) + "\n"


def provenance(facts: Mapping[str, Any], *, short: bool = False) -> str:
    """Date, commit, threads or driver, versions; in short, without the driver and with the main versions only."""
    commit = facts.get("commit") or "unknown"
    changed = " with changes" if commit.endswith("+") else ""
    found = [facts["date"][:10], f"commit {commit[:7]}{changed}"]
    if facts.get("threads"):
        found.append(f"{facts['threads']} thread{'s' if facts['threads'] > 1 else ''}")
    driver = {} if short else facts.get("driver") or {}
    found += [f"{name.replace('_', ' ').replace('.', ' ')} {value}" for name, value in driver.items()]
    versions = facts["versions"]
    return ", ".join(found + [f"{name} {versions[name]}" for name in versions if not short or name in _MAIN_VERSIONS])


def _ceilings(facts: Mapping[str, Any]) -> list[str]:
    found = dict(facts.get("ceilings") or {})
    copy = found.pop("copy_bytes", None)
    limits = [] if copy is None else [f"copy {_si(copy)}B/s"]
    limits += [f"product in {name.removeprefix('flops_')} {_si(rate)}FLOP/s" for name, rate in found.items()]
    return [f"Measured limits: {', '.join(limits)}."] if limits else []


def _si(value: float) -> str:
    for size, prefix in ((1e12, "T"), (1e9, "G")):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def _interrupted(results: Results | Kernels) -> str:
    return "" if results.finished else " **The run was interrupted: what came after is missing.**"


def _models(results: Results) -> list[str]:
    parts = ["### Models", f"{provenance(results.facts)}.{_interrupted(results)}", *_ceilings(results.facts)]
    kinds: dict[str, list[Group]] = {}
    for group in results.groups():
        row = group.rows[0]
        kinds.setdefault(f"{row.model}, {row.dtype}", []).append(group)
    for kind, groups in kinds.items():
        columns = ("workload", "contender", "median ms", "20-80%", "ratio", "T/Floor", "MiB", "error", "")
        rows = [cells for group in groups for cells in _model_rows(group)]
        parts += [f"#### {kind}", _table(columns, rows, left=(0, 1, 8))]
    return parts


def _model_rows(group: Group) -> Iterable[list[str]]:
    for i, row in enumerate(group.rows):
        shape = f"{row.batch} x {row.seq}, {row.tokens:,} tokens (fill {row.fill:.0%})"
        heading = f"**{row.workload}**: {row.task}, {shape}" if i == 0 else ""
        cells = [heading, CONTENDERS[row.contender]]
        if row.times is None:
            yield [*cells, *["-"] * 5, _error(row.error), _why(row.problem)]
            continue
        ours = row.contender == "fastbert"
        yield [
            *cells,
            *_times(row.times, 1e3),
            "" if ours else _ratio(group.speedup(row.contender)),
            _floor(row),
            "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}",
            _error(row.error),
            group.verdict if ours else "",
        ]


def _kernels(kernels: Kernels) -> list[str]:
    parts = ["### Kernels", f"{provenance(kernels.facts)}.{_interrupted(kernels)}", *_ceilings(kernels.facts)]
    columns = ("kernel", "contender", "median us", "20-80%", "ratio", "TFLOP/s", "GB/s", "T/Floor", "error", "")
    rows = [cells for group in kernels.groups() for cells in _kernel_rows(group)]
    return [*parts, _table(columns, rows, left=(0, 1, 9))]


def _kernel_rows(group: KernelGroup) -> Iterable[list[str]]:
    ours = group.ours
    for i, row in enumerate(group.rows):
        cells = [f"**{row.kernel}**: {row.case}, {row.dtype}" if i == 0 else "", row.contender]
        if row.times is None:
            yield [*cells, *["-"] * 6, _error(row.error), _why(row.problem)]
            continue
        ratio = "" if row is ours else _ratio(None if ours is None else row.times.median / median(ours))
        yield [
            *cells,
            *_times(row.times, 1e6),
            ratio,
            f"{row.flops / row.times.median / 1e12:.0f}" if row.flops else "-",
            f"{row.bytes / row.times.median / 1e9:,.0f}",
            f"{row.times.median / row.floor:.2f}",
            _error(row.error),
            "",
        ]


def _summary(groups: Iterable[Group]) -> str:
    rows = []
    for group in groups:
        row = group.rows[0]
        cells = [f"{row.workload}: {row.model}, {row.dtype}"]
        if group.ours is None:
            ours = next((row for row in group.rows if row.contender == "fastbert"), None)
            why = "not run" if ours is None else _why(ours.problem)
            rows.append([*cells, "-", "-", "-", f"fastbert: {why}", "-"])
            continue
        cells += [_ratio(group.speedup(name)) for name in ("eager", "sdpa", "compile")]
        peer = group.best_peer
        best = "-" if peer is None else f"{CONTENDERS[peer.contender]} {_ratio(group.speedup(peer.contender))}"
        rows.append([*cells, best, _floor(group.ours)])
    named = [CONTENDERS[name] for name in ("eager", "sdpa", "compile")]
    return _table(("workload", *named, "best peer", "T/Floor"), rows, left=(0, 4))


def _times(times: Times, unit: float) -> tuple[str, str]:
    median, q20, q80 = (unit * seconds for seconds in (times.median, times.q20, times.q80))
    form = ",.1f" if median >= 100 else ".2f" if median >= 1 else ".3g"
    return f"{median:{form}}", f"{q20:{form}}-{q80:{form}}"


def _ratio(ratio: float | None) -> str:
    """A loss is told apart from a win by a word."""
    if ratio is None:
        return "-"
    return f"{ratio:.2f}x" if ratio >= 1 else f"**{ratio:.2f}x, slower**"


def _floor(row: Row) -> str:
    return "-" if row.floor is None or row.times is None else f"{row.times.median / row.floor:.2f}"


def _error(error: float | None) -> str:
    return "-" if error is None else "NaN" if math.isnan(error) else f"{error:.0e}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int]) -> str:
    """A Markdown table; the columns that are not `left` are aligned right."""
    rules = [":--" if i in left else "--:" for i in range(len(columns))]
    return "\n".join("| " + " | ".join(map(_cell, cells)) + " |" for cells in (columns, rules, *rows))


def _why(problem: str | None) -> str:
    """Why there is no time, shortened and as text: a failure may hold anything."""
    return re.sub(r"([\\`*_\[\]<>#~])", r"\\\1", cut(" ".join((problem or "not timed").split()), 120))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")

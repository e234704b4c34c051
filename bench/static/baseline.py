"""The committed baselines: what the representative cases compiled to when last accepted, and what may not get worse.

There is one for each Triton that kernels were chosen with, in a file that the version's first two numbers name.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import triton

from .cases import TARGETS, cases
from .report import Report

FOLDER = Path(__file__).parent
COMMAND = "python -m bench.static --write-baseline"


def file_of(version: str) -> Path:
    """The baseline of a version of Triton, which need not exist."""
    return FOLDER / f"baseline-{'.'.join(version.split('.')[:2])}.json"


#: That of the Triton that runs.
FILE = file_of(triton.__version__)

#: What may not fall, by its name in the file; of all else, only spills may not rise.
_KEPT = {
    "tensor": "tensor-core instructions",
    "dots": "products on the target's own tensor cores",
    "async": "asynchronous copies",
    "loops": "loops with asynchronous copies",
    "ld128": "128-bit loads",
    "st128": "128-bit stores",
}


def entry(report: Report) -> dict[str, Any]:
    """What the baseline keeps of a report."""
    machine = report.machine
    return {
        "tiles": "{BLOCK_M}x{BLOCK_N}, {num_warps} warps, {num_stages} stages".format(**report.tiles),
        "registers": machine.registers,
        "shared": machine.shared,
        "spills": machine.spills,
        "tensor": machine.tensor_core,
        "dots": machine.own_dots,
        "async": machine.async_copies,
        "loops": sum(loop.async_copies > 0 for loop in machine.loops),
        "ld128": machine.wide_loads + machine.wide_async,
        "st128": machine.wide_stores,
    }


def write(reports: Collection[Report], file: Path = FILE) -> None:
    """Write the baseline: one line a case, in a stable order."""
    lines = [f"  {json.dumps(_name(r))}: {json.dumps(entry(r))}" for r in sorted(reports, key=Report.order)]
    file.write_text(f'{{\n  "triton": "{triton.__version__}",\n' + ",\n".join(lines) + "\n}\n")


def read(file: Path = FILE) -> tuple[str, dict[str, dict[str, Any]]]:
    """The version of Triton that the baseline was compiled with, and its entries by name."""
    entries = json.loads(file.read_text())
    return entries.pop("triton"), entries


def losses(reports: Collection[Report], file: Path = FILE) -> list[str]:
    """What is worse than in the baseline, each told with the case, both values, and the way to accept it.

    Only the cases of the baseline's kind are looked at, the representative ones. Registers and shared memory may
    change: what matters of them are spills and the limit, which `Report.problems` tells.

    Raises:
        RuntimeError: when there is no baseline, or it was compiled with another version of Triton.
    """
    if not file.exists():
        there = ", ".join(sorted(other.name for other in file.parent.glob("baseline-*.json")))
        raise RuntimeError(f"there is no {file.name} to compare with, only {there or 'nothing'}: {COMMAND}")
    version, entries = read(file)
    if version != triton.__version__:
        raise RuntimeError(
            f"the baseline is of Triton {version} and this is {triton.__version__}, whose compiler differs: "
            "not compared"
        )
    found = []
    known = set(cases(full=False))
    for report in reports:
        if report.case not in known:
            continue
        name, now = _name(report), entry(report)
        before = entries.get(name)
        if before is None:
            found.append(f"{name}: not in the baseline")
            continue
        if now["spills"] > before["spills"]:
            found.append(f"{name}: {now['spills']} spills, {before['spills']} in the baseline")
        found += [
            f"{name}: {now[key]} {what}, {before[key]} in the baseline"
            for key, what in _KEPT.items()
            if now[key] < before[key]
        ]
    names = {f"{target}: {case}" for case in known for target in TARGETS}
    found += [f"{name}: in the baseline, but no longer a representative case" for name in entries if name not in names]
    return [f"{loss}. If that is meant: {COMMAND}" for loss in found]


def _name(report: Report) -> str:
    return f"{report.target}: {report.case}"

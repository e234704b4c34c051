"""The sections of single kernels: facts and ceilings, kernels against their floors and peers, and compiled peers."""

import dataclasses
import functools
import importlib.util
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.kernel_cases import CASES
from bench.kernels import measure
from bench.static.cases import DEVICES
from bench.static.limits import PEAKS
from fastbert.benchmark.contenders import CONTENDERS, missing
from fastbert_kernels.backend import arch

from .sections import Kept, Plan, Rows, Section, Steps, Verdict

#: Seconds of each direction of a case.
SECONDS = 0.4
#: A measured limit this far from what the model takes makes a line.
_NEAR = 0.1


def _device_steps(plan: Plan, kept: Kept) -> Steps:
    return {"ceilings": functools.partial(_ceilings, plan)}


def _ceilings(plan: Plan) -> Rows:
    measured = plan.machine.facts(torch.float32, torch.bfloat16)
    taken = PEAKS.get(DEVICES.get(arch(plan.device), ""))
    modelled = None if taken is None else {"copy_bytes": taken.copy, "flops_bfloat16": taken.tensor}
    absent = {
        CONTENDERS[name]: missing(name, task="forward", attentions=False, dtype=torch.bfloat16, device=plan.device)
        for name in plan.peers
    }
    if importlib.util.find_spec("liger_kernel") is None:
        absent["Liger"] = "liger-kernel is not installed"
    return [{"ceilings": measured, "modelled": modelled, "missing": {k: why for k, why in absent.items() if why}}]


def _tell_device(console: Console, kept: Kept) -> Verdict:
    console.print_json(data=kept.facts)
    if not kept.rows:
        return Verdict(False, "see why the ceilings cannot be measured: without them there are no floors")
    (row,) = kept.rows
    for name, why in row["missing"].items():
        console.print(f"missing: {name}: {why}", style="yellow", markup=False, soft_wrap=True)
    far = []
    for name, seen in row["ceilings"].items():
        taken = (row["modelled"] or {}).get(name)
        console.print(f"{name}: {seen:.3g} a second" + (f", bench.static takes {taken:.3g}" if taken else ""))
        if taken and abs(seen / taken - 1) > _NEAR:
            far.append(f"{name} is {seen / taken:.2f}x what bench.static.limits takes: correct it there")
    return Verdict(True, "; ".join(far) or "nothing: the limits are as the model takes them, or it has none")


DEVICE = Section(15, _device_steps, _tell_device)


def _kernel_steps(plan: Plan, kept: Kept, slow_peers: bool) -> Steps:
    kept.facts["ceilings"] = plan.machine.facts(torch.bfloat16)
    return {name: functools.partial(_measure, name, plan, slow_peers) for name in CASES}


def _measure(name: str, plan: Plan, slow_peers: bool) -> Rows:
    rows = measure(CASES[name], torch.bfloat16, plan.device, plan.machine, seconds=SECONDS, slow_peers=slow_peers)
    return [dataclasses.asdict(row) for row in rows]


def _tell_kernels(console: Console, kept: Kept) -> Verdict:
    console.print(_kernel_table(kept.rows))
    ours = [row for row in kept.rows if row["contender"] == "fastbert"]
    if wrong := [row for row in ours if not row["times"]]:
        return Verdict(False, f"mend {wrong[0]['kernel']}, {wrong[0]['case']}: {wrong[0]['problem']}")
    if not ours:
        return Verdict(True, "nothing was measured yet")
    most = max(ours, key=lambda row: row["times"]["median"] / row["floor"])
    times = most["times"]["median"] / most["floor"]
    lost = [row for row in ours if any(_wins(peer, row) for peer in kept.rows)]
    losses = f"; peers are faster in {', '.join(_call(row) for row in lost)}" if lost else "; no peer is faster"
    return Verdict(True, f"{_call(most)} is farthest from its floor, {times:.2f}x: begin there{losses}")


def _call(row: dict[str, Any]) -> str:
    return f"{row['kernel']} ({row['case']})"


def _wins(peer: dict[str, Any], ours: dict[str, Any]) -> bool:
    same = (peer["kernel"], peer["case"]) == (ours["kernel"], ours["case"])
    return same and bool(peer["times"]) and peer["times"]["median"] < ours["times"]["median"]


def _kernel_table(rows: Rows) -> Table:
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


KERNELS = Section(50, functools.partial(_kernel_steps, slow_peers=False), _tell_kernels)
#: The same with the peers that are compiled for each case: its times take the place of the others in what is published.
COMPILED = Section(25, functools.partial(_kernel_steps, slow_peers=True), _tell_kernels)

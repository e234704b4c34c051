"""The sections of whole models: a real checkpoint against Hugging Face, and models against their peers."""

import functools
import os
from pathlib import Path

import torch
from rich.console import Console

from bench.models import Contest, Item
from fastbert.benchmark.measure import Row
from fastbert.benchmark.results import Results, show
from fastbert.benchmark.timing import Times
from fastbert.benchmark.workloads import GPU_WORKLOADS
from fastbert.benchmark.workloads import named as named_workloads
from fastbert.cli.common import CHECKPOINT_VARIABLE, LOCAL_CHECKPOINT
from fastbert.inputs import InputError
from fastbert.verify.compare import compare

from .sections import Kept, Plan, Rows, Section, Steps, Verdict

#: `compile-max` takes minutes for a workload: where it is named, by --peer.
PEERS = (
    *("fastbert", "fastbert-auto", "fastbert-graphed", "eager", "sdpa", "flash", "flex"),
    *("compile", "compile-graphs"),
)
CHECKPOINT = Path(os.environ.get(CHECKPOINT_VARIABLE, LOCAL_CHECKPOINT))
#: Of a workload: seconds, and the fewest and most rounds.
SECONDS, ROUNDS = 2.0, (10, 200)


def _parity_steps(plan: Plan, kept: Kept) -> Steps:
    return {dtype: functools.partial(_parity, dtype, plan) for dtype in ("float32", "bfloat16", "float16")}


def _parity(dtype: str, plan: Plan) -> Rows:
    if not (CHECKPOINT / "config.json").is_file():
        raise InputError(
            f"no checkpoint in {str(CHECKPOINT)!r}: `make demo` fetches one, {CHECKPOINT_VARIABLE} names another"
        )
    report = compare(str(CHECKPOINT), dtype=dtype, device=str(plan.device), train=True, repeats=0)
    return [{"dtype": dtype} | report.to_dict()]


def _tell_parity(console: Console, kept: Kept) -> Verdict:
    checks = [check | {"dtype": row["dtype"]} for row in kept.rows for check in row["outputs"] + row["gradients"]]
    broken = [check for check in checks if not check["ok"]]
    console.print(f"{len(checks) - len(broken)} of {len(checks)} tensors of {CHECKPOINT} within their bounds")
    if broken:
        console.print_json(data=broken)
        worst = f"{broken[0]['name']} in {broken[0]['dtype']}"
        return Verdict(False, f"mend {worst}: `fastbert verify {CHECKPOINT} --train --device cuda` shows all of it")
    if kept.failed:
        return Verdict(False, f"give the run a checkpoint, by {CHECKPOINT_VARIABLE}, and delete parity.json")
    return Verdict(True, "nothing to mend here: a real checkpoint is as close as Hugging Face's own")


PARITY = Section(30, _parity_steps, _tell_parity)


def models_plan(workloads: list[str], models: list[str]) -> list[Item]:
    """What to run, what matters most first; neighbours share what is compiled for them."""
    chosen = named_workloads(workloads, GPU_WORKLOADS)
    kinds = sorted(chosen, key=lambda workload: workload.task == "finetune")
    return [(model, workload, torch.bfloat16) for model in models for workload in kinds]


def _steps(plan: Plan, kept: Kept) -> Steps:
    kept.facts["ceilings"] = plan.machine.facts(torch.bfloat16)
    contest = Contest(plan.peers, plan.machine)
    items = models_plan(plan.workloads, plan.models)
    return {f"{item[0]} {item[1].name}": functools.partial(_measure, contest, item) for item in items}


def _measure(contest: Contest, item: Item) -> Rows:
    return [row.to_dict() for row in contest.measure(item, seconds=SECONDS, rounds=ROUNDS)]


def _tell(console: Console, kept: Kept) -> Verdict:
    rows = [Row(**row | {"times": row["times"] and Times(**row["times"])}) for row in kept.rows]
    groups = Results(kept.facts, rows).groups()
    show(console, groups)
    wrong = [group.rows[0].workload for group in groups if group.ours is None]
    if wrong:
        return Verdict(False, f"mend {wrong[0]}, on which fastbert has no time")
    lost = [f"{group.rows[0].workload} ({group.verdict})" for group in groups if "wins" in group.verdict]
    if lost:
        return Verdict(True, f"look into what is lost: {', '.join(lost)}")
    return Verdict(True, "no workload measured so far is lost; --peer compile-max is the peer left to ask")


MODELS = Section(115, _steps, _tell)

"""Sections of the GPU run: steps, each of which is kept on disk when it is done."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from bench.floors import Machine
from fastbert.benchmark.provenance import facts
from fastbert.benchmark.results import save_json

#: What a step gives: rows that JSON can hold.
Rows = list[dict[str, Any]]
Steps = Mapping[str, Callable[[], Rows]]


class OutOfTimeError(Exception):
    """A step that did not come to its end: it is left out, and the next run begins it again."""


class LostDeviceError(Exception):
    """The GPU takes no more calls from this process, as after an illegal access."""


@dataclasses.dataclass
class Plan:
    """What a run was asked for, and when it must end.

    Attributes:
        out: folder of the results.
        workloads, peers, models: of the section of models.
        deadline: of the run, on `time.perf_counter`'s clock.
        machine: the GPU, whose measured limits make the floors.
        until: of the section that runs: nothing new is begun after it.
        closing: is closed at the end of the section.
    """

    out: Path
    workloads: list[str]
    peers: list[str]
    models: list[str]
    deadline: float
    machine: Machine
    until: float = 0.0
    closing: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)

    @property
    def device(self) -> torch.device:
        return self.machine.device

    def left(self) -> float:
        """Seconds left to the section that runs."""
        return max(0.0, self.until - time.perf_counter())


@dataclasses.dataclass
class Kept:
    """The file of a section.

    Attributes:
        facts: where the rows come from.
        steps: what each step that is done gave: `rows`, `seconds`, and `problem`, None where it did not fail.
        begun: the step that is being run.
        left_out: steps that the time was too short for.
        finished: whether every step is done.
        summary: what telling made of the rows, for who reads the file.
    """

    facts: dict[str, Any]
    steps: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    begun: str | None = None
    left_out: list[str] = dataclasses.field(default_factory=list)
    finished: bool = False
    summary: Rows = dataclasses.field(default_factory=list)

    @property
    def rows(self) -> Rows:
        """The rows of all steps."""
        return [row for step in self.steps.values() for row in step["rows"]]

    @property
    def failed(self) -> dict[str, str]:
        """Steps that raised, with what they raised."""
        return {name: step["problem"] for name, step in self.steps.items() if step["problem"]}

    def save(self, path: Path) -> None:
        """Write the file; what it says of steps is whole at any time."""
        steps = {name: step | {"rows": len(step["rows"])} for name, step in self.steps.items()}
        save_json(path, dataclasses.asdict(self) | {"steps": steps, "rows": self.rows})

    @classmethod
    def load(cls, path: Path) -> "Kept":
        """Read what `save` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = iter(content.pop("rows"))
        kept = cls(**content)
        for step in kept.steps.values():
            step["rows"] = [next(rows) for _ in range(step["rows"])]
        return kept


class Verdict(NamedTuple):
    """What a section's rows say.

    Attributes:
        right: whether nothing is wrong.
        following: what to do next.
    """

    right: bool
    following: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the run.

    Attributes:
        share: of the time, beside the other sections' shares.
        steps: what is done, by name and in order; each is kept when it is done. Takes what is kept, too.
        tell: prints what is kept, for people.
    """

    share: float
    steps: Callable[[Plan, Kept], Steps]
    tell: Callable[[Console, Kept], Verdict]


def run(name: str, section: Section, plan: Plan, console: Console) -> bool:
    """Do the steps of a section that are not done yet, as far as `plan.until` allows, and tell.

    A step that fails is kept as failed. To run one again, delete the section's file.

    Returns:
        Whether nothing is wrong.

    Raises:
        LostDeviceError: when the GPU takes no more calls; what is done is kept.
    """
    path = plan.out / f"{name}.json"
    begin = time.perf_counter()
    console.rule(name)
    kept = Kept.load(path) if path.is_file() else Kept(facts(plan.device))
    if not kept.finished:
        with contextlib.ExitStack() as plan.closing:
            try:
                _do_steps(section.steps(plan, kept), kept, path, plan)
            finally:
                plan.until = 0.0  # no process is started any more
    else:
        console.print(f"{name}: finished before", markup=False)
    right, following = section.tell(console, kept)
    kept.save(path)
    for step, problem in kept.failed.items():
        console.print(f"{step} failed: {problem}", style="red", markup=False, soft_wrap=True)
    if kept.left_out:
        left = f"left out, for which the time was too short: {', '.join(kept.left_out)}"
        console.print(left, style="yellow", markup=False, soft_wrap=True)
        following += "; and the same command again, which goes on with what was left out"
    console.print(f"{name}: {time.perf_counter() - begin:.0f} s, kept in {path}", markup=False, soft_wrap=True)
    console.print(f"next: {following}", style="bold", markup=False, soft_wrap=True)
    return right and not kept.failed


def _do_steps(steps: Steps, kept: Kept, path: Path, plan: Plan) -> None:
    kept.left_out = []
    longest = 0.0
    # Where the run was ended from outside, the step it was at comes last: it may be what takes too long.
    for name in sorted((name for name in steps if name not in kept.steps), key=lambda name: name == kept.begun):
        begin = time.perf_counter()
        if begin > plan.until or begin + longest > plan.deadline:
            kept.left_out.append(name)
            continue
        kept.begun = name
        kept.save(path)
        rows, problem = [], None
        try:
            rows = steps[name]()
        except OutOfTimeError:
            kept.left_out.append(name)
            continue
        except Exception as failure:  # the steps after it still tell something
            problem = f"{type(failure).__name__}: {failure}"[:500]
        longest = max(longest, time.perf_counter() - begin)
        kept.begun = None
        kept.steps[name] = {"rows": rows, "seconds": round(time.perf_counter() - begin, 3), "problem": problem}
        kept.save(path)
        if problem is not None and _is_lost(plan.device):
            raise LostDeviceError(f"{name}: {problem}")
    kept.begun = None
    kept.finished = not kept.left_out
    kept.save(path)


def _is_lost(device: torch.device) -> bool:
    try:
        torch.cuda.synchronize(device)
    except Exception:  # whatever CUDA says now, it says of every call to come
        return True
    return False

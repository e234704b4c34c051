"""The section of every op's results, and that of `compute-sanitizer`: the calls of `calls.py` in processes."""

import functools
import os
import re
import shutil
from pathlib import Path

from rich.console import Console

from .calls import GROUPS
from .processes import Ended, at_once, python, run
from .sections import Kept, Plan, Rows, Section, Steps, Verdict

#: What `compute-sanitizer` looks for: accesses outside memory, and unordered ones to shared memory.
TOOLS = ("memcheck", "racecheck")
#: Exit code of `compute-sanitizer` where it found something.
_FOUND = 86
#: Every tensor has memory of its own, so that an access past its end is one outside memory.
_ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
#: Options of `calls.py` in the sections of results, and under a sanitizer.
CALLS: tuple[str, ...] = ()
WATCHED_CALLS = ("--small", "--no-definition")


def _command(group: str, plan: Plan, *options: str) -> list[str]:
    return python("-m", "bench.gpu.calls", group, "--device", str(plan.device), *options)


def _steps(plan: Plan, kept: Kept) -> Steps:
    steps = {group: functools.partial(_call, group, plan) for group in GROUPS if group not in kept.steps}
    return at_once(steps, plan)


def _call(group: str, plan: Plan) -> Rows:
    ended = run(_command(group, plan, *CALLS), plan)
    if ended.code not in (0, 1) or not ended.rows:
        return [*ended.rows, _row(group, f"the process ended with {ended.code}", ended)]
    return ended.rows


def _row(group: str, problem: str, ended: Ended) -> dict[str, object]:
    return {"group": group, "call": "all", "problem": problem, "last_lines": ended.last_lines}


def _tell(console: Console, kept: Kept) -> Verdict:
    wrong = [row for row in kept.rows if row["problem"]]
    for row in wrong:
        errors = f" ({row['error']:.1e}, may be {row['bound']:.1e})" if row.get("error") is not None else ""
        line = f"{row['group']}, {row['call']}: {row['problem']}{errors}"
        console.print(line, style="red", markup=False, soft_wrap=True)
    console.print(f"{len(kept.rows) - len(wrong)} of {len(kept.rows)} calls are right, and the same each time")
    if wrong:
        again = f"python -m bench.gpu.calls {wrong[0]['group']!r}"
        return Verdict(False, f"mend {wrong[0]['group']}: {again}; times of what is wrong below mean nothing")
    if not kept.rows:
        return Verdict(True, "nothing was called yet")
    return Verdict(True, "nothing to mend here: what is timed below computes the right thing")


OPS = Section(100, _steps, _tell)


def find_sanitizer() -> str | None:
    """Where `compute-sanitizer` is: on PATH, or in CUDA's folder."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    places = [os.environ.get("PATH", ""), *(str(Path(home) / "bin") for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def _sanitizer_steps(plan: Plan, kept: Kept) -> Steps:
    sanitizer = find_sanitizer()
    if sanitizer is None:
        why = "missing: compute-sanitizer is neither on PATH nor in CUDA_HOME/bin or /usr/local/cuda/bin"
        return {"compute-sanitizer": lambda: [{"tool": "compute-sanitizer", "group": "all", "problem": why}]}
    groups = [group for group in GROUPS if group.endswith("bfloat16")]
    steps = {
        f"{tool}: {group}": functools.partial(_sanitize, sanitizer, tool, group, plan)
        for tool in TOOLS
        for group in groups
        if f"{tool}: {group}" not in kept.steps
    }
    return at_once(steps, plan)


def _sanitize(sanitizer: str, tool: str, group: str, plan: Plan) -> Rows:
    watching = [sanitizer, "--tool", tool, "--error-exitcode", str(_FOUND), "--print-limit", "5"]
    ended = run([*watching, *_command(group, plan, *WATCHED_CALLS)], plan, _ENVIRONMENT)
    found = re.search(r"(?:ERROR|RACECHECK) SUMMARY: .*", ended.output + ended.errors)
    row = {"tool": tool, "group": group, "summary": found and found[0], "problem": None}
    if ended.code == 0 and found:
        return [row]
    what = "found errors" if ended.code == _FOUND else f"the process ended with {ended.code}"
    lines = [line for line in (ended.output + ended.errors).splitlines() if line.startswith("=========")]
    return [row | {"problem": what, "last_lines": lines[:40] or ended.last_lines}]


def _tell_sanitizer(console: Console, kept: Kept) -> Verdict:
    wrong = [row for row in kept.rows if row["problem"]]
    for row in wrong:
        console.print(f"{row['tool']}, {row['group']}: {row['problem']}", style="red", markup=False, soft_wrap=True)
        console.print("\n".join(row.get("last_lines", [])), markup=False, soft_wrap=True)
    if wrong and wrong[0]["tool"] not in TOOLS:
        install = "install CUDA's compute-sanitizer, delete sanitizer.json and start the same command again"
        return Verdict(True, f"nothing was watched: {install}")
    console.print(f"{len(kept.rows) - len(wrong)} of {len(kept.rows)} groups of calls are clean")
    if wrong:
        return Verdict(False, f"mend what {wrong[0]['tool']} says of {wrong[0]['group']}: lines above, all in the file")
    return Verdict(True, "no access outside memory and no race in shared memory: nothing to mend here")


SANITIZER = Section(100, _sanitizer_steps, _tell_sanitizer)

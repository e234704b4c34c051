"""Steps that run in processes of their own, several at once: what one of them breaks, the others do not see."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .sections import OutOfTimeError, Plan, Rows, Steps

ROOT = Path(__file__).parents[2]
#: Processes at once. Compilation keeps one CPU busy.
AT_ONCE = max(1, min(16, (os.cpu_count() or 1) - 1))


#: Exit code of a process that was killed when its time was over, as the command `timeout` has it.
LATE = 124


class Ended:
    """How a process ended: its exit code, and what it printed on both streams."""

    def __init__(self, code: int, output: str, errors: str) -> None:
        self.code, self.output, self.errors = code, output, errors

    @property
    def rows(self) -> Rows:
        """The lines that are JSON; whole lines only."""
        lines = self.output.splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]

    @property
    def last_lines(self) -> list[str]:
        """The end of what it said, for people."""
        return (self.output + self.errors).strip().splitlines()[-20:]


def python(*arguments: str) -> list[str]:
    """A command line of this Python."""
    return [sys.executable, *arguments]


def run(command: Sequence[str], plan: Plan, environment: Mapping[str, str] | None = None) -> Ended:
    """Run a command in the project's root.

    Raises:
        OutOfTimeError: when it did not end within the section's time; it is killed.
    """
    ended = run_for(plan.left(), command, plan, environment)
    if ended.code == LATE:
        raise OutOfTimeError(" ".join(command))
    return ended


def run_for(seconds: float, command: Sequence[str], plan: Plan, environment: Mapping[str, str] | None = None) -> Ended:
    """The same, but a process that is killed after so many seconds has the exit code `LATE` and what it printed."""
    if not plan.left():
        raise OutOfTimeError(" ".join(command))
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    plan.closing.callback(process.kill)
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return Ended(LATE, *process.communicate())
    return Ended(process.returncode, output, errors)


def at_once(steps: Steps, plan: Plan, number: int = AT_ONCE) -> Steps:
    """The same steps, begun now in threads of their own, up to so many at once; a step waits for its own."""
    pool = ThreadPoolExecutor(number)
    plan.closing.callback(pool.shutdown, wait=False, cancel_futures=True)
    futures = {name: pool.submit(step) for name, step in steps.items()}

    def waiting(name: str) -> Rows:
        try:
            return futures[name].result(timeout=plan.left() + 1.0)  # a process that is killed leaves its own error
        except TimeoutError as late:
            raise OutOfTimeError(name) from late

    return {name: functools.partial(waiting, name) for name in steps}

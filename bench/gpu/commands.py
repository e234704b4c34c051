"""The sections that are commands of their own: `fastbert tune`, and the test suite."""

import functools

from rich.console import Console

from fastbert_kernels.catalogue import FUSED, KERNELS

from .processes import python, run
from .sections import Kept, Plan, Rows, Section, Steps, Verdict

#: What is tuned: BERT-base's, BERT-large's and MiniLM's launches of each kernel, and whether products are fused.
TUNED = (FUSED, *(name for name, kernel in KERNELS.items() if kernel.op not in ("relation", "column_sums")))
TUNE = ("-m", "fastbert", "tune", "--seconds", "0.3")
_PYTEST = ("-m", "pytest", "-p", "no:cacheprovider", "-n", "4", "--dist", "loadfile")
#: By what they are of: tests that need a GPU, and the kernels', which run compiled there.
SUITES = {"gpu": (*_PYTEST, "-m", "gpu and not slow"), "kernels": (*_PYTEST, "tests/kernels")}
#: Exit code of pytest where no test was chosen.
_NOTHING_RAN = 5


def _tune_steps(plan: Plan, kept: Kept) -> Steps:
    return {name: functools.partial(_tune, name, plan) for name in TUNED}


def _tune(kernel: str, plan: Plan) -> Rows:
    """Tune one kernel; measured tiles go to the run's own folder, so that what is timed after it is what is shipped."""
    ended = run(python(*TUNE, "--kernel", kernel), plan, {"FASTBERT_CACHE": str((plan.out / "tuned").resolve())})
    problem = None if ended.code == 0 else f"it ended with {ended.code}"
    return [{"command": kernel, "problem": problem, "last_lines": ended.last_lines}]


def _suite_steps(plan: Plan, kept: Kept) -> Steps:
    return {name: functools.partial(_suite, name, plan) for name in SUITES}


def _suite(name: str, plan: Plan) -> Rows:
    ended = run(python(*SUITES[name]), plan, {"OMP_NUM_THREADS": "2"})
    problem = None if ended.code in (0, _NOTHING_RAN) else f"it ended with {ended.code}"
    return [{"command": name, "problem": problem, "last_lines": ended.last_lines}]


def _tell(console: Console, kept: Kept, right: str, wrong: str) -> Verdict:
    for row in kept.rows:
        console.print(f"{row['command']}:", style="bold", markup=False)
        console.print("\n".join(row["last_lines"]), markup=False, soft_wrap=True)
        if row["problem"]:
            console.print(row["problem"], style="red", markup=False)
    broken = [row["command"] for row in kept.rows if row["problem"]]
    return Verdict(not broken, f"{wrong}: {', '.join(broken)}" if broken else right)


_TUNED = "look at the tiles in the folder `tuned`: what is in force there is a row for the tables of tiles.py"
TUNING = Section(
    25, _tune_steps, functools.partial(_tell, right=_TUNED, wrong="see why `fastbert tune --kernel NAME` fails for")
)
TESTS = Section(
    10,
    _suite_steps,
    functools.partial(_tell, right="nothing to mend here: the tests pass", wrong="mend the tests of"),
)

"""What Triton itself makes of a launch: it takes neither every name of an argument nor every option."""

import json
import os
import subprocess
import sys
from pathlib import Path

from fastbert.tuning.problems import COMPILED


def test_triton_takes_the_launch_of_every_kernel() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.launched"],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    launched = json.loads(done.stdout.splitlines()[-1])
    assert set(launched) == {"_column_sums"} | {kernel.__name__ for kernel in COMPILED.values()}
    assert min(launched.values()) > 0

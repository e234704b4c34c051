"""Python in a process of its own, whose kernels are compiled and not interpreted."""

import os
import subprocess
import sys
from pathlib import Path


def run_uninterpreted(*arguments: str) -> str:
    """What `python *arguments`, in the project's root, prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout

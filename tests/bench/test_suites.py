"""The pytest-benchmark suites measure when they are asked to, and a saved run can be compared with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
NORM = "norm and forward and not dropout and not 1024"  # one size on any device


def suite(*arguments: str) -> str:
    """Run a part of the suites in as few rounds as there can be; what it printed."""
    command = [sys.executable, "-m", "pytest", "bench", "-p", "no:cacheprovider", "--benchmark-enable"]
    few = ["--benchmark-max-time=0.01", "--benchmark-min-rounds=2"]
    # A worker's variables would make the run within think that it is one, which saves nothing.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([*command, *few, *arguments], capture_output=True, text=True, cwd=ROOT, env=own)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_contenders_stand_side_by_side_and_beside_their_past(tmp_path: Path) -> None:
    storage, saved = f"--benchmark-storage={tmp_path}", tmp_path / "run.json"
    suite(
        "-k", f"{NORM} or one and (fastbert or eager)", storage, "--benchmark-save=before", f"--benchmark-json={saved}"
    )
    content = json.loads(saved.read_text())
    groups: dict[str, list[str]] = {}
    for found in content["benchmarks"]:
        groups.setdefault(found["group"].split()[0].split("-")[0], []).append(found["extra_info"]["contender"])
        assert found["stats"]["median"] > 0
        assert found["stats"]["rounds"] >= 2
    assert groups == {"add_layer_norm": ["fastbert", "torch eager"], "one": ["fastbert", "eager"]}
    assert content["machine_info"]["versions"]["torch"] == torch.__version__

    shown = suite("-k", f"{NORM} and torch", storage, "--benchmark-compare=0001")
    assert "torch eager] (0001_before)" in shown
    assert "torch eager] (NOW)" in shown

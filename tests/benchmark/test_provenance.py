"""A result says where it comes from."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from fastbert.benchmark import provenance


def test_facts_are_json_with_device_versions_commit_and_date() -> None:
    found = json.loads(json.dumps(provenance.facts(torch.device("cpu"))))
    assert found["device"]
    assert found["device_type"] == "cpu"
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__
    assert found["date"].endswith("+00:00")
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode == 0:
        assert found["commit"].rstrip("+") == head.stdout.strip()


def test_outside_a_repository_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*command: object, **how: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(provenance.subprocess, "run", absent)
    assert provenance.commit() is None


def test_the_commit_of_a_project_that_it_is_installed_in_is_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True).stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "theirs")
    file = tmp_path / ".venv/provenance.py"
    file.parent.mkdir()
    file.touch()
    monkeypatch.setattr(provenance, "__file__", str(file))
    assert provenance.commit() is None
    git("add", ".venv")
    git("commit", "-m", "ours")
    assert provenance.commit() == git("rev-parse", "HEAD") != ""

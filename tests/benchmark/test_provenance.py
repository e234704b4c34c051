"""A result says where it comes from."""

import json
import subprocess

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

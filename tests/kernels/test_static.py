"""What the kernels compile to for GPUs that are not here: no spills, tensor cores, wide and asynchronous accesses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastbert_kernels import static

NVIDIA = ["sm_80", "sm_90", "sm_100"]
#: Kernels whose time is the time to move their tensors.
STREAMING = ["bias_activation", "add_layer_norm", "embed"]


def _run(*options: str) -> subprocess.CompletedProcess[str]:
    """The tool in a process of its own, where kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastbert_kernels.static", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=4 * 3600)


def _reports(folder: Path, *options: str) -> list[dict[str, Any]]:
    file = folder / "static.json"
    done = _run("--json", str(file), *options)
    assert file.exists(), done.stdout + done.stderr
    written = json.loads(file.read_text())
    assert written["failures"] == []
    assert done.returncode == 0, done.stdout + done.stderr
    return written["reports"]


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every kernel in its representative configurations, on every target."""
    return _reports(tmp_path_factory.mktemp("static"))


def _of(reports: list[dict[str, Any]], target: str, *kernels: str) -> list[dict[str, Any]]:
    chosen = [r for r in reports if r["target"] == target and r["case"]["kernel"].startswith(kernels)]
    assert chosen
    return chosen


@pytest.mark.parametrize("target", static.TARGETS)
def test_every_kernel_compiles(reports: list[dict[str, Any]], target: str) -> None:
    compiled = _of(reports, target, "")
    assert {r["case"]["kernel"] for r in compiled} == set(static.KERNELS)
    assert len(compiled) == len(static.cases(full=False))


@pytest.mark.parametrize("target", NVIDIA)
def test_nothing_spills(reports: list[dict[str, Any]], target: str) -> None:
    assert [r for r in _of(reports, target, "") if r["spills"] > 0 or r["stack"] > 0] == []


@pytest.mark.parametrize("target", static.TARGETS)
def test_products_run_on_the_targets_own_tensor_cores(reports: list[dict[str, Any]], target: str) -> None:
    products = _of(reports, target, "attention_")
    assert [r for r in products if r["tensor_core"] == 0] == []
    if target in ("sm_90", "sm_100"):  # HMMA there is the path of an older generation
        assert [r for r in products if r["mma_sync"] > 0] == []


@pytest.mark.parametrize("target", NVIDIA)
def test_attention_loads_its_tiles_asynchronously(reports: list[dict[str, Any]], target: str) -> None:
    assert [r for r in _of(reports, target, "attention_") if r["async_copies"] == 0] == []


@pytest.mark.parametrize("target", static.TARGETS)
@pytest.mark.parametrize("kernel", STREAMING)
def test_streaming_kernels_move_128_bits_at_a_time(reports: list[dict[str, Any]], target: str, kernel: str) -> None:
    wide = [r for r in _of(reports, target, kernel) if r["case"]["width"] == 768]
    assert [r for r in wide if r["wide_loads"] == 0 or r["wide_stores"] == 0] == []


def test_the_interpreter_is_an_error() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "fastbert_kernels.static"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "unset TRITON_INTERPRET" in done.stdout


def test_an_argument_that_no_table_knows_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    case = static.Case("column_sums", "bfloat16", 768)
    assert set(static.arguments(case, "sm_90")) >= {"partials_ptr", "BLOCK_M"}
    monkeypatch.delitem(static._POINTERS, "partials_ptr")
    with pytest.raises(KeyError, match="does not know partials_ptr"):
        static.arguments(case, "sm_90")


def test_problems_are_told() -> None:
    case = static.Case("attention_forward", "bfloat16", 64)
    numbers = dict.fromkeys((f.name for f in static.dataclasses.fields(static.KernelReport)[3:]), 0)
    tiles = {"num_warps": 4}
    good = static.KernelReport(case, "sm_90", tiles, **numbers | {"registers": 128, "tensor_core": 8})
    assert good.problems() == []
    assert good.warps_per_sm == 16
    bad = static.KernelReport(case, "sm_90", tiles, **numbers | {"registers": 255, "spills": 2, "shared": 1 << 18})
    assert len(bad.problems()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("target", static.TARGETS)
def test_everything_that_ships(tmp_path: Path, target: str) -> None:
    reports = _reports(tmp_path, "--full", "--target", target)
    assert len(reports) == len(static.cases(full=True))

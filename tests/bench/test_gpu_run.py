"""The GPU run, rehearsed on a stand-in for a GPU: every section's own code, ended in each section and gone on with."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import typer
from rehearsal import rehearsal
from typer.testing import CliRunner, Result
from uninterpreted import run_uninterpreted

from bench.collect import collect
from bench.gpu import __main__ as gpu
from bench.gpu import candidates, ops, sections
from bench.gpu.attention_variants import CONTENDERS
from bench.gpu.sections import Kept, Verdict
from bench.static.limits import PEAKS
from fastbert.tuning.neighbours import neighbours, shipped_tiles
from fastbert.tuning.tuner import words

SECTIONS = list(gpu.SECTIONS)
ROOT = Path(__file__).parents[2]
PEERS = ("--peer", "fastbert", "--peer", "eager", "--peer", "flash")

#: In the place of `compute-sanitizer`: runs nothing, and finds nothing.
CLEAN = "#!/bin/sh\necho '========= ERROR SUMMARY: 0 errors'\n"
#: The same, but for running what it is given.
RUNS = "#!/bin/sh\nwhile [ $1 != '5' ]; do shift; done; shift\n\"$@\" && echo '========= ERROR SUMMARY: 0 errors'\n"


def sanitizer(folder: Path, script: str) -> dict[str, str]:
    """An environment in which this script is `compute-sanitizer`."""
    path = folder / "compute-sanitizer"
    path.write_text(script)
    path.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def invoke(*arguments: str | Path) -> Result:
    app = typer.Typer()
    app.command()(gpu.main)
    before = signal.getsignal(signal.SIGTERM)
    try:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])
    finally:
        signal.signal(signal.SIGTERM, before)


def said_by_the_model(launch: Any, plan: Any, *options: str) -> list[dict[str, Any]]:
    """What `bench.gpu.modelled` would print, which takes a compiler's time: the first neighbour is the best."""
    if options:
        about = {
            "launch": str(launch),
            "modelled_us": 3.0,
            "registers": 128,
            "spills": 0,
            "resident": 2,
            "problem": None,
        }
        return [about | {"variant": x, "dropout": dropout} for dropout in (False, True) for x in CONTENDERS]
    shipped = shipped_tiles(launch, "sm_90")
    others = neighbours(launch, "sm_90", shipped)
    rows = [
        {"launch": str(launch), "tiles": x, "shipped": False, "modelled_us": 2.0 + i, "problem": None}
        for i, x in enumerate(others)
    ]
    return [{"launch": str(launch), "tiles": shipped, "shipped": True, "modelled_us": 4.0, "problem": None}, *rows]


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The folder of a whole run, and what it printed."""
    out = tmp_path_factory.mktemp("gpu")
    environment = sanitizer(tmp_path_factory.mktemp("bin"), CLEAN)
    said = mock.patch.object(candidates, "_model", said_by_the_model)
    with rehearsal(tiny), mock.patch.dict(os.environ, environment), said:
        return out, invoke("--out", out, *PEERS)


def test_every_section_runs_to_its_end_and_says_what_to_do_next(whole: tuple[Path, Result]) -> None:
    out, result = whole
    assert result.exit_code == 0, result.output
    assert result.output.count("\nnext: ") == len(SECTIONS)
    for name in SECTIONS:
        kept = Kept.load(out / f"{name}.json")
        assert kept.finished
        assert kept.rows
        assert kept.facts["device"] == "stand-in"
        assert not kept.failed


def test_what_is_right_is_known_in_the_first_four_minutes_of_nine() -> None:
    assert SECTIONS[:3] == ["device", "ops", "sanitizer"]
    shares = [section.share for section in gpu.SECTIONS.values()]
    assert 9 * sum(shares[:3]) / sum(shares) <= 4


def test_what_is_missing_is_named_in_print_and_in_the_results(whole: tuple[Path, Result]) -> None:
    out, result = whole
    (row,) = Kept.load(out / "device.json").rows
    assert row["missing"]["HF flash_attention_2"] == "flash-attn is not installed"
    assert "missing: HF flash_attention_2: flash-attn is not installed" in result.output
    assert "missing: Liger: liger-kernel is not installed" in result.output
    assert row["modelled"]["copy_bytes"] == PEAKS["H200"].copy
    assert "x what bench.static.limits takes: correct it there" in result.output


def test_the_report_says_where_the_model_is_wrong(whole: tuple[Path, Result]) -> None:
    out, result = whole
    rows = [row for row in Kept.load(out / "candidates.json").rows if "measured_us" in row]
    assert len(rows) > 5
    assert [row["modelled_us"] for row in rows if row["shipped"]] == [4.0]
    assert "where the model is wrong" in result.output
    (found,) = Kept.load(out / "candidates.json").summary
    assert found["ratio"] == round(found["measured_us"] / 4.0, 3)


def test_other_kernels_of_attention_are_timed_beside_the_shipped_one(whole: tuple[Path, Result]) -> None:
    out, result = whole
    rows = [row for row in Kept.load(out / "candidates.json").rows if "call" in row]
    calls = ("2 x 8, 2 heads", "2 x 8, 2 heads, dropout")
    assert [(row["call"], row["variant"]) for row in rows] == [(call, x) for call in calls for x in CONTENDERS]
    assert {row["problem"] for row in rows} == {None}
    assert all(len(row["us"]) == 3 and row["registers"] == 128 for row in rows)
    assert "kernels of attention's forward pass" in result.output


def test_what_a_run_keeps_is_what_is_published(whole: tuple[Path, Result], tmp_path: Path) -> None:
    for file in whole[0].glob("*.json"):
        (tmp_path / "gpu").mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / "gpu" / file.name)
    (device,) = collect(tmp_path)
    assert device.models is not None
    assert [group.rows[0].workload for group in device.models.groups()] == ["forward", "step"]
    assert device.kernels is not None
    for group in device.kernels.groups():
        names = [row.contender for row in group.rows]
        assert len(names) == len(set(names))
        assert "torch.compile" in names or names == ["cuBLAS"]


def test_what_is_finished_is_not_measured_again(whole: tuple[Path, Result], tiny: Path) -> None:
    out, _ = whole
    before = {name: (out / f"{name}.json").read_text() for name in SECTIONS}
    with rehearsal(tiny):
        result = invoke("--out", out, *PEERS)
    assert result.exit_code == 0
    assert result.output.count(": finished before") == len(SECTIONS)
    assert result.output.count("\nnext: ") == len(SECTIONS)
    assert {name: (out / f"{name}.json").read_text() for name in SECTIONS} == before


def canned(out: Path, name: str, done: list[str], end: type[BaseException] | None) -> Any:
    """A section whose steps give what they gave in a whole run; the second of them, or the only one, raises `end`."""
    steps = Kept.load(out / f"{name}.json").steps
    last = list(steps)[:2][-1]

    def step(which: str) -> list[dict[str, Any]]:
        if end is not None and which == last:
            raise end
        done.append(which)
        return steps[which]["rows"]

    made = {which: (lambda which=which: step(which)) for which in steps}
    return dataclasses.replace(gpu.SECTIONS[name], steps=lambda plan, kept: made)


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit], ids=["interrupted", "terminated"])
@pytest.mark.parametrize("name", SECTIONS)
def test_a_run_that_is_ended_in_a_section_keeps_its_steps_and_goes_on(
    whole: tuple[Path, Result], tiny: Path, tmp_path: Path, name: str, end: type[BaseException]
) -> None:
    names = list(Kept.load(whole[0] / f"{name}.json").steps)
    done: list[str] = []
    with rehearsal(tiny):
        with mock.patch.dict(gpu.SECTIONS, {name: canned(whole[0], name, done, end)}):
            ended = invoke("--out", tmp_path, "--section", name)
        assert f"ended in {name}: what is done is kept\nnext: the same command again" in ended.output
        kept = Kept.load(tmp_path / f"{name}.json")
        assert list(kept.steps) == done == names[: min(1, len(names) - 1)]
        assert kept.begun == names[:2][-1]
        assert not kept.finished
        with mock.patch.dict(gpu.SECTIONS, {name: canned(whole[0], name, done, None)}):
            result = invoke("--out", tmp_path, "--section", name)
    assert result.exit_code == 0, result.output
    assert sorted(done) == sorted(names)
    assert Kept.load(tmp_path / f"{name}.json").finished


#: Sections of one step, here.
SINGLE = ("device", "ops")


def killed_in(name: str, command: list[str], out: Path, environment: dict[str, str]) -> Kept:
    """Start the command, kill it in the second step of a section, or the only one, and read the section's file."""
    path, printed = out / f"{name}.json", out.with_name("printed.txt")
    with printed.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    try:
        for _ in range(12000):
            kept = Kept.load(path) if path.is_file() else Kept({})
            if kept.finished or (kept.begun and (kept.steps or name in SINGLE)):
                break
            assert process.poll() is None, printed.read_text()[-3000:]
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return Kept.load(path)


@pytest.mark.slow
def test_a_run_that_is_killed_in_each_section_goes_on_from_what_is_kept(tiny: Path, tmp_path: Path) -> None:
    """The whole command in a process of its own: every process that it starts is real, and its kernels are compiled."""
    out = tmp_path / "out"
    environment = os.environ | sanitizer(tmp_path, RUNS) | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, str(ROOT / "tests/helpers/rehearsal.py"), str(tiny), "--out", str(out), *PEERS]
    done: dict[str, dict[str, Any]] = {}
    for name in SECTIONS:
        kept = killed_in(name, command, out, environment)
        print(f"killed in {name}: {len(kept.steps)} steps kept, begun: {kept.begun}")
        for before, steps in done.items():
            assert Kept.load(out / f"{before}.json").steps == steps
        done |= {x: Kept.load(out / f"{x}.json").steps for x in SECTIONS[: SECTIONS.index(name)]}
    whole = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    print(whole.stdout)
    assert whole.returncode == 0, whole.stderr[-2000:]
    for name in SECTIONS:
        kept = Kept.load(out / f"{name}.json")
        assert kept.finished
        assert not kept.failed
    rows = Kept.load(out / "candidates.json").rows
    assert any(row.get("registers", 0) > 10 and row["modelled_us"] > 0 for row in rows)
    assert all(row["modelled_us"] for row in rows if "measured_us" in row)
    assert {row["problem"] for row in Kept.load(out / "ops.json").rows} == {None}
    assert {row["summary"] for row in Kept.load(out / "sanitizer.json").rows} == {"ERROR SUMMARY: 0 errors"}


def plan(out: Path, seconds: float = 60.0) -> sections.Plan:
    machine: Any = mock.Mock(device=torch.device("cpu"))
    now = time.perf_counter()
    return sections.Plan(out, [], [], [], now + seconds, machine, until=now + seconds)


def run(out: Path, steps: dict[str, Any], seconds: float = 60.0) -> tuple[bool, Kept, str]:
    """Run a section of these steps: whether it is right, what is kept, and what was printed."""
    section = sections.Section(1, lambda plan, kept: steps, lambda console, kept: Verdict(True, "go on"))
    console = gpu.Console(width=200)
    with console.capture() as printed, mock.patch("torch.cuda.synchronize"):
        right = sections.run("some", section, plan(out, seconds), console)
    return right, Kept.load(out / "some.json"), printed.get()


def test_a_step_that_fails_is_kept_and_told(tmp_path: Path) -> None:
    def fails() -> Any:
        raise ValueError("no such thing")

    right, kept, printed = run(tmp_path, {"first": fails, "second": lambda: [{"a": 1}]})
    assert not right
    assert kept.finished
    assert kept.rows == [{"a": 1}]
    assert kept.failed == {"first": "ValueError: no such thing"}
    assert "first failed: ValueError: no such thing" in printed


def test_what_the_time_is_too_short_for_is_named_and_done_by_the_next_run(tmp_path: Path) -> None:
    def late() -> Any:
        raise sections.OutOfTimeError

    steps: dict[str, Any] = {"first": lambda: [{"a": 1}], "late": late, "third": lambda: [{"a": 3}]}
    right, kept, printed = run(tmp_path, steps)
    assert right
    assert (list(kept.steps), kept.left_out, kept.finished) == (["first", "third"], ["late"], False)
    assert "left out, for which the time was too short: late" in printed
    assert "next: go on; and the same command again" in printed
    _, kept, printed = run(tmp_path, steps, seconds=-1)
    assert kept.left_out == ["late"]
    _, kept, _ = run(tmp_path, steps | {"first": late, "late": lambda: [{"a": 2}]})
    assert kept.finished
    assert kept.rows == [{"a": 1}, {"a": 3}, {"a": 2}]


def test_a_step_that_would_not_end_in_time_is_not_begun(tmp_path: Path) -> None:
    done: list[str] = []

    def slow() -> Any:
        time.sleep(0.3)
        done.append("slow")
        return []

    _, kept, _ = run(tmp_path, {"first": slow, "second": slow}, seconds=0.5)
    assert done == ["slow"]
    assert kept.left_out == ["second"]


def test_the_step_that_a_run_was_ended_in_comes_last_in_the_next(tmp_path: Path) -> None:
    order: list[str] = []
    steps = {name: (lambda name=name: order.append(name) or []) for name in ("a", "b", "c")}
    Kept({}, begun="a").save(tmp_path / "some.json")
    run(tmp_path, steps)
    assert order == ["b", "c", "a"]


def test_a_lost_gpu_is_had_anew_by_another_process(whole: tuple[Path, Result], tiny: Path, tmp_path: Path) -> None:
    def lost() -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    broken = dataclasses.replace(gpu.SECTIONS["kernels"], steps=lambda plan, kept: {"first": lost, "second": lost})
    with (
        rehearsal(tiny),
        mock.patch.dict(gpu.SECTIONS, {"kernels": broken}),
        mock.patch("torch.cuda.synchronize", side_effect=RuntimeError),
        mock.patch.object(sys, "argv", ["gpu", "--out", str(tmp_path)]),
        mock.patch("os.execv", side_effect=SystemExit) as again,
    ):
        result = invoke("--out", tmp_path, "--section", "kernels")
    assert "the GPU takes no more calls, after first: RuntimeError: CUDA error" in result.output
    (_, command), _ = again.call_args
    assert command[1:6] == ["-m", "bench.gpu", "--out", str(tmp_path), "--minutes"]
    assert 8 < float(command[6]) <= 8.5
    assert list(Kept.load(tmp_path / "kernels.json").failed) == ["first"]


def test_a_sanitizer_that_finds_something_fails_the_section(tmp_path: Path) -> None:
    script = "#!/bin/sh\necho '========= Invalid __global__ read'\necho '========= ERROR SUMMARY: 1 error'\nexit 86\n"
    kept = Kept({})
    with mock.patch.dict(os.environ, sanitizer(tmp_path, script)):
        steps = ops.SANITIZER.steps(made := plan(tmp_path), kept)
        rows = steps["memcheck: attention bfloat16"]()
    made.closing.close()
    kept.steps["one"] = {"rows": rows, "problem": None}
    assert rows[0]["problem"] == "found errors"
    assert "========= Invalid __global__ read" in rows[0]["last_lines"]
    console = gpu.Console(width=200)
    with console.capture() as printed:
        right, following = ops.SANITIZER.tell(console, kept)
    assert not right
    assert following.startswith("mend what memcheck says of attention bfloat16")
    assert "Invalid __global__ read" in printed.get()


def test_a_sanitizer_that_is_missing_is_named(tmp_path: Path) -> None:
    with mock.patch.object(ops, "find_sanitizer", return_value=None):
        (step,) = ops.SANITIZER.steps(plan(tmp_path), Kept({})).values()
    kept = Kept({}, {"one": {"rows": step(), "problem": None}})
    right, following = ops.SANITIZER.tell(gpu.Console(quiet=True), kept)
    assert right
    assert following.startswith("nothing was watched: install CUDA's compute-sanitizer")


def row(
    launch: str, tiles: str, modelled: float | None, measured: float | None, shipped: bool = False
) -> dict[str, Any]:
    return {"launch": launch, "tiles": tiles, "shipped": shipped, "modelled_us": modelled, "measured_us": measured}


def test_the_models_error_is_counted_launch_by_launch() -> None:
    right = [row("a", "x", 10.0, 12.0, True), row("a", "y", 20.0, 30.0), row("a", "z", 5.0, None)]
    wrong = [row("b", "x", 10.0, 20.0, True), row("b", "y", 11.0, 25.0), row("b", "z", 12.0, 16.0)]
    blind = [row("c", "x", None, 2.0, True), row("c", "y", None, 1.0)]
    first, second, third = candidates.wrong_by(right + wrong + blind)
    assert (first["ratio"], first["fastest"], first["gain"], first["rank"], first["of"]) == (1.2, "x", 1.0, 1, 2)
    assert (second["ratio"], second["fastest"], second["gain"], second["rank"]) == (2.0, "z", 1.25, 3)
    assert (third["ratio"], third["fastest"], third["gain"], third["rank"]) == (None, "y", 2.0, None)


@pytest.mark.slow
def test_every_launch_that_is_timed_has_a_model() -> None:
    code = (
        "import json\nfrom bench.gpu.candidates import LAUNCHES\nfrom bench.gpu.modelled import modelled\n"
        "for launch in LAUNCHES: print(json.dumps(next(modelled(launch, 'sm_90'))))"
    )
    rows = [json.loads(line) for line in run_uninterpreted("-c", code).splitlines()]
    assert [row["launch"] for row in rows] == [str(launch) for launch in candidates.LAUNCHES]
    for row in rows:
        assert row["problem"] is None
        assert row["modelled_us"] == max(row["floor_us"], row["issue_us"])


def test_candidates_are_the_models_first_and_some_that_it_ranks_lower() -> None:
    (launch, *_) = candidates.LAUNCHES
    shipped = shipped_tiles(launch, "sm_90")
    others = neighbours(launch, "sm_90", shipped)
    said = {words(x): {"modelled_us": float(i), "problem": None} for i, x in enumerate(others)}
    said[words(others[0])]["problem"] = "spills"
    chosen = [words(x) for x in candidates.chosen(launch, "sm_90", said)]
    assert chosen[:4] == [words(x) for x in others[1:5]]
    assert words(others[0]) not in chosen
    sides = [x for x in others[5:] if (x["BLOCK_M"], x["BLOCK_N"]) == (shipped["BLOCK_M"], shipped["BLOCK_N"])]
    assert len({x["num_stages"] for x in sides}) > 1
    lower = set(chosen[4:]) - {words(x) for x in sides}
    assert {words(x) for x in sides} <= set(chosen)
    assert lower

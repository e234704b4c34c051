"""What the kernels compile to for GPUs that are not here: no spills, tensor cores, wide and asynchronous accesses."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bench.static import assembly, baseline, fused
from bench.static import cases as static
from bench.static.__main__ import app
from bench.static.alternatives import alternatives
from bench.static.assembly import Loop, MachineCode
from bench.static.limits import PEAKS
from bench.static.occupancy import occupancy
from bench.static.report import Report
from bench.static.table import reasons, table
from fastbert.tuning.neighbours import shipped_tiles
from fastbert_kernels import tuned
from fastbert_kernels.catalogue import TUNABLE
from fastbert_kernels.tiles import feed_forward_start

NVIDIA = [pytest.param(t, marks=pytest.mark.slow) for t in static.TARGETS if t.startswith("sm_")]
TARGETS = [*NVIDIA, *[pytest.param(t, marks=pytest.mark.slow) for t in static.TARGETS if not t.startswith("sm_")]]
PRODUCTS = ("attention_", "relation_", "feed_forward_")
ROOT = Path(__file__).parents[2]


def _run(*options: str) -> subprocess.CompletedProcess[str]:
    """The tool in a process of its own, where kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.static", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=8 * 3600)


def _written(folder: Path, *options: str) -> dict[str, Any]:
    file = folder / "static.json"
    done = _run("--json", str(file), *options)
    assert file.exists(), done.stdout + done.stderr
    written = json.loads(file.read_text())
    assert written["failures"] == []
    assert done.returncode == bool(written["losses"]), done.stdout + done.stderr
    return written


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every kernel in its representative configurations, on every target."""
    return _written(tmp_path_factory.mktemp("static"))


def _of(written: dict[str, Any], target: str, *kernels: str) -> list[dict[str, Any]]:
    chosen = [r for r in written["reports"] if r["target"] == target and r["case"]["kernel"].startswith(kernels)]
    assert chosen
    return chosen


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(written: dict[str, Any], target: str) -> None:
    compiled = _of(written, target, "")
    assert {r["case"]["kernel"] for r in compiled} == set(static.COMPILED)
    assert len(compiled) == len(static.cases(full=False))


@pytest.mark.parametrize("target", NVIDIA)
def test_nothing_spills(written: dict[str, Any], target: str) -> None:
    machines = [r["machine"] for r in _of(written, target, "")]
    assert [m for m in machines if m["spills"] > 0 or m["stack"] > 0] == []


@pytest.mark.parametrize("target", TARGETS)
def test_products_run_on_the_targets_own_tensor_cores(written: dict[str, Any], target: str) -> None:
    products = [r for r in _of(written, target, *PRODUCTS) if r["case"]["dtype"] != "float32"]
    machines = [r["machine"] for r in products]
    assert all(m["dots"] > 0 for m in machines)
    assert [m for m in machines if m["tensor_core"] == 0] == []
    large = [r["machine"] for r in products if "few rows" not in {x["why"] for x in r["shortfalls"]}]
    assert [m for m in large if m["own_dots"] < m["dots"]] == []


@pytest.mark.parametrize("target", NVIDIA)
def test_loops_copy_their_tiles_asynchronously(written: dict[str, Any], target: str) -> None:
    looping = [r for r in _of(written, target, "") if not r["case"]["kernel"].endswith("forward")]
    looping += _of(written, target, "attention_forward", "relation_forward", "feed_forward_forward")
    assert [r["name"] for r in looping if not r["machine"]["loops"]] == []
    in_parts = [r for r in looping if "in parts" in {x["why"] for x in r["shortfalls"]}]
    assert {r["case"]["dtype"] for r in in_parts} <= {"float32"}
    assert {r["case"]["kernel"].partition("_backward")[0] for r in in_parts} <= {"attention", "relation"}
    looping = [r for r in looping if r not in in_parts]
    assert [r["name"] for r in looping if any(loop["async_copies"] == 0 for loop in r["machine"]["loops"])] == []
    assert {r["name"] for r in looping if r["machine"]["sync_tiles"]} == {
        r["name"] for r in looping if "DPROBS" in r["case"]["flags"] or r["case"]["kernel"] == "feed_forward_backward"
    }


@pytest.mark.parametrize("target", TARGETS)
def test_bandwidth_bound_kernels_move_128_bits_at_a_time(written: dict[str, Any], target: str) -> None:
    device = static.DEVICES[target]
    bound = [r for r in _of(written, target, "") if r["floors"][device]["bound"] == "bandwidth"]
    assert {r["case"]["kernel"] for r in bound} >= {k for k in static.COMPILED if not k.startswith(PRODUCTS)}
    assert [r["name"] for r in bound if r["machine"]["wide_loads"] + r["machine"]["wide_async"] == 0] == []
    streaming = [r for r in bound if r["case"]["kernel"].startswith(("add_layer_norm", "bias_activation", "embed"))]
    assert [r["name"] for r in streaming if r["machine"]["wide_stores"] == 0] == []


@pytest.mark.slow  # of every target
def test_what_falls_short_has_a_reason(written: dict[str, Any]) -> None:
    short = {r["name"]: r["shortfalls"] for r in written["reports"] if r["shortfalls"]}
    assert all(shortfall["because"] for shortfalls in short.values() for shortfall in shortfalls)
    given = {shortfall["why"] for shortfalls in short.values() for shortfall in shortfalls}
    assert given == {"float32", "few rows", "map's edge", "gfx942 copies", "after the product", "in parts"}


@pytest.mark.slow
def test_nothing_is_worse_than_the_baseline(written: dict[str, Any]) -> None:
    if written["not_compared"]:
        pytest.skip(written["not_compared"])
    assert written["losses"] == []


def test_the_baseline_is_of_the_development_set() -> None:
    developed_with = re.search(r"^triton==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert developed_with is not None
    version, entries = baseline.read(baseline.file_of(developed_with[1]))
    assert version == developed_with[1]
    names = {f"{target}: {case}" for case in static.cases(full=False) for target in static.TARGETS}
    assert set(entries) == names


#: A machine that no rule objects to, on sm_90.
GOOD = MachineCode(
    registers=118, spills=0, stack=0, shared=49152, tensor_memory=0, dots=2, own_dots=2, tensor_core=8, async_copies=8,
    wide_async=8, loads=6, wide_loads=4, stores=6, wide_stores=4, exp2=34, transcendental=38, code=872,
    loops=(Loop(tensor_core=8, async_copies=4, loads=0, code=411),), sync_tiles=0,
)  # fmt: skip


def _report(kernel: str = "attention_forward", dtype: str = "bfloat16", width: int = 64, **changed: Any) -> Report:
    flags = {"attention_forward": ("CU_SEQLENS", "ORDER")}.get(kernel, ())
    case = static.Case(kernel, dtype, width, changed.pop("flags", flags), batch=changed.pop("batch", static.BATCH))
    target = changed.pop("target", "sm_90")
    return Report(case, target, static.launch_tiles(case, target), dataclasses.replace(GOOD, **changed))


@pytest.mark.parametrize(
    ("changed", "problems", "reasons"),
    [
        ({}, [], []),
        ({"spills": 2}, ["spills"], []),
        ({"stack": 8}, ["spills"], []),
        ({"shared": 1 << 18}, ["over the limit of shared memory"], []),
        ({"own_dots": 1}, ["products off the tensor cores"], []),
        ({"tensor_core": 0}, ["products off the tensor cores"], []),
        ({"own_dots": 0, "dtype": "float32"}, [], ["float32"]),
        ({"own_dots": 0, "batch": (1092, 30)}, [], ["few rows"]),
        ({"own_dots": 0, "batch": (1092, 30), "target": "sm_80"}, ["products off the tensor cores"], []),
        ({"tensor_core": 0, "batch": (1092, 30)}, ["products off the tensor cores"], []),
        ({"loops": (Loop(8, 0, 4, 411),)}, ["a loop without asynchronous copies"], []),
        ({"loops": (Loop(8, 0, 4, 411),), "target": "gfx942", "shared": 8192}, [], ["gfx942 copies"]),
        ({"sync_tiles": 1}, ["a loop that waits for a tile"], []),
        ({"sync_tiles": 1, "kernel": "attention_backward_dq", "flags": ("DPROBS",)}, [], ["map's edge"]),
        ({"sync_tiles": 4, "kernel": "feed_forward_backward", "width": 768}, [], ["after the product"]),
        ({"sync_tiles": 4, "kernel": "feed_forward_forward", "width": 768}, ["a loop that waits for a tile"], []),
        ({"sync_tiles": 1, "flags": ("CU_SEQLENS", "COLUMNS", "PROBS")}, [], ["gathered map"]),
        ({"wide_loads": 0, "wide_async": 0}, [], []),  # bound by compute
        ({"wide_loads": 0, "wide_async": 0, "kernel": "embed_forward", "width": 768}, ["no 128-bit load"], []),
        ({"wide_loads": 0, "wide_async": 0, "kernel": "embed_forward", "width": 37}, [], ["odd width"]),
    ],
)
def test_problems_and_reasons(changed: dict[str, Any], problems: list[str], reasons: list[str]) -> None:
    report = _report(**changed)
    assert report.problems() == problems
    assert report.reasons() == reasons


@pytest.mark.parametrize(
    ("changed", "loss"),
    [
        ({}, None),
        ({"registers": 126}, None),
        ({"shared": 50000}, None),
        ({"async_copies": 12, "wide_loads": 5}, None),
        ({"spills": 3}, "3 spills, 0 in the baseline"),
        ({"tensor_core": 4}, "4 tensor-core instructions, 8 in the baseline"),
        ({"own_dots": 1}, "1 products on the target's own tensor cores, 2 in the baseline"),
        ({"async_copies": 7}, "7 asynchronous copies, 8 in the baseline"),
        ({"wide_loads": 3}, "11 128-bit loads, 12 in the baseline"),
        ({"wide_stores": 0}, "0 128-bit stores, 4 in the baseline"),
    ],
)
def test_the_baseline_sees_losses(tmp_path: Path, changed: dict[str, Any], loss: str | None) -> None:
    file = tmp_path / "baseline.json"
    baseline.write([_report()], file)
    found = baseline.losses([_report(**changed)], file)
    name = "sm_90: attention_forward bfloat16 64 cu_seqlens+order"
    assert found == ([f"{name}: {loss}. If that is meant: {baseline.COMMAND}"] if loss else [])


def test_every_triton_has_a_baseline_of_its_own() -> None:
    assert baseline.file_of("3.6.1") == baseline.FOLDER / "baseline-3.6.json"
    assert baseline.file_of("3.10.0") == baseline.FOLDER / "baseline-3.10.json"


def test_the_baseline_keeps_in_step(tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    (tmp_path / "baseline-3.5.json").touch()
    with pytest.raises(RuntimeError, match=r"there is no baseline\.json .*only baseline-3\.5\.json"):
        baseline.losses([], file)
    baseline.write([_report(target="sm_80"), _report()], file)
    entries = json.loads(file.read_text())
    file.write_text(json.dumps(entries | {"sm_90: attention_forward bfloat16 65": {}}))
    (new, stale) = baseline.losses([_report(target="sm_100")], file)
    assert new.startswith("sm_100: attention_forward bfloat16 64 cu_seqlens+order: not in the baseline")
    assert stale.startswith("sm_90: attention_forward bfloat16 65: in the baseline, but no longer")
    file.write_text(json.dumps(entries | {"triton": "3.0.0"}))
    with pytest.raises(RuntimeError, match=re.escape("baseline is of Triton 3.0.0")):
        baseline.losses([_report()], file)


def test_a_small_grid_takes_the_time_of_one_program() -> None:
    # On sm_90: 872 instructions of a program, 411 of them in its loop.
    clock = PEAKS["H200"].clock / 1e6
    few = _report(batch=(1, 30))  # 12 programs of two warps, each goes through its loop once and has a scheduler
    assert few.issue == pytest.approx(872 / clock)
    many = _report(batch=(1092, 30))  # 13,104 programs on 132 multiprocessors
    assert many.issue == pytest.approx(872 * 13104 / 132 * 2 / 4 / clock)
    long = _report(batch=(11, 200))  # 264 programs of eight warps, four trips each
    assert long.issue == pytest.approx((872 + 3 * 411) * 2 * 8 / 4 / clock)


@pytest.mark.parametrize(
    ("target", "needs", "warps", "limit"),
    [
        ("sm_90", {"registers": 118, "shared": 49152, "num_warps": 8}, 16, "registers"),
        ("sm_80", {"registers": 168, "shared": 40960, "num_warps": 4}, 12, "registers"),
        ("sm_90", {"registers": 128, "shared": 100 * 1024, "num_warps": 4}, 8, "shared"),
        ("sm_90", {"registers": 32, "shared": 4096, "num_warps": 4}, 64, "warps"),
        ("sm_90", {"registers": 16, "shared": 0, "num_warps": 1}, 32, "programs"),
        ("sm_100", {"registers": 80, "shared": 1024, "num_warps": 8, "tensor_memory": 256}, 16, "tensor memory"),
        ("sm_86", {"registers": 32, "shared": 4096, "num_warps": 4}, 48, "warps"),
        ("sm_86", {"registers": 16, "shared": 0, "num_warps": 1}, 16, "programs"),
        ("sm_120", {"registers": 128, "shared": 40 * 1024, "num_warps": 4}, 8, "shared"),
        ("gfx942", {"registers": 166, "shared": 8192, "num_warps": 4}, 12, "registers"),
        ("gfx942", {"registers": 38, "shared": 33000, "num_warps": 8}, 8, "shared"),
    ],
)
def test_occupancy(target: str, needs: dict[str, int], warps: int, limit: str) -> None:
    found = occupancy(target, **needs)
    assert (found.warps, found.limit) == (warps, limit)
    assert found.share == warps / {"sm_86": 48, "sm_120": 48, "gfx942": 32}.get(target, 64)


def test_the_estimate_of_fused_products() -> None:
    report = _report("feed_forward_forward", width=384)
    assert fused.is_estimated(report)
    product, activation = 2 * 32768 * 384 * 1536 / 790e12, (2 * 32768 * 1536 + 1536) * 2 / 4.3e12
    # 3,072 tiles by four warps, each with what stands outside of the loop.
    after = 3072 * 4 * (GOOD.code - GOOD.loops[0].code) / (4 * 132 * 1.98e9)
    together, apart = fused.times(report)
    assert together == pytest.approx((product / 0.8 + after) * 1e6)
    assert apart == pytest.approx((product + activation) * 1e6)
    assert fused.is_fused(report) == (together <= 0.95 * apart)
    assert not fused.is_estimated(_report("feed_forward_forward", width=384, flags=("PRE",)))
    # An L4 waits for the bytes of the product, however fast it multiplies.
    slow = _report("feed_forward_forward", width=384, target="sm_89")
    moved = ((384 + 1536) * 32768 * 2 + 384 * 1536 * 2 + 1536 * 2) / 0.3e12
    assert fused.times(slow)[1] == pytest.approx((moved + activation * 4.3e12 / 0.3e12) * 1e6)


@pytest.mark.slow
def test_products_are_fused_only_where_the_estimate_holds(written: dict[str, Any]) -> None:
    rows = [r for r in written["reports"] if r["case"]["kernel"] == "feed_forward_forward" and not r["case"]["flags"]]
    for row in rows:
        case = static.Case(**row["case"] | {"flags": ()})
        machine = MachineCode(**row["machine"] | {"loops": tuple(Loop(**loop) for loop in row["machine"]["loops"])})
        report = Report(case, row["target"], row["tiles"], machine)
        shipped = feed_forward_start(report.target, case.width) is not None
        assert not shipped or (fused.is_estimated(report) and fused.is_fused(report)), fused.line(report)


SASS = """
        /*0000*/                   LDG.E.128 R4, [R2] ;
.L_x_1:
        /*0010*/              @!P0 BRA `(.L_x_0) ;
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2], P0 ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
.L_x_3:
        /*0040*/               @P1 BRA `(.L_x_3) ;
        /*0050*/                   BRA `(.L_x_1) ;
.L_x_0:
        /*0060*/                   LDG.E.U16 R5, [R2] ;
        /*0070*/               @P0 BRA `(.L_x_0) ;
        /*0080*/              @!P2 EXIT ;
        /*0090*/                   EXIT ;
.L_x_4:
        /*00a0*/                   LDG.E R5, [R2] ;
        /*00b0*/                   BRA `(.L_x_1) ;
"""


def test_loops_are_found_in_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def tool(name: str, *_: str | Path) -> str:
        return SASS if name == "nvdisasm" else "Function k:\n  REG:40 STACK:8 SHARED:0"

    class Compiled:
        asm = {"cubin": b""}  # noqa: RUF012
        metadata = type("", (), {"target": static.TARGETS["sm_80"]})

    monkeypatch.setattr(assembly, "_tool", tool)
    read = assembly._read_nvidia(Compiled)
    # Tested at its top with a wait inside; tested at its bottom; and a wait behind the end, which is none.
    assert read["loops"] == (Loop(1, 1, 0, 5), Loop(0, 0, 1, 2))
    assert (read["registers"], read["stack"], read["wide_async"]) == (40, 8, 1)
    assert (read["wide_loads"], read["loads"], read["tensor_core"]) == (1, 3, 1)


def test_what_is_compiled_is_what_ships_whatever_a_user_measured() -> None:
    for case in static.cases(full=True):
        launch = case.launch
        if launch.kernel not in TUNABLE:
            continue
        table = {launch: {"BLOCK_M": 1, "BLOCK_N": 1, "num_warps": 1, "num_stages": 1}}
        for target in static.TARGETS:
            shipped = shipped_tiles(launch, target)
            with tuned.in_force(torch.device("cpu"), table):
                assert static.launch_tiles(case, target) == shipped


def test_a_loop_around_all_of_a_kernel_ends_it_on_a_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    def tool(name: str, *_: str | Path) -> str:
        persistent = SASS.replace(" EXIT ;\n.L_x_4", " BRA `(.L_x_1) ;\n.L_x_4")
        return persistent if name == "nvdisasm" else "Function k:\n  REG:40 STACK:0 SHARED:0"

    class Compiled:
        asm = {"cubin": b""}  # noqa: RUF012
        metadata = type("", (), {"target": static.TARGETS["sm_80"]})

    monkeypatch.setattr(assembly, "_tool", tool)
    assert assembly._read_nvidia(Compiled)["loops"] == (Loop(1, 1, 0, 5), Loop(0, 0, 1, 2))


def test_the_shipped_tiles_lead_their_alternatives() -> None:
    case = static.Case("attention_backward_dkv", "bfloat16", 64, ("CU_SEQLENS",))
    tried = alternatives(case, "sm_90")
    assert tried[0] == static.launch_tiles(case, "sm_90")
    assert len({tuple(tiles.values()) for tiles in tried}) == len(tried) > 8
    assert {tiles["BLOCK_N"] for tiles in tried} >= {64, 128}
    assert all(tiles["BLOCK_N"] >= 64 for tiles in tried)  # rows of the products on sm_90's own tensor cores
    rows = alternatives(static.Case("embed_forward", "bfloat16", 768), "sm_90")
    assert {tiles["BLOCK_N"] for tiles in rows} == {1024}
    products = alternatives(static.Case("feed_forward_backward", "bfloat16", 768, activation="gelu"), "sm_90")
    assert all(tiles.keys() == products[0].keys() for tiles in products)
    assert {tiles["num_stages"] for tiles in products} == {2, 3, 4}


def test_the_table_tells_what_ships_and_why() -> None:
    good, other = _report(), _report(dtype="float32", own_dots=0)
    shown = table([good, other], "title", shipped=[good])
    assert shown.row_count == 3
    cells = [list(column.cells) for column in shown.columns]
    assert cells[0] == [
        "[bold]attention_forward[/]",
        "  bfloat16 64 cu_seqlens+order [green]shipped[/]",
        "  float32 64 cu_seqlens+order",
    ]
    assert cells[-1] == ["float32"] or cells[-1][-1] == "float32"
    (told,) = reasons([good, other])
    assert told.startswith("float32: its products are exact")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "sm_70"], "unknown target sm_70: there are sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx942"),
        (["--kernel", "convolution"], "no case has the words 'convolution'"),
        (["--write-baseline", "--full"], "takes all the main cases"),
        (["--json", "no/such/folder/x.json"], "there is no folder"),
    ],
)
def test_bad_options(options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, options, env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert done.exit_code == 2
    assert message in done.output


def test_words_choose_cases() -> None:
    case = static.Case("attention_forward", "bfloat16", 64, ("CU_SEQLENS", "DROPOUT"), batch=(1092, 30))
    assert all(case.matches(text) for text in ("", "attention", "forward 64 dropout", "BFLOAT16 cu", "64 1092x30"))
    assert not any(case.matches(text) for text in ("32", "64 probs", "float32", "backward"))


def test_the_interpreter_is_an_error() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "bench.static"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "unset TRITON_INTERPRET" in done.stdout


def test_an_argument_that_no_table_knows_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    case = static.Case("column_sums", "bfloat16", 768)
    tiles = static.launch_tiles(case, "sm_90")
    assert set(static.arguments(case, tiles)) >= {"third_ptr", "BLOCK_M"}
    monkeypatch.delitem(static._POINTERS, "third_ptr")
    with pytest.raises(KeyError, match="does not know third_ptr"):
        static.arguments(case, tiles)


@pytest.mark.sweep
@pytest.mark.parametrize("target", static.TARGETS)
def test_everything_that_ships(tmp_path: Path, target: str) -> None:
    written = _written(tmp_path, "--full", "--target", target)
    assert len(written["reports"]) == len(static.cases(full=True))

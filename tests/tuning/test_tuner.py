"""The tuner: what reaches a launch, and what is kept of tiles that are fast, wrong, slow or broken."""

import functools
import sys
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastbert.benchmark.timing import Run, Times
from fastbert.tuning import tuner
from fastbert.tuning.launches import COMMON, Widths, launches
from fastbert.tuning.neighbours import neighbours, shipped_tiles
from fastbert.tuning.problems import Sizes, all_switches, checked_problem, timed_switches
from fastbert.tuning.tuner import FLOOR, Outcome, tune, words
from fastbert_kernels import reference, tuned
from fastbert_kernels.backend import arch
from fastbert_kernels.catalogue import TUNABLE, Launch, Tiles
from fastbert_kernels.launch import wrap_triton

SMALL = Sizes(lengths=(6, 5), tokens=12, heads=1, ragged=(1, 17), even=(17, 17), rows=20, vocabulary=9)
TILE_KEYS = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
GELU = Launch("bias_activation_forward", torch.float32, 16)
NORM = Launch("add_layer_norm_forward", torch.float32, 16)

Change = Callable[[str, dict[str, Any]], dict[str, Any]]


@pytest.fixture
def cuda_index(device: torch.device) -> torch.device:
    return torch.device("cuda", 0) if device.type == "cuda" else device


@pytest.fixture
def on_launch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], None]:
    """Have every launch of a kernel whose tiles can be measured go through `change(kernel, arguments)`."""

    def install(change: Change) -> None:
        class Spied:
            def __init__(self, kernel: Any) -> None:
                self.kernel = kernel

            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
                name = self.kernel.fn.__name__.lstrip("_")
                if name not in TUNABLE:
                    return wrap_triton(self.kernel)[grid]
                return lambda **arguments: wrap_triton(self.kernel)[grid](**change(name, arguments))

        for where, module in list(sys.modules.items()):
            if where.startswith("fastbert_kernels.") and hasattr(module, "wrap_triton"):
                monkeypatch.setattr(module, "wrap_triton", Spied)

    return install


def short(launch: Launch) -> Launch:
    """The launch at `SMALL` sizes."""
    return launch._replace(up_to=32) if launch.traits.op == "attention" else launch


def tiles_like(shipped: Tiles, *rows: int) -> list[Tiles]:
    return [shipped | {"BLOCK_M": row} for row in rows]


def timer_of(seconds: Mapping[int, float], spread: float = 0.0) -> tuner.Timer:
    """A timer by BLOCK_M; tiles not named take 1 second."""

    def time(runs: Mapping[str, Run], device: torch.device) -> dict[str, Times]:
        found = {}
        for name, run in runs.items():
            run()
            median = seconds.get(int(name.partition("x")[0]), 1.0)
            found[name] = Times(median * (1 - spread), median, median * (1 + spread), 5)
        return found

    return time


def measure(launch: Launch, device: torch.device, rows: tuple[int, ...], timer: tuner.Timer, **more: Any) -> Outcome:
    candidates = functools.partial(lambda launch, target, shipped: tiles_like(shipped, *rows))
    (outcome,) = tune([launch], device, sizes=SMALL, candidates=candidates, timer=timer, **more)
    return outcome


# Launches


@pytest.mark.parametrize("kernel", TUNABLE)
def test_measured_tiles_reach_their_launch_and_no_other(
    tuned_folder: Any, cuda_index: torch.device, on_launch: Callable[[Change], None], kernel: str
) -> None:
    launch = short(Launch(kernel, torch.float32, 16))
    seen: dict[str, list[Tiles]] = {}

    def record(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        seen.setdefault(name, []).append({key: arguments[key] for key in TILE_KEYS})
        return arguments

    on_launch(record)
    problem = checked_problem(launch, timed_switches(launch)[0], SMALL, cuda_index)
    shipped = tuner.results_of(problem, truth=False)
    table = shipped_tiles(launch, arch(cuda_index))
    assert seen[kernel] == [{key: table[key] for key in TILE_KEYS}]
    others, before = {name: tiles for name, tiles in seen.items() if name != kernel}, seen[kernel][0]
    tiles = before | {"BLOCK_M": before["BLOCK_M"] // 2 if launch.traits.attends else before["BLOCK_M"] * 2}
    entry = {"kernel": kernel, "dtype": "float32", "width": 16, "maps": False, "up_to": launch.up_to, "tf32": False}
    entry["tiles"] = tiles
    tuned.write(tuned.kind(cuda_index), [entry], {})
    tuned._tables.clear()
    tuned._read.cache_clear()
    seen.clear()
    torch.testing.assert_close(tuner.results_of(problem, truth=False), shipped, rtol=1e-5, atol=1e-5)
    assert seen == others | {kernel: [tiles]}


def test_a_models_launches() -> None:
    found = launches((Widths(384, 1536, 32),), torch.float16, full=False)
    assert {(x.kernel, x.width) for x in found} == {
        *((f"attention_{part}", 32) for part in ("forward", "backward_dq", "backward_dkv")),
        *((f"{op}_{way}", 384) for op in ("add_layer_norm", "embed") for way in ("forward", "backward")),
        *((f"bias_activation_{way}", 1536) for way in ("forward", "backward")),
        *((f"feed_forward_{way}", 384) for way in ("forward", "backward")),
    }
    full = launches(COMMON, torch.bfloat16, full=True)
    assert len(full) == len(set(full))
    assert {x.kernel for x in full} == set(TUNABLE)
    assert {(x.width, x.maps, x.up_to) for x in full if x.kernel == "attention_forward"} == {
        (width, maps, up_to) for width in (32, 64) for maps in (False, True) for up_to in (32, None)
    }
    by_length = launches(COMMON, torch.bfloat16, full=False, named=("attention_forward",), lengths=(128, 40, 64))
    assert {x.up_to for x in by_length} == {64, None}
    assert {x.kernel for x in launches(COMMON, torch.bfloat16, full=True, named=("relation", "embed_f"))} == {
        *(kernel for kernel in TUNABLE if kernel.startswith("relation_")),
        "embed_forward",
    }


def test_launches_follow_where_torch_is_told_of_tf32() -> None:
    matmul = torch.backends.cuda.matmul
    before, found = matmul.fp32_precision, {}
    try:
        for matmul.fp32_precision in ("ieee", "tf32"):
            for dtype in (torch.float32, torch.bfloat16):
                every = launches(COMMON, dtype, full=True)
                found[matmul.fp32_precision, dtype] = {x.traits.op for x in every if x.tf32}
    finally:
        matmul.fp32_precision = before
    rounded = {key: ops for key, ops in found.items() if ops}
    assert rounded == {("tf32", torch.float32): {"attention", "relation"}}


def test_all_neighbours_are_tiles_that_a_file_may_hold() -> None:
    for launch in launches(COMMON, torch.bfloat16, full=True):
        for target in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"):
            shipped = shipped_tiles(launch, target)
            for tiles in neighbours(launch, target, shipped):
                groups = launch.traits.multiplies and launch.up_to is None and target in ("sm_90", "sm_100")
                assert tiles["num_warps"] >= 4 or not groups
                entry = Outcome(launch, shipped, tiles, kept=True).entry()
                assert tuned.read_entry(entry) == (launch, {key: tiles[key] for key in TILE_KEYS})


@pytest.mark.parametrize(
    ("kernel", "side", "other"),
    [
        ("attention_backward_dq", "BLOCK_M", "BLOCK_N"),
        ("attention_backward_dkv", "BLOCK_N", "BLOCK_M"),
        ("relation_backward_a", "BLOCK_M", "BLOCK_N"),
        ("relation_backward_b", "BLOCK_N", "BLOCK_M"),
    ],
)
def test_the_first_side_of_a_product_is_what_tensor_cores_take(kernel: str, side: str, other: str) -> None:
    for target in ("sm_90", "sm_100"):
        launch = Launch(kernel, torch.bfloat16, 64)
        found = neighbours(launch, target, shipped_tiles(launch, target))
        assert min(tiles[side] for tiles in found) == 64
        assert min(tiles[other] for tiles in found) < 64


# What is kept


def test_the_fastest_right_tiles_are_kept(cuda_index: torch.device) -> None:
    outcome = measure(GELU, cuda_index, (32, 64, 128), timer_of({32: 0.9, 64: 0.5, 128: 0.7}))
    assert outcome.kept
    assert outcome.best is not None
    assert outcome.best["BLOCK_M"] == 64
    assert outcome.refused == []
    assert [(shape.shipped.median, shape.best.median) for shape in outcome.shapes] == [(1.0, 0.5)]
    assert tuned.read_entry(outcome.entry()) == (GELU, outcome.best)


def test_fast_but_wrong_tiles_are_refused(cuda_index: torch.device, on_launch: Callable[[Change], None]) -> None:
    on_launch(lambda name, given: given | ({"ACTIVATION": "relu"} if given["BLOCK_M"] == 64 else {}))
    outcome = measure(GELU, cuda_index, (64, 32), timer_of({64: 0.1, 32: 0.9}))
    assert outcome.kept
    assert outcome.best is not None
    assert outcome.best["BLOCK_M"] == 32
    (line,) = outcome.refused
    assert line.startswith("64x128, 4 warps, 1 stages: wrong with bias+gelu: its error ")


def test_tiles_wrong_in_a_call_that_is_not_timed_are_refused(
    cuda_index: torch.device, on_launch: Callable[[Change], None]
) -> None:
    on_launch(
        lambda name, given: given | ({"ACTIVATION": "relu"} if (given["BLOCK_M"], given["HAS_BIAS"]) == (64, 0) else {})
    )
    outcome = measure(GELU, cuda_index, (64,), timer_of({64: 0.1}))
    assert not outcome.kept
    assert outcome.best is None
    assert outcome.shapes == []
    (line,) = outcome.refused
    assert ": wrong with gelu: " in line


def test_tiles_that_draw_another_mask_are_refused(
    cuda_index: torch.device, on_launch: Callable[[Change], None]
) -> None:
    rows = 2 * shipped_tiles(NORM, arch(cuda_index))["BLOCK_M"]
    on_launch(lambda name, given: given | ({"site": 8} if (name, given["BLOCK_M"]) == (NORM.kernel, rows) else {}))
    outcome = measure(NORM, cuda_index, (rows,), timer_of({rows: 0.1}))
    assert not outcome.kept
    (line,) = outcome.refused
    assert ": wrong with bias+residual+dropout: " in line


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_element_of_a_mask_drawn_wrongly_shows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Launch("attention_forward", dtype, 32)
    problem = checked_problem(launch, ("CU_SEQLENS", "DROPOUT", "FLAT"), Sizes(), torch.device("cpu"))
    truth = tuner.results_of(problem, truth=True)
    own = [x.detach().requires_grad_() for x in problem.inputs]
    rounded = problem.definition(*own)
    errors = tuner.errors_of([rounded[0]], truth[:1])
    right = reference.dropout_keep_map

    def flipped(*arguments: Any) -> torch.Tensor:
        keep = right(*arguments).clone()
        keep[-1, -1, -1] = ~keep[-1, -1, -1]
        return keep

    monkeypatch.setattr(reference, "dropout_keep_map", flipped)
    wrong = tuner.errors_of(tuner.results_of(problem, truth=True), truth)
    assert wrong[0] > 2 * errors[0] + FLOOR
    assert wrong[1] > 2 * errors[0] + FLOOR  # of the gradient, whose roundings are as large


def test_tiles_that_fail_are_told_and_the_rest_goes_on(
    cuda_index: torch.device, on_launch: Callable[[Change], None]
) -> None:
    def fail(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if arguments["BLOCK_M"] == 64:
            raise RuntimeError("out of shared memory\nand more")
        return arguments

    on_launch(fail)
    outcome = measure(GELU, cuda_index, (64, 32), timer_of({32: 0.5}))
    assert outcome.kept
    assert outcome.refused == ["64x128, 4 warps, 1 stages: failed with bias+gelu: RuntimeError: out of shared memory"]


def test_tiles_that_spill_are_refused(cuda_index: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, Any] = {}

    def loaded(kernel: str) -> dict[int, Any]:
        seen[len(seen)] = SimpleNamespace(n_spills=6)
        return dict(seen)

    monkeypatch.setattr(tuner, "loaded", loaded)
    outcome = measure(GELU, cuda_index, (32,), timer_of({32: 0.5}))
    assert not outcome.kept
    assert outcome.refused == ["32x128, 4 warps, 1 stages: spills 6 registers with bias+gelu"]


def test_tiles_that_spill_are_refused_where_another_width_had_them_compiled(
    cuda_index: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[dict[int, Any]] = [{}]
    monkeypatch.setattr(tuner, "loaded", lambda kernel: loaded.pop() if loaded else {0: SimpleNamespace(n_spills=6)})
    outcomes = tune(
        [GELU, GELU._replace(width=32)],
        cuda_index,
        sizes=SMALL,
        candidates=lambda launch, target, shipped: tiles_like(shipped, 32),
        timer=timer_of({32: 0.5}),
    )
    assert [x.refused for x in outcomes] == 2 * [["32x128, 4 warps, 1 stages: spills 6 registers with bias+gelu"]]


@pytest.mark.parametrize(
    ("seconds", "spread", "margin", "kept"),
    [
        (0.98, 0.0, 0.03, False),
        (0.96, 0.0, 0.03, True),
        (0.96, 0.0, 0.05, False),
        (0.96, 0.1, 0.03, False),  # within the spread
        (1.5, 0.0, 0.03, False),
    ],
)
def test_little_is_not_enough(
    cuda_index: torch.device, seconds: float, spread: float, margin: float, kept: bool
) -> None:
    outcome = measure(GELU, cuda_index, (32,), timer_of({32: seconds}, spread), margin=margin)
    assert outcome.kept == kept
    assert outcome.best is not None  # told all the same
    assert outcome.shapes[0].best.median == seconds


def _by_call(*seconds: float) -> tuner.Timer:
    """A timer whose first candidate takes these times in turn, the shipped tiles 1 second."""
    left = list(seconds)

    def time(runs: Mapping[str, Run], device: torch.device) -> dict[str, Times]:
        shipped, *others = runs
        now = left.pop(0)
        return {shipped: Times(1, 1, 1, 5)} | {name: Times(now, now, now, 5) for name in others}

    return time


def test_faster_once_is_not_enough(cuda_index: torch.device) -> None:
    outcome = measure(GELU, cuda_index, (32,), _by_call(0.5, 1.0))
    assert not outcome.kept
    assert outcome.refused == ["32x128, 4 warps, 1 stages: faster in one round, not in another"]


def test_slower_in_one_shape_is_too_slow(cuda_index: torch.device) -> None:
    rows = 2 * shipped_tiles(NORM, arch(cuda_index))["BLOCK_M"]
    refused = measure(NORM, cuda_index, (rows,), _by_call(0.2, 1.1, 0.2, 1.1))
    assert (refused.kept, refused.refused) == (False, [])
    outcome = measure(NORM, cuda_index, (rows,), _by_call(0.2, 1.0, 0.2, 1.0))
    assert outcome.kept
    assert [shape.name for shape in outcome.shapes] == ["12 rows", "12 rows, dropout"]


def test_what_was_kept_is_in_force_for_the_next_launch(
    cuda_index: torch.device, on_launch: Callable[[Change], None]
) -> None:
    backward = GELU._replace(kernel="bias_activation_backward")
    seen: list[int] = []

    def record(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if name == GELU.kernel:
            seen.append(arguments["BLOCK_M"])
        return arguments

    on_launch(record)
    measuring = tune(
        [GELU, backward],
        cuda_index,
        sizes=SMALL,
        candidates=lambda launch, target, shipped: tiles_like(shipped, 32),
        timer=timer_of({32: 0.5}),
    )
    next(measuring)
    seen.clear()
    next(measuring)
    assert set(seen) == {32}
    assert tuned.measured(cuda_index) == {}  # not the process's


def test_the_table_given_is_brought_up_to_date(cuda_index: torch.device) -> None:
    table: tuned.Table = {NORM: shipped_tiles(NORM, arch(cuda_index)), GELU: {}}
    measure(GELU, cuda_index, (32,), timer_of({32: 0.5}), table=table)
    assert table[GELU]["BLOCK_M"] == 32
    measure(GELU, cuda_index, (64,), timer_of({64: 1.5}), table=table)
    assert table.keys() == {NORM}


def test_both_kinds_of_forward_product_are_timed(cuda_index: torch.device, on_launch: Callable[[Change], None]) -> None:
    seen: list[bool] = []

    def record(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        seen.append(arguments["HAS_PRE"])
        return arguments

    on_launch(record)
    launch = Launch("feed_forward_forward", torch.bfloat16, 16)
    for on in timed_switches(launch):
        tuner.results_of(checked_problem(launch, on, SMALL, cuda_index), truth=False)
    assert seen == [False, True]


def test_wrong_shipped_tiles_end_the_launch_and_not_the_run(
    cuda_index: torch.device, on_launch: Callable[[Change], None]
) -> None:
    on_launch(lambda name, given: given | ({"ACTIVATION": "relu"} if given["BLOCK_M"] == 16 else {}))
    outcome = measure(GELU, cuda_index, (32,), timer_of({32: 0.5}))
    assert not outcome.kept
    (line,) = outcome.refused
    assert line.startswith("the shipped 16x128, 4 warps, 1 stages: ValueError: wrong with bias+gelu")


@pytest.mark.slow
@pytest.mark.parametrize("kernel", TUNABLE)
def test_every_call_has_its_definition(cuda_index: torch.device, kernel: str) -> None:
    for maps in (False, True) if kernel.startswith("attention_") else (False,):
        launch = short(Launch(kernel, torch.bfloat16, 16, maps))
        shipped = shipped_tiles(launch, arch(cuda_index))
        rows = shipped["BLOCK_M"] // 2 if launch.traits.attends else shipped["BLOCK_M"] * 2
        outcome = measure(launch, cuda_index, (rows,), timer_of({rows: 0.5}))
        assert (outcome.kept, outcome.refused) == (True, [])
        assert {on for call in all_switches(launch) for on in call} >= {"CU_SEQLENS"} if launch.traits.attends else True


@pytest.mark.gpu
def test_a_gpu_is_measured() -> None:
    outcomes = list(
        tune(
            [Launch("bias_activation_forward", torch.bfloat16, 3072), Launch("attention_forward", torch.bfloat16, 64)],
            torch.device("cuda", 0),
            sizes=Sizes(lengths=(128,), tokens=4096),
            candidates=lambda launch, target, shipped: neighbours(launch, target, shipped)[:4],
            timer=functools.partial(tuner.flushed, seconds=0.0),
        )
    )
    for outcome in outcomes:
        assert not any("the shipped" in line or "wrong" in line for line in outcome.refused)
        assert all(shape.shipped.median > 0 for shape in outcome.shapes)


@pytest.mark.gpu
def test_a_gpu_tells_of_spills() -> None:
    launch = Launch("attention_forward", torch.bfloat16, 128)
    huge = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 1, "num_stages": 1}
    (outcome,) = tune(
        [launch], torch.device("cuda", 0), sizes=SMALL, candidates=lambda *given: [huge], timer=timer_of({})
    )
    assert not outcome.kept
    (line,) = outcome.refused
    assert line.startswith(words(huge))
    assert "spills" in line or "failed" in line

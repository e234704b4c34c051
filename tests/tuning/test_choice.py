"""The choice between fused products and cuBLAS's: what is measured, when it is kept, and that it reaches the op."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from fastbert.benchmark.timing import Run, Times
from fastbert.tuning import choice, tuner
from fastbert.tuning.choice import Choice, choose
from fastbert.tuning.launches import COMMON, Widths, launches, products
from fastbert.tuning.problems import Sizes
from fastbert_kernels import backend, feed_forward, feed_forward_is_fused, tiles, tuned
from fastbert_kernels.catalogue import Launch, Product

GELU = Product(torch.bfloat16, 16, "gelu")


@pytest.fixture
def cuda_index(device: torch.device) -> torch.device:
    return torch.device("cuda", 0) if device.type == "cuda" else device


@pytest.fixture
def ships(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Set the number of tokens from which on products are fused as shipped."""

    def install(start: int | None) -> None:
        monkeypatch.setattr(choice, "feed_forward_start", lambda target, hidden: start)

    return install


def timer_of(fused: Mapping[int, float], *, training: float = 1.0, seen: list[str] | None = None) -> tuner.Timer:
    """A timer: cuBLAS takes 1 second, fused products this by the number of tokens, in training so many times that."""

    def time(runs: Mapping[str, Run], device: torch.device) -> dict[str, Times]:
        assert set(runs) == {"cuBLAS", "fused"}
        result = runs["fused"]()
        training_now = len(result) > 1
        tokens = result[0].shape[0]
        if seen is not None:
            seen.append(f"{tokens}{' training' if training_now else ''}")
        seconds = fused.get(tokens, 2.0) * (training if training_now else 1.0)
        return {"cuBLAS": Times(1, 1, 1, 5), "fused": Times(seconds, seconds, seconds, 5)}

    return time


def measure(device: torch.device, timer: tuner.Timer, tokens: int = 64, **more: Any) -> Choice:
    (found,) = choose([GELU], device, sizes=Sizes(tokens=tokens, rows=20), timer=timer, **more)
    return found


def ways(found: Choice) -> list[tuple[str, tuple[str, str], bool]]:
    return [(shape.name, shape.between, shape.kept) for shape in found.shapes]


def test_products_are_fused_from_where_they_are_faster(
    cuda_index: torch.device, ships: Callable[[int | None], None]
) -> None:
    ships(None)
    found = measure(cuda_index, timer_of({64: 0.5, 32: 0.9, 16: 1.0, 8: 0.1}))
    assert (found.start, found.kept, found.refused) == (32, True, [])
    other = ("cuBLAS", "fused")
    assert ways(found) == [
        ("64 rows", other, True),
        ("64 rows, training", other, True),
        ("32 rows", other, True),
        ("32 rows, training", other, True),
        ("16 rows", other, False),
        ("16 rows, training", other, False),
    ]
    assert tuned.read_entry(found.entry()) == (GELU, 32)
    assert str(found) == "feed_forward_fused bfloat16 16 gelu: fused from 32 tokens on, shipped never fused"


@pytest.mark.slow
def test_down_to_the_last_halving(cuda_index: torch.device, ships: Callable[[int | None], None]) -> None:
    ships(None)
    seen: list[str] = []
    always = dict.fromkeys((64, 32, 16, 8, 4, 2, 1), 0.5)
    assert measure(cuda_index, timer_of(always, seen=seen)).start == 2
    assert seen == [f"{n}{way}" for n in (64, 32, 16, 8, 4, 2) for _ in range(2) for way in ("", " training")]
    assert measure(cuda_index, timer_of(always), tokens=2).start == 1


def test_what_ships_fused_goes_where_cublas_is_faster(
    cuda_index: torch.device, ships: Callable[[int | None], None]
) -> None:
    ships(16)
    found = measure(cuda_index, timer_of({64: 1.0, 32: 0.9, 16: 1.2}))
    assert (found.start, found.kept) == (32, True)
    assert ways(found)[-1] == ("16 rows, training", ("fused", "cuBLAS"), True)
    never = measure(cuda_index, timer_of({}))
    assert (never.start, never.kept, len(never.shapes)) == (None, True, 2)
    assert tuned.read_entry(never.entry()) == (GELU, None)
    assert str(never).endswith(": never fused, shipped fused from 16 tokens on")


@pytest.mark.parametrize("shipped", [None, 16, 1000])
def test_what_is_shipped_stays_without_a_gain(
    cuda_index: torch.device, ships: Callable[[int | None], None], shipped: int | None
) -> None:
    ships(shipped)
    found = measure(cuda_index, timer_of(dict.fromkeys((64, 32, 16, 8), 0.99)))
    assert (found.start, found.kept) == (shipped, False)
    assert not any(shape.kept for shape in found.shapes)
    assert str(found).endswith("as shipped")


def test_slower_in_training_is_too_slow(cuda_index: torch.device, ships: Callable[[int | None], None]) -> None:
    ships(None)
    assert not measure(cuda_index, timer_of({64: 0.5}, training=2.1)).kept
    assert measure(cuda_index, timer_of({64: 0.5}, training=1.9)).kept


def test_faster_once_is_not_enough(cuda_index: torch.device, ships: Callable[[int | None], None]) -> None:
    ships(None)
    left = [0.5, 0.5, 1.0, 1.0]

    def time(runs: Mapping[str, Run], device: torch.device) -> dict[str, Times]:
        now = left.pop(0)
        return {"cuBLAS": Times(1, 1, 1, 5), "fused": Times(now, now, now, 5)}

    found = measure(cuda_index, time)
    assert not found.kept
    assert found.refused == ["64 tokens: fused in one round, not in another"]


def test_wrong_fused_products_are_not_timed(
    cuda_index: torch.device, ships: Callable[[int | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ships(None)

    def wrong(*inputs: Any) -> torch.Tensor:
        *tensors, activation, fused = inputs
        return feed_forward(*tensors, "relu" if fused else activation, fused)

    monkeypatch.setattr("fastbert.tuning.problems.feed_forward", wrong)
    found = measure(cuda_index, timer_of({64: 0.1}))
    assert (found.kept, found.shapes) == (False, [])
    (line,) = found.refused
    assert line.startswith("fused products are wrong: their error ")


def test_a_way_that_fails_is_told(cuda_index: torch.device, ships: Callable[[int | None], None]) -> None:
    ships(8)

    def broken(runs: Mapping[str, Run], device: torch.device) -> dict[str, Times]:
        raise RuntimeError("out of memory\nand more")

    found = measure(cuda_index, broken)
    assert (found.start, found.kept, found.shapes) == (8, False, [])
    assert found.refused == ["RuntimeError: out of memory"]


def test_both_ways_run_with_the_tables_tiles(cuda_index: torch.device, ships: Callable[[int | None], None]) -> None:
    ships(None)
    launch = Launch("feed_forward_forward", torch.bfloat16, 16)
    table: tuned.Table = {launch: {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}, GELU: 7}
    seen = []

    def time(runs: Mapping[str, Run], device: torch.device) -> dict[str, Times]:
        seen.append(tuned.measured(device)[launch]["BLOCK_M"])
        return dict.fromkeys(runs, Times(1, 1, 1, 5))

    assert not measure(cuda_index, time, table=table).kept
    assert seen == [32, 32]
    assert table.keys() == {launch}  # no longer what an earlier run said
    measure(cuda_index, timer_of({64: 0.5}), table=table)
    assert table[GELU] == 64
    assert tuned.measured(cuda_index) == {}  # not the process's


def test_what_is_kept_decides_in_another_process(
    tuned_folder: Any, cuda_index: torch.device, ships: Callable[[int | None], None]
) -> None:
    ships(None)
    x, weight = (torch.zeros(*shape, dtype=torch.bfloat16, device=cuda_index) for shape in ((32, 16), (64, 16)))
    with backend("triton"):
        assert not feed_forward_is_fused(x, weight, "gelu")
        found = measure(cuda_index, timer_of({64: 0.5, 32: 0.5}))
        tuned.write(tuned.kind(cuda_index), [found.entry()], {})
        tuned._tables.clear()
        tuned._read.cache_clear()
        assert feed_forward_is_fused(x, weight, "gelu")
        assert not feed_forward_is_fused(x[:31], weight, "gelu")


# What is measured


def test_a_models_products() -> None:
    assert products(COMMON, torch.bfloat16) == [Product(torch.bfloat16, hidden, "gelu") for hidden in (768, 1024, 384)]
    silu = Widths(384, 1536, 32, "silu")
    assert products((silu, silu), torch.float16) == [Product(torch.float16, 384, "silu")]
    assert products(COMMON, torch.float16, ("feed_forward",)) == products(COMMON, torch.float16)
    assert products(COMMON, torch.float16, ("feed_forward_forward", "attention")) == []


@pytest.mark.parametrize(
    ("widths", "dtype"),
    [
        (COMMON[0], torch.float32),
        (Widths(768, 3072, 64, "gelu_tanh"), torch.bfloat16),
        (Widths(768, 3072, 64, None), torch.bfloat16),
        (Widths(100, 400, 25), torch.bfloat16),
        (Widths(768, 3070, 64), torch.bfloat16),
    ],
)
def test_products_that_cannot_be_fused_are_not_measured(widths: Widths, dtype: torch.dtype) -> None:
    assert products((widths,), dtype) == []
    assert launches((widths,), dtype, full=True, named=("feed_forward",)) == []


@pytest.mark.parametrize(
    ("name", "activation"), [("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("relu", "relu"), ("mish", None), ("?", None)]
)
def test_a_configurations_activation(name: str, activation: str | None) -> None:
    from transformers import BertConfig

    assert Widths.of(BertConfig(hidden_act=name)) == Widths(768, 3072, 64, activation)


@pytest.mark.gpu
def test_a_gpu_is_measured() -> None:
    (found,) = choose(
        [Product(torch.bfloat16, 384, "gelu")],
        torch.device("cuda", 0),
        sizes=Sizes(tokens=4096),
        timer=lambda runs, device: tuner.flushed(runs, device, seconds=0.0),
    )
    assert found.shapes
    assert not any("wrong" in line or "Error" in line for line in found.refused)
    assert tiles.feed_forward_start(tiles.arch(torch.device("cuda", 0)), 384) == found.shipped

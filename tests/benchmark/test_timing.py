"""Rounds, quantiles, and the limits of how long a timing goes on."""

import pytest
import torch

from fastbert.benchmark.timing import Times, interleaved, peak_memory

CPU = torch.device("cpu")


def test_every_run_has_its_turn_in_each_round_and_the_order_rotates() -> None:
    calls: list[str] = []
    times = interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, CPU, seconds=0, rounds=(4, 9))
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert {name: taken.rounds for name, taken in times.items()} == dict.fromkeys("abc", 4)


def test_rounds_go_on_to_the_most_while_there_is_time() -> None:
    assert interleaved({"a": lambda: None}, CPU, seconds=60, rounds=(1, 7))["a"].rounds == 7


def test_progress_ends_at_one_and_never_falls() -> None:
    shares: list[float] = []
    interleaved({"a": lambda: None}, CPU, seconds=60, rounds=(2, 6), on_round=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_quantiles() -> None:
    assert Times.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == Times(2.0, 3.5, 5.0, 6)


@pytest.mark.parametrize("rounds", [(0, 3), (4, 3)])
def test_impossible_rounds_are_named(rounds: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"rounds \(\d, 3\) must be"):
        interleaved({"a": lambda: None}, CPU, rounds=rounds)


def test_no_memory_is_told_of_a_cpu() -> None:
    assert peak_memory(lambda: torch.zeros(10), CPU) is None


@pytest.mark.gpu
def test_peak_memory_counts_what_a_run_allocates_and_frees() -> None:
    device = torch.device("cuda")
    assert peak_memory(lambda: torch.empty(1 << 20, dtype=torch.int8, device=device), device) == 1 << 20


@pytest.mark.gpu
@pytest.mark.parametrize("flush", [False, True])
def test_events_see_the_gpu_wait(flush: bool) -> None:
    times = interleaved({"wait": lambda: torch.cuda._sleep(2_000_000)}, torch.device("cuda"), seconds=0, flush=flush)
    assert 3e-4 < times["wait"].median < 1e-2  # two million cycles at 0.2 to 6 GHz

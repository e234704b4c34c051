"""What Triton itself makes of a launch: it takes neither every name of an argument nor every option."""

import json
from typing import Any

import pytest
from uninterpreted import run_uninterpreted

from fastbert.tuning.problems import COMPILED


@pytest.fixture(scope="module")
def found() -> list[Any]:
    """How often each kernel was launched, pairs of keys of arguments, and kernels compiled for batches."""
    return json.loads(run_uninterpreted("-m", "tests.helpers.launched").splitlines()[-1])


#: What Triton's own launch sees beside arguments.
WATCHED = (
    *("pre-run hook", "launch hooks", "debug", "the kernel's debug", "instrumentation", "stages hook"),
    *("compile hooks", "emptied cache"),
)


@pytest.fixture(scope="module")
def seen() -> dict[str, bool]:
    """What a launch that is known sees of what is set after it, by name."""
    return json.loads(run_uninterpreted("-m", "tests.helpers.watched_launch").splitlines()[-1])


@pytest.mark.parametrize("name", WATCHED)
def test_a_known_launch_sees_what_tritons_own_sees(seen: dict[str, bool], name: str) -> None:
    assert seen[name]


def test_triton_takes_the_launch_of_every_kernel(found: list[Any]) -> None:
    launched = found[0]
    assert set(launched) == {kernel.__name__ for kernel in COMPILED.values()}
    assert min(launched.values()) > 0


def test_what_triton_compiles_apart_is_looked_up_apart(found: list[Any]) -> None:
    theirs: dict[str, set[str]] = {}
    for ours, key in found[1]:
        theirs.setdefault(ours, set()).add(key)
    assert max(len(keys) for keys in theirs.values()) == 1
    # Not finer by more than how far a tensor is from where it would be aligned.
    assert len(theirs) < 2 * len({key for _, key in found[1]})
    assert len(theirs) < len(found[1]) / 2


def test_nothing_is_compiled_for_the_sizes_of_a_batch(found: list[Any]) -> None:
    first, all_of_them, longer, all_longer = found[2]
    assert first > 12
    assert all_of_them == first
    assert 0 < longer == all_longer <= 5  # the attention kernels alone, those with maps besides

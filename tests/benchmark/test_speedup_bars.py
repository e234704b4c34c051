"""Speed-ups as a PNG: losses are told apart from wins, and who was not timed is on it."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from fastbert.benchmark.measure import Row
from fastbert.benchmark.plots import speedup_bars
from fastbert.benchmark.results import Group
from fastbert.benchmark.timing import Times


def group(workload: str = "ragged", dtype: str = "float32", **milliseconds: float | str) -> Group:
    """Contenders with their times, or with why they have none."""
    blank = Row(workload, "minilm", "forward", False, dtype, 4, 10, 20, 0.5, "")
    rows = []
    for name, value in milliseconds.items():
        row = dataclasses.replace(blank, contender=name.replace("_", "-"))
        changes = {"problem": value} if isinstance(value, str) else {"times": Times(value, value, value, 9)}
        rows.append(dataclasses.replace(row, **changes))
    return Group(rows)


def draw(path: Path, *groups: Group, **how: str) -> np.ndarray:
    return image.imread(speedup_bars(groups, path / "new" / "bars.png", **how))[..., :3]


def red(picture: np.ndarray) -> int:
    """Pixels in the colour of a loss."""
    return int((np.abs(picture - np.array([0xC6, 0x28, 0x28]) / 255) < 0.05).all(axis=2).sum())


def test_a_loss_is_red(tmp_path: Path) -> None:
    won = draw(tmp_path, group(fastbert=1.0, eager=2.0, sdpa=1.25))
    lost = draw(tmp_path, group(fastbert=1.0, eager=2.0, sdpa=0.8))
    assert won.shape == lost.shape
    assert red(lost) > red(won) + 40


def test_a_longer_bar_for_a_higher_ratio(tmp_path: Path) -> None:
    def grey(picture: np.ndarray) -> int:
        return int((np.abs(picture - np.array([0x7F, 0x8C, 0x8D]) / 255) < 0.02).all(axis=2).sum())

    # The other workload holds the axis.
    other = group("full", fastbert=1.0, sdpa=20.0)
    twice, eightfold = (draw(tmp_path, group(fastbert=1.0, eager=x), other) for x in (2.0, 8.0))
    assert grey(eightfold) == pytest.approx(3 * grey(twice), rel=0.1)  # log 8 is three times log 2


def test_a_peer_without_a_time_says_why(tmp_path: Path) -> None:
    named, other = (
        draw(tmp_path, group(fastbert=1.0, eager=2.0, flash=why)) for why in ("is not installed", "needs a GPU")
    )
    assert named.shape == other.shape
    assert not np.array_equal(named, other)


def test_a_workload_that_fastbert_did_not_pass_is_drawn_empty(tmp_path: Path) -> None:
    both = draw(tmp_path, group(fastbert=1.0, eager=2.0), group("full", fastbert="wrong: its error", eager=2.0))
    alone = draw(tmp_path, group(fastbert=1.0, eager=2.0))
    assert both.shape[0] > alone.shape[0]


def test_dtypes_stand_beside_each_other_and_workloads_below(tmp_path: Path) -> None:
    one = draw(tmp_path, group(fastbert=1.0, eager=2.0))
    two = draw(tmp_path, group(fastbert=1.0, eager=2.0), group(dtype="bfloat16", fastbert=1.0, eager=3.0))
    four = draw(
        tmp_path,
        *(group(f"workload-with-a-long-name-{i}", fastbert=1.0, eager=20.0, compile_max=1.1) for i in range(4)),
        group("only-here", dtype="bfloat16", fastbert=1.0, eager=3.0),
    )
    assert one.shape[0] == two.shape[0] < four.shape[0]
    assert one.shape[1] < two.shape[1] == four.shape[1]


def test_title_and_note_are_drawn(tmp_path: Path) -> None:
    groups = group(fastbert=1.0, eager=2.0)
    assert not np.array_equal(draw(tmp_path, groups), draw(tmp_path, groups, title="H200"))
    assert not np.array_equal(draw(tmp_path, groups), draw(tmp_path, groups, note="2026-01-01"))


def test_without_a_ratio_the_reasons_are_drawn(tmp_path: Path) -> None:
    lost, wrong = (draw(tmp_path, group(fastbert=why, eager=1.0)) for why in ("failed: lost a kernel", "wrong"))
    assert lost.shape == wrong.shape
    assert not np.array_equal(lost, wrong)
    draw(tmp_path, group(fastbert=1.0))


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw: no results"):
        speedup_bars([], tmp_path / "bars.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        speedup_bars([group(fastbert=1.0, eager=2.0)], tmp_path / "bars.png")

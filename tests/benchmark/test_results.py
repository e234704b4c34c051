"""Results survive a file, and losses are printed like wins."""

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console

from fastbert.benchmark.measure import Row
from fastbert.benchmark.results import Group, Results, save_json, show
from fastbert.benchmark.timing import Times


def row(contender: str, milliseconds: float | None, **changes: object) -> Row:
    times = None if milliseconds is None else Times(*(milliseconds * f / 1000 for f in (0.9, 1.0, 1.2)), 9)
    made = Row(
        "ragged", "minilm", "forward", False, "float32", 4, 10, 20, 0.5, contender, times, error=1e-6, bound=1e-4
    )
    return dataclasses.replace(made, **changes)


def printed(rows: list[Row]) -> str:
    console = Console(width=90, file=io.StringIO())
    show(console, [Group(rows)])
    return console.file.getvalue()


def test_results_survive_a_file(tmp_path: Path) -> None:
    results = Results({"device": "CPU"}, [row("fastbert", 2.0, floor=0.001), row("flash", None, problem="no")], True)
    path = tmp_path / "new" / "results.json"
    results.save(path)
    assert Results.load(path) == results
    assert path.read_text() == results.to_json()
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    save_json(path, {"rows": [1]})
    with pytest.raises(TypeError):
        save_json(path, {"rows": object()})
    assert '"rows"' in path.read_text()


def test_wins_and_losses_stand_side_by_side() -> None:
    text = printed([row("fastbert", 2.0, floor=0.001), row("sdpa", 3.0), row("compile", 1.0)])
    assert "1.50x" in text
    assert "0.50x" in text
    assert "torch.compile wins: 2.00x fastbert" in text
    assert "4 x 10, 20 tokens (fill 50%), floor 1 ms" in text


def test_the_best_peer_is_named() -> None:
    group = Group(
        [row("fastbert", 2.0), row("eager", 5.0), row("sdpa", 3.0), row("flash", None, problem="needs a GPU")]
    )
    assert group.verdict == "1.50x the best peer, HF sdpa"
    assert group.speedup("eager") == pytest.approx(2.5)
    assert group.speedup("flash") is None
    assert "HF flash_attention_2: needs a GPU" in printed(group.rows)


def test_without_fastbert_there_is_no_ratio() -> None:
    group = Group([row("fastbert", None, problem="wrong"), row("eager", 5.0)])
    assert group.verdict == "fastbert was not timed"
    assert group.speedup("eager") is None


def test_groups_are_by_model_workload_and_dtype() -> None:
    first = [row("fastbert", 2.0), row("eager", 5.0)]
    second = [row("fastbert", 2.0, dtype="bfloat16"), row("eager", 5.0, dtype="bfloat16")]
    assert [group.rows for group in Results({}, first + second).groups()] == [first, second]

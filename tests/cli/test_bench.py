"""`fastbert bench` as a user meets it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fastbert.cli import app

QUICK = ["--device", "cpu", "--seconds", "0", "--peer", "eager"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "100"})


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join("rain is falling on the roof " * n for n in range(1, 12)))
    return path


def test_texts_are_timed_forward_and_in_training(tiny: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    result = run(tiny, *QUICK, "--file", texts, "--batch", "5", "--json", out)
    assert result.exit_code == 0, result.output
    for piece in ("yours: forward of", "yours-finetune: finetune of", "HF eager", "torch 2."):
        assert piece in result.stdout
    assert result.stdout.count("the best peer") + result.stdout.count("wins: ") == 2
    rows = json.loads(out.read_text())["rows"]
    assert [(row["workload"], row["contender"]) for row in rows] == [
        ("yours", "fastbert"),
        ("yours", "eager"),
        ("yours-finetune", "fastbert"),
        ("yours-finetune", "eager"),
    ]
    assert all(row["times"]["median"] > 0 and row["error"] <= row["bound"] for row in rows)
    # Five rows at equal steps of eleven lengths: 2nd, 4th, 6th, 8th, 10th, of six tokens each and two special ones.
    assert {(row["batch"], row["seq"], row["tokens"]) for row in rows} == {(5, 62, 6 * (2 + 4 + 6 + 8 + 10) + 10)}


def test_a_histogram_is_drawn_from_evenly(tiny: Path, tmp_path: Path) -> None:
    histogram = tmp_path / "lengths.csv"
    histogram.write_text("tokens,count\n4,50\n20,25\n8,25\n")
    result = run(tiny, *QUICK, "--lengths", histogram, "--batch", "4", "--workload", "yours", "--json", "-")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert {(row["workload"], row["batch"], row["seq"], row["tokens"]) for row in rows} == {("yours", 4, 20, 36)}


def test_known_workloads_run_on_the_given_model(tiny: Path) -> None:
    result = run(tiny, *QUICK, "--workload", "one", "--dtype", "bf16")
    assert result.exit_code == 0, result.output
    assert f"one: forward of {tiny.name} in bfloat16, 1 x 128, 128 tokens" in result.stdout


def test_speedups_are_drawn(tiny: Path, texts: Path, tmp_path: Path) -> None:
    picture = tmp_path / "bars.png"
    result = run(tiny, *QUICK, "--file", texts, "--workload", "yours", "--plot", picture)
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_wrong_results_end_with_1(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastbert.benchmark import contenders

    def wrong(module: object, packing: bool) -> object:
        raise RuntimeError("lost a kernel")

    monkeypatch.setattr(contenders, "fuse", wrong)
    result = run(tiny, *QUICK, "--workload", "one")
    assert result.exit_code == 1
    assert "fastbert: failed: RuntimeError: lost a kernel" in result.stdout
    assert "fastbert was not timed" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "rugged"], "unknown workload 'rugged': choose from full, ragged, one"),
        (["--peer", "tensorrt"], "unknown peer 'tensorrt': choose from fastbert, fastbert-auto, eager"),
        (["--dtype", "int8"], "unknown dtype 'int8': use float32"),
        (["--device", "cuda:9"], "is not available"),
        (["--file", "nowhere.txt"], "cannot read --file 'nowhere.txt'"),
        (["--lengths", "nowhere.csv"], "cannot read --lengths 'nowhere.csv'"),
        (["--file", "a", "--lengths", "b"], "give one of them"),
        (["--plot", "bars.svg"], "is not a PNG"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tiny: Path, arguments: list[str], message: str) -> None:
    result = run(tiny, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("12,x\n", "line 1: '12,x'"),
        ("tokens,count\n13,4\n5;6\n", "line 3: '5;6'"),
        ("0,4\n", "line 1: '0,4' is not positive"),
        ("", "counts no texts"),
        ("200,3\n", "workload 'yours' has 200 tokens in a row"),
    ],
)
def test_a_bad_histogram_names_its_line(tiny: Path, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text(content)
    result = run(tiny, *QUICK, "--lengths", path)
    assert result.exit_code == 2
    assert message in result.output

"""The example on Ray Data: a pool of two actors embeds what one process does, row for row."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="needs `make test-all`")
pytest.importorskip("ray", reason="needs `make test-all`")

import pyarrow as pa
import pyarrow.parquet as pq

from fastbert.encode import POOLINGS, Encoder
from fastbert.encode.files import encode_file
from fastbert.encode.rows import Texts
from fastbert.inputs import SENTENCES

EXAMPLE = Path(__file__).parents[2] / "examples" / "encode_ray.py"


def example(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXAMPLE, *map(str, arguments)],
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_two_workers_embed_as_one_process_does(tiny: Path, tmp_path: Path) -> None:
    texts = [" ".join(SENTENCES)[i * 7 : i * 7 + 3 + 31 * i % 400] + " end" for i in range(150)]
    table = pa.table({"id": [f"t{i}" for i in range(152)], "text": [*texts[:70], " ", None, *texts[70:]]})
    file, single, many = tmp_path / "in.parquet", tmp_path / "single.parquet", tmp_path / "many"
    pq.write_table(table, file, row_group_size=20)
    summary = encode_file(Encoder(tiny, normalize=True, device="cpu"), Texts(file, "text"), single)
    assert [row for row, _ in summary.bad] == [70, 71]

    done = example(tiny, file, "--out", many, "--workers", "2", "--rows", "16", "--normalize")
    assert done.returncode == 1, done.stderr
    assert "150 embeddings" in done.stdout
    assert "2 rows are bad" in done.stderr
    found, expected = pq.read_table(many), pq.read_table(single)
    assert len(list(many.iterdir())) == 10  # both actors had work
    assert found.drop(["embedding", "problem"]).equals(table)
    assert found["problem"].to_pylist() == expected["problem"].to_pylist()
    ours, theirs = (np.array(part["embedding"].to_pylist()) for part in (found, expected))
    print(f"largest difference: {np.nanmax(np.abs(ours - theirs)):.1e}")  # batches differ, and with them sums' order
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.slow
def test_bad_input_is_one_line_and_exit_code_2(tiny: Path, tmp_path: Path) -> None:
    file, full = tmp_path / "in.parquet", tmp_path / "full"
    pq.write_table(pa.table({"id": [1], "body": ["rain"]}), file)
    full.mkdir()
    (full / "kept").touch()
    for arguments, message in (
        (["--out", tmp_path / "out", "--pooling", "sum"], f"unknown pooling 'sum': choose from {', '.join(POOLINGS)}"),
        (["--out", full], f"--out {str(full)!r} is not an empty folder: choose another"),
        (["--out", tmp_path / "out"], f"{str(file)!r} has no column 'text': choose from id, body"),
    ):
        done = example(tiny, file, *arguments)
        assert done.returncode == 2
        assert done.stderr.strip().splitlines()[-1] == f"error: {message}"
    assert not (tmp_path / "out").exists()

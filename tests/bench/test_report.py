"""README, tables and pictures say what the results say: losses, gaps and interruptions too."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from matplotlib import image
from typer.testing import CliRunner, Result

from bench import curves, kernels, report
from bench.collect import Device, Kernels, ResultsError, collect
from bench.roofline import roofline
from fastbert.benchmark.measure import Row
from fastbert.benchmark.results import Results
from fastbert.benchmark.timing import Times

ROOT = Path(__file__).parents[2]
README = f"# Name\n\n{report.BEGIN}\nold\n{report.END}\n\nThe rest.\n"
FACTS: dict[str, Any] = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef+",
    "device": "Abacus",
    "device_type": "cpu",
    "threads": 2,
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "ceilings": {"copy_bytes": 2e12, "flops_float32": 4e14},
}


def model_row(contender: str, milliseconds: float | None, workload: str = "ragged", **changes: Any) -> Row:
    times = None if milliseconds is None else Times(*(milliseconds * f / 1000 for f in (0.9, 1.0, 1.2)), 9)
    row = Row(workload, "minilm", "forward", False, "float32", 4, 10, 20, 0.5, contender, times, error=1e-6, floor=1e-3)
    return dataclasses.replace(row, **changes)


ROWS = [
    model_row("fastbert", 2.0),
    model_row("eager", 5.0),
    model_row("sdpa", None, problem="failed: RuntimeError: a | b\n<c> *d* `e`"),
    model_row("onnxruntime", 1.5),
]
#: The same on three times the tokens, with fastbert ahead of everyone.
FULL = [
    dataclasses.replace(row, workload="full", tokens=60, seq=30, times=row.times and Times(1e-3, 2e-3 * i, 3e-3 * i, 9))
    for i, row in enumerate(ROWS, 1)
]


def kernel_row(contender: str, microseconds: float | None, kernel: str = "attention forward", **changes: Any) -> Any:
    times = None if microseconds is None else Times(*(microseconds * f / 1e6 for f in (0.9, 1.0, 1.2)), 9)
    row = kernels.KernelRow(
        kernel, "2 x 3", "float32", contender, flops=4e9, bytes=1e8, floor=5e-5, times=times, error=1e-3
    )
    return dataclasses.replace(row, **changes)


KERNELS = [
    kernel_row("fastbert", 100.0),
    kernel_row("torch eager", 80.0),
    kernel_row("SDPA flash", None, problem="takes no mask"),
    kernel_row("fastbert", 100.0, "embed forward", flops=0, floor=5e-5),
    kernel_row("torch eager", 250.0, "embed forward", flops=0),
    kernel_row("cuBLAS", 20.0, "linear forward"),
]


@dataclasses.dataclass
class Place:
    """A README beside a folder of results."""

    root: Path

    @property
    def readme(self) -> Path:
        return self.root / "README.md"

    @property
    def results(self) -> Path:
        return self.root / "results"

    def models(self, rows: list[Row], name: str = "cpu/cpu.json", finished: bool = True, **facts: Any) -> None:
        Results(FACTS | facts, rows, finished).save(self.results / name)

    def kernels(self, rows: list[Any], name: str = "h200/kernels.json") -> None:
        content = {"facts": FACTS | {"device_type": "cuda"}, "rows": [dataclasses.asdict(row) for row in rows]}
        (self.results / name).parent.mkdir(parents=True, exist_ok=True)
        (self.results / name).write_text(json.dumps(content | {"finished": True}))

    def write(self) -> tuple[str, str]:
        """README and page, written."""
        report.write(self.results, self.readme)
        return self.readme.read_text(), (self.results / "README.md").read_text()

    def check(self) -> list[str]:
        return [line.replace(f"{self.root}/", "") for line in report.check(self.results, self.readme)]

    def run(self, *arguments: str) -> Result:
        app = typer.Typer()
        app.command()(report.main)
        return CliRunner().invoke(app, [str(self.results), "--summary", str(self.readme), *arguments])


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text(README)
    return Place(tmp_path)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take long: where texts are tested, empty files stand for them."""

    def leave_empty(content: Any, path: Path, note: str) -> Path:
        path.write_bytes(b"")
        return path

    for module, name in ((report, "speedup_bars"), (report, "roofline")):
        monkeypatch.setattr(module, name, leave_empty)
    for name in ("time_by_tokens", "memory_by_length"):
        monkeypatch.setattr(curves, name, leave_empty)


def line(text: str, beginning: str) -> list[str]:
    """The cells of the one row of a table that begins so."""
    (found,) = [row for row in text.splitlines() if row.startswith(f"| {beginning}")]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", found)[1:-1]]


def test_docs_agree_with_the_committed_results() -> None:
    assert report.check(ROOT / "bench" / "results", ROOT / "docs" / "benchmarking.md") == []


@pytest.mark.usefixtures("undrawn")
def test_readme_shows_ratios_floor_and_where_they_come_from(place: Place) -> None:
    place.models([*ROWS, *FULL])
    readme, _ = place.write()
    assert line(readme, "ragged") == [
        "ragged: minilm, float32",
        "2.50x",
        "-",
        "-",
        "ONNX Runtime **0.75x, slower**",
        "2.00",
    ]
    assert line(readme, "full") == ["full: minilm, float32", "2.00x", "-", "-", "HF eager 2.00x", "2.00"]
    assert "**Abacus**: 2026-01-02, commit 0123456 with changes, 2 threads, torch 2.13.0." in readme
    assert "![Ratios on Abacus](results/cpu/speedup.png)" in readme
    assert readme.startswith("# Name\n\n")
    assert readme.endswith(f"{report.END}\n\nThe rest.\n")
    assert "old" not in readme


@pytest.mark.usefixtures("undrawn")
def test_the_page_has_every_contender(place: Place) -> None:
    place.models(ROWS)
    _, page = place.write()
    assert line(page, "**ragged**") == [
        "**ragged**: forward, 4 x 10, 20 tokens (fill 50%)",
        "fastbert",
        "2.00",
        "1.80-2.40",
        "",
        "2.00",
        "-",
        "1e-06",
        "ONNX Runtime wins: 1.33x fastbert",
    ]
    assert line(page, " | HF eager") == ["", "HF eager", "5.00", "4.50-6.00", "2.50x", "5.00", "-", "1e-06", ""]
    assert line(page, " | ONNX Runtime")[4:6] == ["**0.75x, slower**", "1.50"]
    failed = line(page, " | HF sdpa")
    assert failed[2:7] == ["-"] * 5
    assert failed[8] == r"failed: RuntimeError: a \| b \<c\> \*d\* \`e\`"
    assert "Measured limits: copy 2 TB/s, product in float32 400 TFLOP/s." in page
    assert "python 3.11.7" in page


@pytest.mark.usefixtures("undrawn")
def test_kernels_have_rates_beside_their_floor(place: Place) -> None:
    place.kernels(KERNELS)
    readme, page = place.write()
    assert "No results are committed yet" in readme  # of models
    ours = line(page, "**attention forward**")
    assert ours == [
        "**attention forward**: 2 x 3, float32",
        "fastbert",
        "100.0",
        "90.0-120.0",
        "",
        "40",
        "1,000",
        "2.00",
        "1e-03",
        "",
    ]
    assert "|  | torch eager | 80.00 | 72.00-96.00 | **0.80x, slower** | 50 | 1,250 | 1.60 | 1e-03 |  |" in page
    assert "|  | torch eager | 250.0 | 225.0-300.0 | 2.50x | - | 400 | 5.00 | 1e-03 |  |" in page
    assert line(page, " | SDPA flash")[9] == "takes no mask"
    assert line(page, "**linear forward**")[1:5] == ["cuBLAS", "20.00", "18.00-24.00", "-"]


@pytest.mark.usefixtures("undrawn")
def test_wrong_results_and_interruptions_are_told(place: Place) -> None:
    wrong = model_row("fastbert", None, problem="wrong: its error 1.0e+00 is over 1.0e-04")
    place.models([wrong, *ROWS[1:]], finished=False)
    readme, page = place.write()
    assert line(readme, "ragged")[1:] == ["-", "-", "-", "fastbert: wrong: its error 1.0e+00 is over 1.0e-04", "-"]
    assert "The run was interrupted" in readme
    assert "The run was interrupted" in page
    assert line(page, "**ragged**")[8] == "wrong: its error 1.0e+00 is over 1.0e-04"
    assert line(page, " | HF eager")[4] == "-"
    assert "ratios to peers (no workload has times of fastbert and of a peer)" in page
    assert "speedup.png" not in readme


@pytest.mark.usefixtures("undrawn")
def test_gpus_come_first_and_name_their_driver(place: Place) -> None:
    place.models(ROWS)
    place.models(
        ROWS, "h200/models.json", device="Zither", device_type="cuda", driver={"driver_version": "570"}, threads=None
    )
    readme, page = place.write()
    assert readme.index("Zither") < readme.index("Abacus")
    assert page.index("## Zither") < page.index("## Abacus")
    assert "driver version 570" in page


def test_without_results_it_says_so(place: Place) -> None:
    readme, page = place.write()
    assert f"{report.BEGIN}\nNo results are committed yet.\n{report.END}" in readme
    assert "No results are committed yet." in page
    assert place.check() == []


@pytest.mark.usefixtures("undrawn")
def test_what_disagrees_is_found(place: Place) -> None:
    place.models([*ROWS, *FULL])
    readme, page = place.write()
    assert place.check() == []
    assert report.write(place.results, place.readme)
    assert (place.readme.read_text(), (place.results / "README.md").read_text()) == (readme, page)

    place.readme.write_text(readme.replace("2.50x", "2.60x"))
    assert place.check() == ["README.md does not agree with the results"]
    result = place.run("--check")
    assert result.exit_code == 1
    assert "README.md does not agree with the results" in result.output
    assert "run `python -m bench.report`" in result.output
    assert "2.60x" in place.readme.read_text()  # a check writes nothing

    place.write()
    (place.results / "cpu" / "speedup.png").unlink()
    (place.results / "cpu" / "memory.png").write_bytes(b"")
    assert place.check() == [
        "results/cpu/speedup.png is missing",
        "results/cpu/memory.png is not drawn from the results",
    ]
    assert place.run().exit_code == 0
    assert place.run("--check").exit_code == 0
    assert not (place.results / "cpu" / "memory.png").exists()

    place.models([model_row("fastbert", 2.1), *ROWS[1:], *FULL])
    assert place.check() == [f"{name} does not agree with the results" for name in ("results/README.md", "README.md")]


def test_pictures_are_drawn_where_there_is_something_to_draw(place: Place) -> None:
    gpu = [dataclasses.replace(row, peak_bytes=row.times and 1 << 20) for row in [*ROWS, *FULL]]
    place.models(ROWS)
    place.models(gpu, "h200/models.json", device_type="cuda")
    place.kernels(KERNELS)
    _, page = place.write()
    drawn = sorted(str(path.relative_to(place.results)) for path in place.results.glob("*/*.png"))
    assert drawn == ["cpu/speedup.png", *(f"h200/{n}.png" for n in ("memory", "roofline", "speedup", "time"))]
    for name in drawn:
        picture = image.imread(place.results / name)[..., :3]
        assert min(picture.shape[:2]) > 200
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
        assert f"]({name})" in page
    assert "time against tokens (no task was timed with several numbers of tokens)" in page
    assert "memory against sequence length (nobody counts it on a CPU)" in page
    assert page.count("roofline of the kernels (no kernel was timed") == 1


def test_time_is_drawn_over_tokens_and_memory_for_each_token(place: Place) -> None:
    rows = [dataclasses.replace(row, peak_bytes=row.times and 61440) for row in [*ROWS, *FULL]]
    other = model_row("fastbert", 2.0, task="finetune", peak_bytes=5)  # alone with its task
    groups = Results(FACTS, [*rows, other]).groups()
    (time,) = curves.time_panels(groups)
    assert time.title == "minilm, float32: forward"
    assert time.points["fastbert"] == [(20, 2.0, "ragged"), (60, 2.0, "full")]
    assert time.points["floor"] == [(20, 1.0, "ragged"), (60, 1.0, "full")]
    assert "sdpa" not in time.points
    (memory,) = curves.memory_panels(groups)
    assert memory.points["fastbert"] == [(10, 3.0, "ragged"), (30, 1.0, "full")]
    assert "floor" not in memory.points


def test_the_roofline_shows_each_kernel_and_its_best_peer(tmp_path: Path) -> None:
    def draw(rows: list[Any]) -> np.ndarray:
        return image.imread(roofline(Kernels(FACTS, rows, True), tmp_path / "roofline.png", "note"))

    whole = draw(KERNELS)
    for i in (0, 1, 3, 4, 5):
        slower = dataclasses.replace(KERNELS[i].times, median=KERNELS[i].times.median * 1.5)
        changed = [dataclasses.replace(row, times=slower) if row is KERNELS[i] else row for row in KERNELS]
        other = draw(changed)
        assert whole.shape == other.shape
        assert not np.array_equal(whole, other)
    assert draw([row for row in KERNELS if "embed" not in row.kernel]).shape[0] < whole.shape[0]


@pytest.mark.parametrize(("rows", "facts"), [(KERNELS[2:3], FACTS), (KERNELS, FACTS | {"ceilings": {}})])
def test_no_roofline_without_times_or_ceilings(rows: list[Any], facts: dict[str, Any], tmp_path: Path) -> None:
    kernels_run = Kernels(facts, rows, True)
    with pytest.raises(ValueError, match="nothing to draw"):
        roofline(kernels_run, tmp_path / "roofline.png", "note")
    found = report.pictures(Device("h200", None, kernels_run))
    assert not found.drawn
    assert "the roofline of the kernels (no kernel was timed under measured ceilings)" in found.absent


def broken(name: str, content: str) -> Callable[[Place], None]:
    def make(place: Place) -> None:
        path = place.results / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    return make


def both(place: Place) -> None:
    place.models(ROWS)
    place.models(ROWS, "cpu/models.json")


NO_DATE = json.dumps({"facts": FACTS | {"date": ""}, "rows": [], "finished": True})
STRANGER = json.dumps({"facts": FACTS, "rows": [dataclasses.asdict(model_row("tensorrt", 1.0))], "finished": True})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda place: place.results.rmdir(), "no folder"),
        (broken("cpu/notes.json", "{}"), "has no results: expected cpu.json, models.json, kernels.json"),
        (broken("cpu/cpu.json", '{"facts": {'), "holds no results that this version can read: JSONDecodeError"),
        (broken("cpu/cpu.json", '{"facts": {}, "rows": []}'), "holds no results that this version can read: KeyError"),
        (broken("cpu/kernels.json", "[]"), "holds no results that this version can read: TypeError"),
        (broken("cpu/cpu.json", NO_DATE), "does not say where it comes from: no date in its facts"),
        (broken("cpu/cpu.json", STRANGER), "unknown peer 'tensorrt'"),
        (both, "has cpu.json and models.json: give each device a folder of its own"),
        (lambda place: place.readme.unlink(), "cannot read"),
        (lambda place: place.readme.write_text("# Name\n"), "needs <!-- bench:begin --> and, after it"),
        (lambda place: place.readme.write_text(README * 2), "once each"),
        (lambda place: place.readme.write_text(f"{report.END}{report.BEGIN}"), "and, after it"),
    ],
)
def test_what_is_no_result_ends_with_2(place: Place, make: Callable[[Place], None], message: str) -> None:
    make(place)
    before = {path: path.read_text() for path in place.root.rglob("*.*") if path.is_file()}
    result = place.run()
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert message in result.output
    assert {path: path.read_text() for path in place.root.rglob("*.*") if path.is_file()} == before


def test_an_empty_folder_is_no_device_but_a_folder_without_results_is_an_error(place: Place) -> None:
    assert collect(place.results) == []
    (place.results / "cpu").mkdir()
    with pytest.raises(ResultsError, match="has no results"):
        collect(place.results)

"""The committed results: a folder for each device, with what the runs wrote into it.

`cpu.json` (of `bench.cpu`) or `models.json` (of `bench.gpu`) holds the models, `kernels.json` the kernels, and
`compiled.json` those of them again that were timed beside compiled peers, too. Other files are left alone.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bench.kernels import KernelRow
from fastbert.benchmark.contenders import named
from fastbert.benchmark.results import Results
from fastbert.benchmark.timing import Times

MODELS_FILES, KERNELS_FILE, COMPILED_FILE = ("cpu.json", "models.json"), "kernels.json", "compiled.json"
Content = TypeVar("Content")


class ResultsError(ValueError):
    """A folder or file that holds no results."""


@dataclass(frozen=True)
class KernelGroup:
    """The contenders on one call."""

    rows: list[KernelRow]

    @property
    def ours(self) -> KernelRow | None:
        """fastbert's row, when it was timed."""
        return next((row for row in self.timed if row.contender == "fastbert"), None)

    @property
    def timed(self) -> list[KernelRow]:
        """The rows that have times."""
        return [row for row in self.rows if row.times is not None]

    @property
    def best_peer(self) -> KernelRow | None:
        """The quickest of the others."""
        return min((row for row in self.timed if row.contender != "fastbert"), key=median, default=None)


def median(row: KernelRow) -> float:
    """Seconds that a timed row took."""
    assert row.times is not None
    return row.times.median


@dataclass(frozen=True)
class Kernels:
    """The rows of one run over kernels."""

    facts: dict[str, Any]
    rows: list[KernelRow]
    finished: bool

    def groups(self) -> list[KernelGroup]:
        """The rows by call, in the order in which they were made."""
        found: dict[tuple[str, str, str], list[KernelRow]] = {}
        for row in self.rows:
            found.setdefault((row.kernel, row.case, row.dtype), []).append(row)
        return [KernelGroup(rows) for rows in found.values()]


@dataclass(frozen=True)
class Device:
    """The results of one device: of models, of kernels, or of both."""

    folder: str
    models: Results | None
    kernels: Kernels | None

    @property
    def facts(self) -> dict[str, Any]:
        """Where its results come from."""
        source = self.models or self.kernels
        assert source is not None
        return source.facts


def collect(folder: Path) -> list[Device]:
    """Read the results of every device.

    Args:
        folder: holds a folder for each device. An empty one gives none.

    Returns:
        GPUs first, by the names of their folders.

    Raises:
        ResultsError: for a folder that does not exist, a device without results, and files that are not results.
    """
    if not folder.is_dir():
        raise ResultsError(f"no folder {str(folder)!r}: name one that holds a folder of results for each device")
    devices = [_device(path) for path in sorted(folder.iterdir()) if path.is_dir()]
    return sorted(devices, key=lambda device: device.facts.get("device_type") == "cpu")


def _device(folder: Path) -> Device:
    found = [folder / name for name in MODELS_FILES if (folder / name).is_file()]
    if len(found) > 1:
        raise ResultsError(f"{str(folder)!r} has {' and '.join(MODELS_FILES)}: give each device a folder of its own")
    models = _read(found[0], _load_models) if found else None
    kernels = _read(folder / KERNELS_FILE, _load_kernels) if (folder / KERNELS_FILE).is_file() else None
    if models is None and kernels is None:
        raise ResultsError(f"{str(folder)!r} has no results: expected {', '.join((*MODELS_FILES, KERNELS_FILE))}")
    return Device(folder.name, models, kernels)


def _read(path: Path, load: Callable[[Path], Content]) -> Content:
    try:
        content = load(path)
        facts = content.facts  # type: ignore[attr-defined]
        missing = [name for name in ("date", "device", "versions") if not facts.get(name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(f"{str(path)!r} holds no results that this version can read: {error!r}") from error
    if missing:
        raise ResultsError(f"{str(path)!r} does not say where it comes from: no {', '.join(missing)} in its facts")
    return content


def _load_models(path: Path) -> Results:
    results = Results.load(path)
    named([row.contender for row in results.rows])
    return results


def _load_kernels(path: Path) -> Kernels:
    content = json.loads(path.read_text(encoding="utf-8"))
    later = path.with_name(COMPILED_FILE)
    again = json.loads(later.read_text(encoding="utf-8"))["rows"] if later.is_file() else []
    done = {(row["kernel"], row["case"]) for row in again}
    rows = [row for row in content["rows"] if (row["kernel"], row["case"]) not in done] + again
    known = [KernelRow(**row | {"times": row["times"] and Times(**row["times"])}) for row in rows]
    return Kernels(content["facts"], known, content["finished"])

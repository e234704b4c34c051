"""Results: rows with their provenance, as JSON that an interrupted run leaves whole, and as a table."""

import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .contenders import CONTENDERS
from .measure import Row
from .timing import Times

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass
class Results:
    """The rows of one run over models.

    Attributes:
        facts: where they come from: what `provenance.facts` says.
        rows: a row for each workload and contender.
        finished: whether the run came to its end.
    """

    facts: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    finished: bool = False

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON. A reader never sees half a file."""
        save_json(path, dataclasses.asdict(self))

    def to_json(self) -> str:
        """What `save` writes."""
        return _json(dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Results":
        """Read what `save` wrote."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = [Row(**row | {"times": row["times"] and Times(**row["times"])}) for row in content["rows"]]
        return cls(content["facts"], rows, content["finished"])

    def groups(self) -> list["Group"]:
        """The rows by what was done, in the order in which it was done."""
        found: dict[tuple[str, str, str], list[Row]] = {}
        for row in self.rows:
            found.setdefault((row.model, row.workload, row.dtype), []).append(row)
        return [Group(rows) for rows in found.values()]


@dataclass(frozen=True)
class Group:
    """The contenders on one model, workload and dtype."""

    rows: list[Row]

    @property
    def ours(self) -> Row | None:
        """fastbert's row, when it was timed."""
        return self.timed.get("fastbert")

    @property
    def timed(self) -> dict[str, Row]:
        """The rows that have times, by contender."""
        return {row.contender: row for row in self.rows if row.times is not None}

    @property
    def best_peer(self) -> Row | None:
        """The quickest of the others."""
        peers = [row for name, row in self.timed.items() if not name.startswith("fastbert")]
        return min(peers, key=_median, default=None)

    def speedup(self, contender: str) -> float | None:
        """A contender's median time over fastbert's; None when one of them was not timed."""
        peer = self.timed.get(contender)
        return _median(peer) / _median(self.ours) if peer is not None and self.ours is not None else None

    @property
    def verdict(self) -> str:
        """One line for people: who wins, and by how much."""
        peer = self.best_peer
        if self.ours is None:
            return "fastbert was not timed"
        if peer is None:
            return "nobody to compare with"
        ratio = _median(peer) / _median(self.ours)
        name = CONTENDERS[peer.contender]
        return f"{ratio:.2f}x the best peer, {name}" if ratio >= 1 else f"{name} wins: {1 / ratio:.2f}x fastbert"


def _median(row: Row) -> float:
    assert row.times is not None
    return row.times.median


def save_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON so that a reader, or an interruption, never sees half a file; folders on the way are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(_json(content), encoding="utf-8")
    beside.replace(path)


def _json(content: Any) -> str:
    return json.dumps(content, indent=1) + "\n"


def show(console: "Console", groups: Iterable[Group]) -> None:
    """Print every contender on every workload, wins and losses alike."""
    for group in groups:
        console.print(_heading(group.rows[0]), style="bold", soft_wrap=True)
        console.print(_table(group))
        for row in group.rows:
            if row.times is None:
                console.print(
                    f"{CONTENDERS[row.contender]}: {row.problem}", style="yellow", markup=False, soft_wrap=True
                )
        console.print(f"{group.verdict}\n", style="bold")


def _heading(row: Row) -> str:
    shape = f"{row.batch} x {row.seq}, {row.tokens} tokens (fill {row.fill:.0%})"
    least = "" if row.floor is None else f", floor {1e3 * row.floor:.3g} ms"
    return f"{row.workload}: {row.task} of {row.model} in {row.dtype}, {shape}{least}"


def _table(group: Group) -> "Table":
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("contender", no_wrap=True)
    for name in ("median ms", "20-80%", "/ fastbert", "T/Floor", "MiB", "error"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in group.rows:
        if row.times is None:
            continue
        times, ratio = row.times, group.speedup(row.contender)
        if row.contender == "fastbert" or ratio is None:
            against = Text("-")
        else:
            against = Text(f"{ratio:.2f}x", "green" if ratio >= 1 else "red")
        shown.add_row(
            CONTENDERS[row.contender],
            f"{1e3 * times.median:.2f}",
            f"{1e3 * times.q20:.2f}-{1e3 * times.q80:.2f}",
            against,
            "-" if row.floor is None else f"{times.median / row.floor:.2f}",
            "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}",
            f"{row.error:.0e}",
        )
    return shown

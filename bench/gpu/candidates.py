"""The section of candidates: the shipped tiles beside others, and what the model of `bench.static` said of each.

Its table says where the model that chose the tiles is wrong, and by how much.
"""

import functools
import statistics
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastbert.benchmark.timing import Times
from fastbert.tuning.choice import choose
from fastbert.tuning.launches import Widths, launches
from fastbert.tuning.neighbours import neighbours, shipped_tiles
from fastbert.tuning.tuner import MARGIN, Outcome, Subject, flushed, words
from fastbert_kernels.backend import arch
from fastbert_kernels.catalogue import Launch, Product, Tiles, dtype_name

from .modelled import SIZES, TOGETHER
from .processes import LATE, at_once, python, run_for
from .sections import Kept, Plan, Rows, Section, Steps, Verdict

BASE, LARGE = Widths(768, 3072, 64), Widths(1024, 4096, 64)
#: What is timed: BERT-base's launches, and the fused feed-forward layer of BERT-large.
LAUNCHES = (
    *launches((BASE,), torch.bfloat16, full=False, lengths=SIZES.lengths),
    *launches((LARGE,), torch.bfloat16, full=False, named=("feed_forward",)),
)
#: Feed-forward products that are timed both ways, fused and by cuBLAS.
PRODUCTS = (Product(torch.bfloat16, 768, "gelu"), Product(torch.bfloat16, 1024, "gelu"))
#: Seconds of each timing.
SECONDS = 0.3
#: Of the section's time, what the model may take: it compiles all neighbours of all launches.
_MODEL_SHARE = 0.5
#: How many tiles are timed: those that the model ranks first, and some of those that it ranks lower.
_FIRST, _LOWER = 4, 2


def _steps(plan: Plan, kept: Kept) -> Steps:
    models = {f"model of {launch}": functools.partial(_model, launch, plan) for launch in LAUNCHES}
    waiting = at_once({name: step for name, step in models.items() if name not in kept.steps}, plan)
    timed = {str(launch): functools.partial(_time, launch, plan, kept) for launch in LAUNCHES}
    products = {str(product): functools.partial(_time_product, product, plan) for product in PRODUCTS}
    return {**waiting, **timed, **products}


def _model(launch: Launch, plan: Plan) -> Rows:
    name = launch.kernel, dtype_name(launch.dtype), str(launch.width)
    short = () if launch.up_to is None else ("--up-to", str(launch.up_to))
    command = python("-m", "bench.gpu.modelled", arch(plan.device), *name, *short)
    ended = run_for(plan.left() * _MODEL_SHARE, command, plan, {"TRITON_INTERPRET": "0"})
    if ended.code == LATE and ended.rows:  # the shipped tiles come first, then others as far as the time went
        return ended.rows
    if ended.code != 0:
        raise RuntimeError(f"the process ended with {ended.code}: {' '.join(ended.last_lines[-1:])}")
    return ended.rows


def _modelled(kept: Kept, launch: str) -> dict[str, dict[str, Any]]:
    """What the model said of a launch, by tiles in words; empty where there is no model."""
    step = kept.steps.get(f"model of {launch}", {"rows": []})
    return {words(row["tiles"]): row for row in step["rows"]}


def chosen(launch: Launch, target: str, said: dict[str, dict[str, Any]]) -> list[Tiles]:
    """The tiles to time beside the shipped ones: what the model ranks first, other stages or warps of the shipped
    sides, and some that the model ranks lower. What must not ship, as what spills, is left out."""
    shipped = shipped_tiles(launch, target)
    others = [x for x in neighbours(launch, target, shipped) if not said.get(words(x), {}).get("problem")]
    ranked = sorted(others, key=lambda x: said.get(words(x), {}).get("modelled_us") or float("inf"))
    rest = ranked[_FIRST:]
    sides = [x for x in rest if all(x[side] == shipped[side] for side in ("BLOCK_M", "BLOCK_N"))]
    lower = rest[:: max(1, len(rest) // _LOWER)][:_LOWER]
    return list({words(x): x for x in (*ranked[:_FIRST], *sides, *lower)}.values())


def _time(launch: Launch, plan: Plan, kept: Kept) -> Rows:
    target = arch(plan.device)
    timer = functools.partial(flushed, seconds=SECONDS)
    subject = Subject(launch, plan.device, {}, {}, SIZES, timer, MARGIN, lambda message: None)
    said = _modelled(kept, str(launch))
    beside: float | None = 0.0
    if other := TOGETHER.get(launch.kernel):  # what is timed is both kernels of the backward pass
        beside = _shipped_us(_modelled(kept, str(launch._replace(kernel=other))))

    def row(tiles: Tiles, times: Times | None, problem: str | None = None) -> dict[str, Any]:
        alone = said.get(words(tiles), {}).get("modelled_us")
        return {
            "launch": str(launch),
            "tiles": words(tiles),
            "shipped": tiles == subject.shipped,
            "modelled_us": None if alone is None or beside is None else round(alone + beside, 3),
            "measured_us": None if times is None else round(1e6 * times.median, 3),
            "q20_us": None if times is None else round(1e6 * times.q20, 3),
            "q80_us": None if times is None else round(1e6 * times.q80, 3),
            "problem": problem,
        }

    others = chosen(launch, target, said)
    problems = {words(x): subject.problem(x, [subject.first]) for x in others}
    right = [x for x in others if problems[words(x)] is None]
    outcome = Outcome(launch, subject.shipped)
    # The last of the timed calls: the one of training, which the model is of.
    found = {name: shapes[-1] for name, shapes in subject.times(right or [subject.shipped], outcome).items()}
    problems |= {name: problem for name, _, problem in (line.partition(": ") for line in outcome.refused)}
    return [
        *(row(subject.shipped, shape.shipped) for shape in list(found.values())[:1]),
        *(row(x, found[words(x)].best) for x in right if words(x) in found),
        *(row(x, None, problems[words(x)]) for x in others if words(x) not in found),
    ]


def _shipped_us(said: dict[str, dict[str, Any]]) -> float | None:
    return next((row["modelled_us"] for row in said.values() if row["shipped"]), None)


def _time_product(product: Product, plan: Plan) -> Rows:
    (choice,) = choose([product], plan.device, sizes=SIZES, timer=functools.partial(flushed, seconds=SECONDS))
    shapes = [shape.entry() for shape in choice.shapes]
    return [{"product": str(product), "choice": str(choice), "shapes": shapes, "refused": choice.refused}]


def wrong_by(rows: Rows) -> list[dict[str, Any]]:
    """Where the model is wrong, launch by launch.

    Returns:
        For each launch: `ratio`, the measured time of the shipped tiles over the modelled one; `fastest`, the tiles
        that are, with `gain` over the shipped ones; and `rank`, the place that the model gave them of `of`: 1 where it
        was right. The last two are None where there is no model.
    """
    found = []
    for launch in dict.fromkeys(row["launch"] for row in rows if row.get("measured_us")):
        timed = [row for row in rows if row.get("launch") == launch and row.get("measured_us")]
        shipped = next(row for row in timed if row["shipped"])
        fastest = min(timed, key=lambda row: row["measured_us"])
        modelled = [row["modelled_us"] for row in timed]
        known = None not in modelled
        found.append(
            {
                "launch": launch,
                "modelled_us": shipped["modelled_us"],
                "measured_us": shipped["measured_us"],
                "ratio": round(shipped["measured_us"] / shipped["modelled_us"], 3) if shipped["modelled_us"] else None,
                "fastest": fastest["tiles"],
                "gain": round(shipped["measured_us"] / fastest["measured_us"], 3),
                "rank": 1 + sum(x < fastest["modelled_us"] for x in modelled) if known else None,
                "of": len(timed) if known else None,
            }
        )
    return found


def _tell(console: Console, kept: Kept) -> Verdict:
    rows = [row for row in kept.rows if "measured_us" in row]
    kept.summary = calibration = wrong_by(rows)
    console.print(_table(rows))
    console.print(_calibration(calibration))
    for row in kept.rows:
        if "product" in row:
            console.print(row["choice"], markup=False, soft_wrap=True)
    ratios = [row["ratio"] for row in calibration if row["ratio"]]
    if ratios:
        middle = statistics.median(ratios)
        console.print(f"measured over modelled: median {middle:.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")
    faster = [row for row in calibration if row["gain"] > 1 + MARGIN]
    if faster:
        better = ", ".join(f"{row['launch']} ({row['fastest']}, {row['gain']:.2f}x)" for row in faster)
        return Verdict(True, f"`fastbert tune`, which confirms, then the tables of tiles.py: {better}")
    return Verdict(True, "nothing to choose anew: no other tiles are faster by more than a few percent")


def _table(rows: Rows) -> Table:
    table = Table(title="tiles, as modelled and as measured", title_justify="left", box=None, pad_edge=False)
    for name in ("launch", "tiles"):
        table.add_column(name, overflow="fold")
    for name in ("modelled us", "measured us", "20-80%", "measured / modelled"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        tiles = row["tiles"] + (", shipped" if row["shipped"] else "")
        if row["measured_us"] is None:
            table.add_row(row["launch"], tiles, _us(row["modelled_us"]), "-", "-", (row["problem"] or "")[:60])
            continue
        ratio = "-" if row["modelled_us"] is None else f"{row['measured_us'] / row['modelled_us']:.2f}"
        spread = f"{row['q20_us']:.1f}-{row['q80_us']:.1f}"
        table.add_row(row["launch"], tiles, _us(row["modelled_us"]), _us(row["measured_us"]), spread, ratio)
    return table


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _calibration(found: list[dict[str, Any]]) -> Table:
    table = Table(title="where the model is wrong", title_justify="left", box=None, pad_edge=False)
    table.add_column("launch", overflow="fold")
    for name in ("modelled us", "measured us", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fastest tiles", overflow="fold")
    for name in ("gain", "the model's rank"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found:
        rank = "-" if row["rank"] is None else f"{row['rank']} of {row['of']}"
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        us = _us(row["modelled_us"]), _us(row["measured_us"])
        table.add_row(row["launch"], *us, ratio, row["fastest"], f"{row['gain']:.2f}x", rank)
    return table


CANDIDATES = Section(70, _steps, _tell)

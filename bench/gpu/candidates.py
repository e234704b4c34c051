"""The section of candidates: the shipped tiles beside others, and what the model of `bench.static` said of each.

Its table says where the model that chose the tiles is wrong, and by how much. Beside the tiles stand other kernels of
attention's forward pass, each held against the shipped one before it is timed.
"""

import functools
import statistics
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastbert.benchmark.timing import Run, Times
from fastbert.tuning.choice import choose
from fastbert.tuning.launches import Widths, launches
from fastbert.tuning.neighbours import neighbours, shipped_tiles
from fastbert.tuning.problems import lengths_of
from fastbert.tuning.tuner import MARGIN, Outcome, Shape, Subject, errors_of, faster, flushed, reason_of, words
from fastbert_kernels.backend import arch
from fastbert_kernels.catalogue import Launch, Product, Tiles, dtype_name
from fastbert_kernels.tuned import in_force

from .attention_variants import CONTENDERS, SHIPPED, VARIANTS, Call, attend, drawn_call, variant_tiles
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
#: Launches that are also timed with the kernels of `attention_variants.py`.
VARIED = tuple(launch for launch in LAUNCHES if launch.kernel == "attention_forward")
#: How far a variant's results may be from the shipped kernel's, over their largest value: the context in roundings of
#: its dtype, and the statistics, which are float32.
_CONTEXT_ROUNDINGS, _STATISTICS = 2, 1e-4
#: Seconds of each timing.
SECONDS = 0.3
#: Of the section's time, what the model may take: it compiles all neighbours of all launches.
_MODEL_SHARE = 0.5
#: How many tiles are timed: those that the model ranks first, and some of those that it ranks lower.
_FIRST, _LOWER = 4, 2


def _steps(plan: Plan, kept: Kept) -> Steps:
    models = {f"model of {launch}": functools.partial(_model, launch, plan) for launch in LAUNCHES}
    models |= {
        f"model of variants of {launch}": functools.partial(_model, launch, plan, "--variants") for launch in VARIED
    }
    waiting = at_once({name: step for name, step in models.items() if name not in kept.steps}, plan)
    timed = {str(launch): functools.partial(_time, launch, plan, kept) for launch in LAUNCHES}
    timed |= {f"variants of {launch}": functools.partial(_time_variants, launch, plan, kept) for launch in VARIED}
    products = {str(product): functools.partial(_time_product, product, plan) for product in PRODUCTS}
    return {**waiting, **timed, **products}


def _model(launch: Launch, plan: Plan, *options: str) -> Rows:
    name = launch.kernel, dtype_name(launch.dtype), str(launch.width)
    short = () if launch.up_to is None else ("--up-to", str(launch.up_to))
    command = python("-m", "bench.gpu.modelled", arch(plan.device), *name, *short, *options)
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


def _time_variants(launch: Launch, plan: Plan, kept: Kept) -> Rows:
    """Times of the shipped kernel and of those variants that are right, without dropout and with it."""
    length = lengths_of(launch, SIZES.lengths)[0]
    lengths = (length,) * max(1, SIZES.tokens // length)
    model = kept.steps.get(f"model of variants of {launch}", {"rows": []})["rows"]
    rows = []
    for dropout in (False, True):
        call = drawn_call(lengths, SIZES.heads, launch.width, launch.dtype, dropout, plan.device)
        name = f"{len(lengths)} x {length}, {SIZES.heads} heads" + (", dropout" if dropout else "")
        said = {row["variant"]: row for row in model if row["dropout"] == dropout}
        rows += _time_call(name, call, launch, said, plan.device)
    return rows


def _time_call(name: str, call: Call, launch: Launch, said: dict[str, dict[str, Any]], device: torch.device) -> Rows:
    runs = {}
    for x in CONTENDERS:
        tiles, resident = variant_tiles(x, launch, arch(device)), said.get(x, {}).get("resident", 1)
        runs[x] = functools.partial(attend, x, call, tiles, resident)
    problems: dict[str, str | None] = {x: said.get(x, {}).get("problem") for x in VARIANTS}
    with in_force(device, {}):  # the shipped kernel has the shipped tiles
        want = runs[SHIPPED]()
        for variant in VARIANTS:
            problems[variant] = problems[variant] or _difference(runs[variant], want)
        times = flushed({x: run for x, run in runs.items() if problems.get(x) is None}, device, seconds=SECONDS)
    rows = []
    for x in CONTENDERS:
        row = {"call": name, "variant": x, "faster": False, "problem": problems.get(x), "us": None}
        row |= {about: said.get(x, {}).get(about) for about in ("modelled_us", "registers", "spills", "resident")}
        if x in times:
            row["us"] = [round(1e6 * took, 3) for took in (times[x].median, times[x].q20, times[x].q80)]
            row["faster"] = faster([Shape(name, (SHIPPED, x), times[SHIPPED], times[x])], MARGIN)
        rows.append(row)
    return rows


def _difference(run: Run, want: tuple[Tensor, Tensor]) -> str | None:
    """What is wrong with a variant, whose results must be the shipped kernel's but for rounding; None: nothing."""
    try:
        errors = errors_of(list(run()), [x.double() for x in want])
    except Exception as failure:  # a variant that fails is a row
        return reason_of(failure)
    for error, bound in zip(errors, (_CONTEXT_ROUNDINGS * torch.finfo(want[0].dtype).eps, _STATISTICS), strict=True):
        if not error <= bound:
            return f"not the shipped kernel's results: {error:.1e}, may be {bound:.1e}"
    return None


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
    varied = [row for row in kept.rows if "call" in row]
    console.print(_variants_table(varied))
    for row in kept.rows:
        if "product" in row:
            console.print(row["choice"], markup=False, soft_wrap=True)
    ratios = [row["ratio"] for row in calibration if row["ratio"]]
    if ratios:
        middle = statistics.median(ratios)
        console.print(f"measured over modelled: median {middle:.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")
    following = []
    if better := [row for row in calibration if row["gain"] > 1 + MARGIN]:
        names = ", ".join(f"{row['launch']} ({row['fastest']}, {row['gain']:.2f}x)" for row in better)
        following.append(f"`fastbert tune`, which confirms, then the tables of tiles.py: {names}")
    following += _about_variants(varied)
    nothing = "nothing to choose anew: no other tiles and no other kernels are faster by more than a few percent"
    return Verdict(True, "; then ".join(following) or nothing)


def _about_variants(rows: Rows) -> list[str]:
    """What to do next about attention's variants."""
    shipped = {row["call"]: row["us"][0] for row in rows if row["variant"] == SHIPPED}
    faster = [row for row in rows if row["faster"]]
    found = []
    if wrong := [f"{row['variant']} ({row['call']}: {row['problem']})" for row in rows if row["problem"]]:
        found.append(f"mend, or delete, in attention_variants.py: {', '.join(wrong)}")
    if won := [f"{x['variant']} ({x['call']}, {shipped[x['call']] / x['us'][0]:.2f}x)" for x in faster]:
        found.append(
            f"from attention_variants.py to attention_forward, with rows in attention_tables.py: {', '.join(won)}"
        )
    return found


def _variants_table(rows: Rows) -> Table:
    table = Table(title="kernels of attention's forward pass", title_justify="left", box=None, pad_edge=False)
    for name in ("call", "kernel"):
        table.add_column(name, overflow="fold")
    for name in ("registers", "spills", "resident", "modelled us", "measured us", "20-80%", "/ shipped"):
        table.add_column(name, justify="right", no_wrap=True)
    shipped = {row["call"]: row["us"][0] for row in rows if row["variant"] == SHIPPED}
    for row in rows:
        about = ["-" if row[name] is None else str(row[name]) for name in ("registers", "spills", "resident")]
        times = ["-", "-", (row["problem"] or "")[:60]]
        if row["us"] is not None:
            median, q20, q80 = row["us"]
            times = [_us(median), f"{q20:.1f}-{q80:.1f}", f"{median / shipped[row['call']]:.2f}x"]
        table.add_row(row["call"], row["variant"], *about, _us(row["modelled_us"]), *times)
    return table


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

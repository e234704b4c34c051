"""`fastbert tune`: the fastest tiles on this GPU, and the faster feed-forward products, measured once and kept."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import INTERRUPTED, check_writable, fail, quiet

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from fastbert.tuning.choice import Choice
    from fastbert.tuning.launches import Widths
    from fastbert.tuning.tuner import Outcome
    from fastbert_kernels.catalogue import Launch, Product


def tune(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a checkpoint, or a name on the Hugging Face hub, for whose widths to measure. "
            "Default: those of BERT-base, BERT-large and MiniLM.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "bfloat16",
    lengths: Annotated[str, typer.Option(help="Tokens of a sequence in the timed calls, with commas.")] = "30,128,512",
    tokens: Annotated[
        int,
        typer.Option(min=1, help="Tokens of a timed call; of feed-forward products the most, halved up to five times."),
    ] = 32768,
    kernel: Annotated[
        list[str] | None,
        typer.Option(help="Only kernels with this in their names; may be repeated.", show_default=False),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Also launches with attention maps, and the kernels of distillation.")
    ] = False,
    tf32: Annotated[
        bool, typer.Option("--tf32", help="float32 as it runs where torch is told to allow TF32 in matrix products.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=0, help="Time for each timing, once seven rounds are done.")] = 1.0,
    device: Annotated[str | None, typer.Option(help="cuda or cuda:N. Default: the first GPU.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Print what is kept and where it lies; nothing else.")] = False,
    reset: Annotated[bool, typer.Option("--reset", help="Delete what is kept for this device; nothing else.")] = False,
) -> None:
    """Measure which tiles the kernels are fastest with on this GPU, and keep them for it in the cache folder.

    Then whether feed-forward products are faster with the activation inside, or as cuBLAS's with the activation after
    them, and from how many tokens on.

    Never needed: what is shipped is chosen for every GPU. Anything else is kept only when its results are right and it
    was faster twice. Each launch that is done is kept, whatever stops the rest. FASTBERT_TUNED=0 runs what is shipped
    again, and so does --reset.

    Exit code 0: measured, shown or deleted; 2: the input cannot be used, or there is no GPU; 130: interrupted.
    """
    if show and reset:
        fail("--show and --reset: give one of them")
    if show or reset:
        _show() if show else _reset()
        return
    chosen = _parse_lengths(lengths, tokens)

    import torch
    from rich.console import Console

    from fastbert.inputs import InputError, load_config, parse_dtype
    from fastbert.tuning.launches import COMMON, Widths
    from fastbert_kernels.tuned import kind, path_of

    try:
        working = parse_dtype(dtype)
        gpu = _gpu(device)
        with quiet():
            models = COMMON if model is None else (Widths.of(load_config(model)),)
    except InputError as error:
        fail(str(error))
    if tf32:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    todo = _choose(models, working, tuple(kernel or ()), full, dtype, chosen)
    check_writable("FASTBERT_CACHE", path_of(kind(gpu)))
    console = Console(highlight=False)
    outcomes: list[Outcome | Choice] = []
    try:
        _measure(todo, gpu, (chosen, tokens, seconds), outcomes)
    except OSError as error:
        fail(f"cannot write measured tiles: {error}; FASTBERT_CACHE names another folder")
    except KeyboardInterrupt:
        console.print("interrupted: what is finished is kept", style="yellow")
        _report(console, outcomes, gpu)
        raise typer.Exit(INTERRUPTED) from None
    _report(console, outcomes, gpu)


def _choose(
    models: "tuple[Widths, ...]",
    working: "torch.dtype",
    named: tuple[str, ...],
    full: bool,
    dtype: str,
    lengths: tuple[int, ...],
) -> "tuple[list[Launch], list[Product]]":
    """What to measure: launches and products of these models, whose names contain one of those named if there are."""
    from fastbert.tuning.launches import launches, products

    todo = launches(models, working, full, named, lengths), products(models, working, named)
    if not any(todo):
        there = [x.kernel for x in launches(models, working, full)] + [x.kernel for x in products(models, working)]
        more = "" if full else ", more with --full"
        names = ", ".join(dict.fromkeys(there))
        fail(f"no kernel has {' or '.join(named)!r} in its name: there are {names} in {dtype}{more}")
    return todo


def _parse_lengths(text: str, tokens: int) -> tuple[int, ...]:
    try:
        lengths = tuple(int(part) for part in text.split(","))
    except ValueError:
        fail(f"--lengths {text!r} are not whole numbers with commas between: write such as 30,128,512")
    for length in lengths:
        if not 1 <= length <= tokens:
            fail(f"--lengths {text!r}: {length} is out of range: a call has {tokens} tokens (--tokens)")
    return tuple(dict.fromkeys(lengths))


def _gpu(device: str | None) -> "torch.device":
    """The GPU to measure on, with its index; from here on the current one."""
    import torch

    from fastbert.inputs import parse_device
    from fastbert_kernels.backend import why_no_kernels

    if not torch.cuda.is_available():
        fail("tune measures on a GPU, and torch sees none here: the shipped tiles stay in force")
    found = parse_device(device or "cuda")
    if found.type != "cuda":
        fail(f"tune measures on a GPU, not on {device!r}: name one, such as cuda:0")
    if reason := why_no_kernels(found.index or 0):
        fail(f"tune measures kernels, and none run here: {reason}")
    torch.cuda.set_device(found.index or 0)
    return torch.device("cuda", found.index or 0)


def _measure(
    todo: "tuple[list[Launch], list[Product]]",
    gpu: "torch.device",
    how: tuple[tuple[int, ...], int, float],
    outcomes: "list[Outcome | Choice]",
) -> None:
    """Measure launches and then products, adding to the outcomes and to the file as each is done."""
    import functools
    import itertools

    from rich.console import Console

    from fastbert.benchmark.provenance import facts
    from fastbert.tuning.choice import choose
    from fastbert.tuning.neighbours import neighbours
    from fastbert.tuning.problems import Sizes
    from fastbert.tuning.tuner import flushed, tune
    from fastbert_kernels import tuned
    from fastbert_kernels.backend import arch

    lengths, tokens, seconds = how
    name = tuned.kind(gpu)
    entries = _kept_before(name)
    provenance = facts(gpu) | {"architecture": arch(gpu)}
    with _progress(Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=len(todo[0]) + len(todo[1]))
        common: dict[str, Any] = {
            "sizes": Sizes(lengths=lengths, tokens=tokens),
            "timer": functools.partial(flushed, seconds=seconds),
            "table": dict(map(tuned.read_entry, entries.values())),
            "tell": lambda message: bar.update(task, description=message),
        }
        measuring: Iterator[Outcome | Choice] = itertools.chain(
            tune(todo[0], gpu, candidates=neighbours, **common), choose(todo[1], gpu, **common)
        )
        for outcome in measuring:
            outcomes.append(outcome)
            before = entries.pop(outcome.launch, None)
            if outcome.kept:
                entries[outcome.launch] = outcome.entry()
            if outcome.kept or before is not None:
                tuned.write(name, list(entries.values()), provenance)
            bar.advance(task)


def _kept_before(name: str) -> dict[Any, dict[str, Any]]:
    """The entries of the file of a kind of device, as far as they hold here."""
    from fastbert_kernels import tuned

    try:
        entries = tuned.load(tuned.path_of(name), name)["entries"]
    except (FileNotFoundError, ValueError):
        return {}
    return {tuned.read_entry(entry)[0]: entry for entry in entries}


def _report(console: "Console", outcomes: "list[Outcome | Choice]", gpu: "torch.device") -> None:
    """What was measured, gains and losses alike, and where it lies."""
    from fastbert.tuning.choice import Choice
    from fastbert_kernels import tuned

    table = _table()
    for outcome in outcomes:
        for shape in outcome.shapes:
            _add(table, str(outcome.launch), shape.entry())
        if not outcome.shapes:
            table.add_row(str(outcome.launch), "-", outcome.as_shipped, "-", "-", "-", "-", "shipped")
    console.print(table)
    for outcome in outcomes:
        for line in outcome.refused:
            console.print(f"{outcome.launch}: {line}", style="yellow", markup=False, soft_wrap=True)
    choices = [outcome for outcome in outcomes if isinstance(outcome, Choice)]
    kept = sum(outcome.kept for outcome in outcomes)
    if launches := len(outcomes) - len(choices):
        tiles = kept - sum(choice.kept for choice in choices)
        console.print(f"{tiles} of {launches} launches have faster tiles than the shipped ones", style="bold")
    for choice in choices:
        console.print(str(choice), style="bold", soft_wrap=True)
    if kept:
        console.print(f"kept in {tuned.path_of(tuned.kind(gpu))}", markup=False, soft_wrap=True)
    if kept and not tuned.enabled():
        console.print("FASTBERT_TUNED=0 is set: they will not be read", style="yellow")


def _show() -> None:
    """Print the files there are, and the tiles in force."""
    from rich.console import Console

    from fastbert_kernels import tuned

    console = Console(highlight=False)
    name, files = _this_device(), sorted(tuned.folder().glob("tiles-*.json"))
    if not files:
        console.print(f"no measured tiles in {tuned.folder()}: the shipped ones run", markup=False, soft_wrap=True)
    for file in files:
        if file != tuned.path_of(name):
            console.print(f"{file}: of another device", markup=False, soft_wrap=True)
            continue
        try:
            content = tuned.load(file, name)
        except ValueError as error:
            console.print(f"{file}: ignored, {error}", markup=False, style="yellow", soft_wrap=True)
            continue
        state = "in force" if tuned.enabled() else "not read, FASTBERT_TUNED=0 is set"
        about = content.get("provenance", {})
        console.print(f"{file}: {state}; {name}, {about.get('date', 'no date')}", markup=False, soft_wrap=True)
        table = _table()
        for entry in content["entries"]:
            launch, _ = tuned.read_entry(entry)
            for shape in entry.get("shapes", []):
                _add(table, str(launch), shape)
        console.print(table)


def _reset() -> None:
    from fastbert_kernels import tuned

    path = tuned.path_of(_this_device())
    if path.exists():
        path.unlink()
        typer.echo(f"deleted {path}: the shipped tiles run")
    else:
        typer.echo(f"no measured tiles of this device in {tuned.folder()}: the shipped ones run")


def _this_device() -> str:
    import torch

    from fastbert_kernels import tuned

    return tuned.kind(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _table() -> "Table":
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("kernel", "shape", "shipped"):
        shown.add_column(name)
    shown.add_column("us", justify="right", no_wrap=True)
    shown.add_column("best other")
    for name in ("us", "gain"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("in force", no_wrap=True)
    return shown


def _add(table: "Table", launch: str, shape: dict[str, Any]) -> None:
    """A row of a shape as it is in a file."""
    from rich.text import Text

    (shipped, best), before, after = shape["between"], shape["shipped_us"], shape["tuned_us"]
    verdict = Text("tuned", "green") if shape["kept"] else Text("shipped")
    gain = f"{before / after:.2f}x"
    table.add_row(launch, shape["shape"], shipped, f"{before:.1f}", best, f"{after:.1f}", gain, verdict)


def _progress(console: "Console") -> "Progress":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)

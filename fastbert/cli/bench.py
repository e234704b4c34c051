"""`fastbert bench`: how fast is it, here, on this model and these lengths?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import (
    MODEL_HELP,
    check_targets,
    default_model,
    fail,
    printable,
    quiet,
    read_sentences,
    telling,
    write_json,
    writing,
)

if TYPE_CHECKING:
    from rich.console import Console

    from fastbert.benchmark.results import Results


def bench(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=False)] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(help="What to do; may be repeated. An unknown name lists the known.", show_default=False),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Your texts, one a line: makes the workloads yours-*.")] = None,
    lengths: Annotated[
        Path | None,
        typer.Option(help="A histogram of your lengths, lines of tokens,count: makes the workloads yours-*."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a batch of your texts or lengths.")] = 32,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="Whom to compare; may be repeated. An unknown name lists the known.", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16, bfloat16. Default: bfloat16 on a GPU, else float32.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: the GPU if there is one.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Time for each workload, once five rounds are done.")] = 5.0,
    json_file: Annotated[str | None, typer.Option("--json", help="Write the results as JSON; - is stdout.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the speed-ups into this PNG.")] = None,
) -> None:
    """Time fastbert and its peers on a model: every round gives each its turn, outputs are compared first.

    Exit code 0: timed; 1: fastbert failed or was wrong; 2: the input cannot be used.
    """
    check_targets(json_file, ("--plot", plot))
    if file is not None and lengths is not None:
        fail("--file and --lengths both say how long your texts are: give one of them")
    texts = read_sentences(None, file)
    model = model or default_model()

    from rich.console import Console

    console = Console(stderr=json_file == "-", highlight=False)
    from fastbert.benchmark.users import measure
    from fastbert.inputs import InputError

    with quiet(), telling("starting") as tell:
        try:
            results = measure(
                model,
                workload or (),
                texts=texts,
                histogram=lengths,
                batch=batch,
                peers=peer or (),
                dtype=dtype,
                device=device,
                seconds=seconds,
                tell=tell,
            )
        except InputError as error:
            fail(str(error))
    _show(console, results)
    write_json(json_file, results.to_json())
    if plot is not None:
        with writing("--plot", plot):
            _draw(results, plot)
        console.print(f"plot: {printable(plot)}", markup=False)
    if any(group.ours is None for group in results.groups()):
        raise typer.Exit(1)


def _show(console: "Console", results: "Results") -> None:
    from fastbert.benchmark.results import show

    show(console, results.groups())
    about = results.facts
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    console.print(f"{about['device']}; {versions}", markup=False, soft_wrap=True)


def _draw(results: "Results", path: Path) -> None:
    from fastbert.benchmark.plots import speedup_bars

    about = results.facts
    packages = ", ".join(f"{name} {about['versions'][name]}" for name in ("torch", "transformers"))
    speedup_bars(results.groups(), path, title=about["device"], note=f"{about['date'][:10]}, {packages}")

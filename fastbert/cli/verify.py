"""`fastbert verify`: is it right, here, on this model?"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    MODEL_HELP,
    check_targets,
    choose_interpreter,
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

    from fastbert.verify.report import Check, Report, Timing

#: The longest sentence whose tokens can all be named in the heatmap.
HEATMAP_TOKENS = 22


def verify(
    model: Annotated[
        str | None,
        typer.Argument(help=MODEL_HELP, show_default=False),
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="A sentence to compare on; may be repeated.")] = None,
    file: Annotated[Path | None, typer.Option(help="A text file, one sentence a line.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16 (fp32, fp16, bf16).")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: the GPU if there is one.")] = None,
    backend: Annotated[
        str, typer.Option(help="auto, torch or triton. On the CPU, triton runs the kernels in Triton's interpreter.")
    ] = "auto",
    train: Annotated[bool, typer.Option("--train", help="Compare every parameter's gradient as well.")] = False,
    json_file: Annotated[str | None, typer.Option("--json", help="Write the result as JSON; - is stdout.")] = None,
    heatmap: Annotated[Path | None, typer.Option(help="Draw one sentence's attention maps into this PNG.")] = None,
    repeats: Annotated[int, typer.Option(min=0, help="Timed repetitions; 0 for no timing.")] = 5,
    max_length: Annotated[int | None, typer.Option(help="Cut sentences to this many tokens.")] = None,
) -> None:
    """Compare fastbert with Hugging Face on real text: outputs, gradients (--train), time.

    Exit code 0: within bounds; 1: a bound is broken; 2: the input cannot be used.
    """
    sentences = read_sentences(text, file)
    model = model or default_model()
    check_targets(json_file, ("--heatmap", heatmap))
    choose_interpreter(backend, device)

    from rich.console import Console

    # With JSON on stdout, people read on stderr.
    console = Console(stderr=json_file == "-", highlight=False)
    from fastbert.inputs import SENTENCES, InputError
    from fastbert.verify.compare import compare
    from fastbert_kernels import backend as use_backend

    with quiet(), telling("starting") as tell:
        try:
            report = compare(
                model,
                sentences or SENTENCES,
                dtype=dtype,
                device=device,
                backend=backend,
                train=train,
                repeats=repeats,
                max_length=max_length,
                progress=tell,
            )
        except InputError as error:
            fail(str(error))
        from fastbert.fusing import explain

        with use_backend(backend):
            explanation = explain(report.model)

    _show(console, report, explanation)
    if heatmap is not None:
        with writing("--heatmap", heatmap):
            _draw(report, heatmap)
        console.print(f"\nheatmap: {printable(heatmap)}", markup=False)
    write_json(json_file, json.dumps(report.to_dict(), indent=2) + "\n")
    if not report.ok:
        raise typer.Exit(1)


def _show(console: "Console", report: "Report", explanation: Any) -> None:
    _show_setting(console, report)
    console.print()
    _show_checks(console, report)
    console.print()
    _show_verdict(console, report)
    console.print()
    if report.timings:
        _show_times(console, report.timings)
    else:
        console.print(f"Not timed: {report.timing_skipped}.", markup=False)
    console.print()
    console.print(str(explanation), markup=False, soft_wrap=True)
    console.print()
    _show_outputs(console, report)


def _show_setting(console: "Console", report: "Report") -> None:
    """What ran, on what, where."""
    about = report.provenance
    heads, size = about["heads"], about["hidden_size"] // about["heads"]
    fill = f"{about['tokens']} tokens in {about['sentences']} x {about['seq']} positions (fill {about['fill']:.0%})"
    cut = f", {about['truncated']} cut to length" if about["truncated"] else ""
    lines = {
        "model": f"{printable(about['model'])}: {about['layers']} layers, {heads} heads of {size}",
        "batch": f"{fill}{cut}",
        "runs as": f"{about['dtype']} on {about['device']}, kernels: {about['backend']}",
        "versions": ", ".join(f"{name} {value}" for name, value in about["versions"].items() if value),
    }
    for name, value in lines.items():
        console.print(f"{name:<9}{value}", markup=False, soft_wrap=True)


def _show_checks(console: "Console", report: "Report") -> None:
    """The error of every output, and the worst of each part's gradients, beside their bounds."""
    from fastbert.verify.compare import GRADIENT_BOUND, HALF_RATIO, OUTPUT_BOUND

    half = report.provenance["dtype"] != "float32"
    limit = f"{HALF_RATIO:g} x HF's own error" if half else f"{OUTPUT_BOUND:.0e}"
    _table(
        console,
        f"Largest error against float64 (bound: {limit})",
        ("output", "shape"),
        [((check.name, _shape(check.shape)), check) for check in report.outputs],
    )
    if report.gradients:
        limit = f"{HALF_RATIO:g} x HF's own error" if half else f"{GRADIENT_BOUND:.0e}"
        console.print()
        _table(
            console,
            f"Largest relative error of a gradient (bound: {limit})",
            ("part", "worst parameter"),
            _worst(report.gradients),
        )


def _show_verdict(console: "Console", report: "Report") -> None:
    """Whether all is within bounds, and what a broken bound may mean in half precision."""
    half = report.provenance["dtype"] != "float32"
    broken = [check for check in [*report.outputs, *report.gradients] if not check.ok]
    count = len(report.outputs) + len(report.gradients)
    if broken:
        console.print(f"[bold red]✗ {len(broken)} of {count} tensors are out of bounds[/]")
    else:
        console.print(f"[bold green]✓ all {count} tensors are within their bounds[/]")
    if half and report.typical_ratio is not None:
        console.print(f"Root mean square errors are {report.typical_ratio:.2f} of HF's own, in the median of all.")
    if half and broken and all(check.rms <= check.hf_rms for check in broken):
        console.print(
            "Where a bound is broken they are no more than HF's either: the largest error of few elements is chance, "
            "which more or longer sentences even out.",
            soft_wrap=True,
        )


def _show_outputs(console: "Console", report: "Report") -> None:
    shapes = {check.name: check.shape for check in report.outputs}
    console.print("The four outputs" if "pooler_output" in shapes else "The outputs; there is no pooler")
    for name in dict.fromkeys(key.partition("[")[0] for key in shapes):
        several = [shape for key, shape in shapes.items() if key.startswith(f"{name}[")]
        shape = f"{len(several)} x {_shape(several[0])}" if several else _shape(shapes[name])
        console.print(f"  {name:<18} {shape}", markup=False)


def _table(
    console: "Console", title: str, heading: Sequence[str], rows: Sequence[tuple[Sequence[str], "Check"]]
) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in heading:
        table.add_column(name, overflow="fold")
    for name in ("fastbert", "HF", "ratio", "bound"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("ok")
    for cells, check in rows:
        ratio = Text("-" if check.ratio is None else f"{check.ratio:.2f}")
        if check.ratio is not None and check.ratio > 1:
            ratio.stylize("yellow")
        verdict = Text("✓", "green") if check.ok else Text(f"✗ {check.problem or ''}".strip(), "bold red")
        numbers = [Text(f"{value:.1e}") for value in (check.error, check.hf_error)]
        table.add_row(*map(Text, cells), *numbers, ratio, Text(f"{check.bound:.1e}"), verdict)
    console.print(table)


def _worst(gradients: Sequence["Check"]) -> list[tuple[tuple[str, str], "Check"]]:
    """Per part of the model, the gradient closest to its bound or furthest over it."""
    from fastbert.verify.compare import gradient_group

    def badness(check: "Check") -> tuple[bool, float]:
        return not check.ok, check.error / (check.bound or 1.0)

    worst: dict[str, Check] = {}
    for check in gradients:
        part = gradient_group(check.name)
        if part not in worst or badness(check) > badness(worst[part]):
            worst[part] = check
    return [((part, _short(check.name)), check) for part, check in worst.items()]


def _short(parameter: str) -> str:
    """A parameter's name without the part of the model it belongs to, short enough for a terminal's 80 columns."""
    parts = parameter.split(".")
    if parts[:2] == ["encoder", "layer"]:
        parts = parts[4:] if parts[3] == "attention" else parts[3:]
    else:
        parts = parts[1:]
    return ".".join(part for part in parts if part != "dense")


def _show_times(console: "Console", timings: Sequence["Timing"]) -> None:
    from rich.table import Table

    table = Table(
        title="Median time; right: Hugging Face / fastbert",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("work", overflow="fold")
    for name in ("fastbert", "HF eager", "HF sdpa", "eager", "sdpa"):
        table.add_column(name, justify="right")
    for timing in timings:
        sdpa = "-" if timing.hf_sdpa is None else f"{1e3 * timing.hf_sdpa:.1f} ms"
        ratio = "-" if timing.sdpa_ratio is None else f"{timing.sdpa_ratio:.2f}x"
        times = [f"{1e3 * seconds:.1f} ms" for seconds in (timing.fastbert, timing.hf_eager)]
        table.add_row(timing.name, *times, sdpa, f"{timing.eager_ratio:.2f}x", ratio)
    console.print(table)


def _draw(report: "Report", path: Path) -> None:
    """The longest sentence whose tokens can be named, or the shortest of all."""
    from fastbert.maps.heatmap import attention_heatmap

    if not report.attentions:
        fail("--heatmap: the model returned no attentions to draw")
    lengths = [len(tokens) for tokens in report.tokens]
    fitting = [length for length in lengths if length <= HEATMAP_TOKENS]
    sentence = lengths.index(max(fitting) if fitting else min(lengths))
    name = printable(Path(report.provenance["model"]).name)
    title = f"fastbert attentions, {name}, {report.provenance['dtype']}"
    attention_heatmap(report.attentions, report.tokens[sentence], path, sentence=sentence, title=title)


def _shape(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))})" if shape else "-"

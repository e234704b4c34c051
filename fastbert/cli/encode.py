"""`fastbert encode`: embeddings of a file of text."""

import contextlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import INTERRUPTED, check_unicode, check_writable, fail, printable, quiet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

    from fastbert.encode.files import Summary


@dataclass
class _Work:
    """How far a run is.

    Attributes:
        folder: where what is finished waits.
        earlier: whether an earlier run has left it.
        done, rows: how many rows are finished, and how many there are.
    """

    folder: Path
    earlier: bool
    done: int = 0
    rows: int = 0

    def kept(self) -> str:
        """What a run that stops ends with saying."""
        again = "the same command goes on from there"
        if self.done:
            return f"; {self.done:,} of {self.rows:,} rows are finished and kept in {printable(self.folder)}, {again}"
        if self.earlier:
            return f"; what an earlier run finished is kept in {printable(self.folder)}, {again}"
        return "; nothing was finished"


def encode(
    model: Annotated[str, typer.Argument(help="Folder of a checkpoint, or a name on the Hugging Face hub.")],
    input_file: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT", help="A .csv, .tsv, .jsonl or .parquet file, or any other of UTF-8 text lines."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The Parquet file to write; replaced when all is done, never before.")],
    column: Annotated[
        str | None, typer.Option(help="Of a file with columns. Default: its only column of text.", show_default=False)
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(
            help="mean, cls, max, mean_sqrt_len_tokens, weightedmean or lasttoken. Default: the folder's, else mean.",
            show_default=False,
        ),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(help="Scale embeddings to length 1. Default: as the folder does, else not.", show_default=False),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Stands before each text. Default: the folder's default prompt.", show_default=False),
    ] = None,
    prompt_name: Annotated[
        str | None, typer.Option(help="One of the folder's prompts, such as query.", show_default=False)
    ] = None,
    keep_text: Annotated[bool, typer.Option("--keep-text", help="Write the text beside its embedding.")] = False,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Cut texts to this many tokens. Default: the folder's, else what the model takes.", show_default=False
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a batch.")] = 8192,
    dtype: Annotated[
        str, typer.Option(help="float32, float16 or bfloat16, what the model computes in. Embeddings are float32.")
    ] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: the GPU if there is one.")] = None,
) -> None:
    """Embed every row of a file into a Parquet file, in its order: columns row (from 0), embedding and problem.

    What a folder of sentence-transformers says of its pooling, normalization, length and prompt is done, unless an
    option says otherwise.

    Whatever stops it, the same command goes on where it stopped: what is finished waits in OUT.parts. A bad row (empty,
    null, not UTF-8, with NUL characters, with more or fewer cells than a CSV file's heading, no JSON object, with an
    embedding that is not finite) is reported, its problem is named, its embedding is NaN, and the rest goes on. Texts
    that are cut are counted.

    Exit code 0: every row has an embedding; 1: there are bad rows; 2: the input cannot be used, or it had to stop;
    130: interrupted.
    """
    if importlib.util.find_spec("pyarrow") is None:
        fail("encode needs pyarrow, which is not installed: pip install pyarrow")
    _check_paths(input_file, out)

    from rich.console import Console

    from fastbert.encode import Encoder
    from fastbert.encode.files import encode_file
    from fastbert.encode.rows import Texts

    console = Console(stderr=True, highlight=False)
    if prompt is not None:
        check_unicode("--prompt", prompt)
    folder = out.with_name(f"{out.name}.parts")
    work = _Work(folder, folder.exists())
    with _stops(work):
        texts = Texts(input_file, column)
        with quiet(), console.status("starting ..."):
            encoder = Encoder(
                model,
                pooling=pooling,
                normalize=normalize,
                prompt=prompt,
                prompt_name=prompt_name,
                max_length=max_length,
                tokens=tokens,
                dtype=dtype,
                device=device,
            )
        with _progress(console, work) as tell:
            summary = encode_file(encoder, texts, out, keep_text=keep_text, tell=tell)
    if summary.cut:
        console.print(f"{summary.cut:,} texts are longer than {encoder.max_length} tokens: their ends were cut off")
    _show(console, summary, f"embeddings of {encoder.hidden} numbers: {printable(out)}")


@contextlib.contextmanager
def _stops(work: _Work) -> "Iterator[None]":
    """End with one line, and the exit code that belongs to it, for whatever stops the work."""
    import torch

    from fastbert.inputs import InputError

    try:
        yield
    except InputError as error:
        fail(str(error))
    except OSError as error:
        fail(f"stopped: {error.strerror or error}{work.kept()}")
    except torch.OutOfMemoryError:
        fail(f"stopped: out of memory: give fewer --tokens to a batch{work.kept()}")
    except KeyboardInterrupt:
        typer.echo(f"stopped: interrupted{work.kept()}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _show(console: "Console", summary: "Summary", written: str) -> None:
    """What was done, and every bad row as far as they are known by number; exit code 1 where there are some."""
    for row, reason in summary.bad:
        console.print(f"row {row}: {reason}", markup=False)
    count = summary.reasons.total()
    if count > len(summary.bad):
        console.print(f"... and {count - len(summary.bad):,} more, all named in the column problem")
    done = f"{summary.rows - count:,} {written}"
    if summary.resumed:
        done += f"; {summary.resumed:,} rows were finished before"
    console.print(done, markup=False, soft_wrap=True)
    if count:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in summary.reasons.most_common())
        console.print(f"{count:,} of {summary.rows:,} rows are bad: {reasons}", style="bold red", markup=False)
        raise typer.Exit(1)


def _check_paths(input_file: Path, out: Path) -> None:
    """Fail before the work on paths that cannot be read or written."""
    if os.path.isdir(input_file):
        fail(f"{str(input_file)!r} is a folder: name the model first, then a file of text")
    if not os.path.isfile(input_file):
        fail(f"no file {str(input_file)!r}: name a .csv, .tsv, .jsonl, .parquet or text file")
    if out.suffix.lower() != ".parquet":
        fail(f"--out {str(out)!r} is not a Parquet file: let its name end in .parquet")
    check_writable("--out", out)
    if out.exists() and out.samefile(input_file):
        fail(f"--out {str(out)!r} is the input: choose another name")
    check_writable("--out", out.with_name(f"{out.name}.parts") / "journal")  # a longer name


@contextlib.contextmanager
def _progress(console: "Console", work: _Work) -> "Iterator[Callable[[int, int], None]]":
    """A bar, while it lasts, that is told how many rows are done, and how many there are."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("embedding", total=None)

        def tell(done: int, rows: int) -> None:
            work.done, work.rows = done, rows
            progress.update(bar, completed=done, total=rows)

        yield tell

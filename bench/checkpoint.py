"""A checkpoint small enough to travel to another machine: `python -m bench.checkpoint OUT`."""

import shutil
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from safetensors.torch import load_file, save_file

from fastbert.cli.common import LOCAL_CHECKPOINT

#: Bytes of all files together.
MOST_BYTES = 64_000_000
WEIGHTS = "model.safetensors"


def shrink(source: Path, out: Path, most: int = MOST_BYTES) -> int:
    """Write a checkpoint's weights in float16, its configuration and its tokenizer.

    Args:
        source: folder of the checkpoint, with its weights in safetensors.
        out: folder to write into.
        most: bytes that it may have.

    Returns:
        Its bytes.

    Raises:
        ValueError: when there is no checkpoint, or it would be too large; nothing is left behind then.
    """
    if not (source / WEIGHTS).is_file():
        raise ValueError(f"no {WEIGHTS} in {str(source)!r}: `make demo` fetches a checkpoint")
    if out.exists():
        raise ValueError(f"{str(out)!r} is there already: name a folder that is not")
    weights = {name: x.half() if x.is_floating_point() else x for name, x in load_file(source / WEIGHTS).items()}
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        config.dtype = torch.float16
        config.save_pretrained(out)
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(out)
        save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        if size > most:
            raise ValueError(f"{str(source)!r} has {size / 1e6:.1f} MB in float16, over {most / 1e6:.1f} MB")
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return size


def main(
    out: Annotated[Path, typer.Argument(help="Folder to write, which is not there yet.")],
    source: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = LOCAL_CHECKPOINT,
) -> None:
    """Write a checkpoint in float16 with its tokenizer, under 64 MB. Exit code 2: it cannot be done."""
    try:
        size = shrink(source, out)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"{out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    typer.run(main)

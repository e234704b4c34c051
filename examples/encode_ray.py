"""Embed a column of text on a Ray cluster: the map of `fastbert encode`, on a pool of actors.

Every row keeps its columns and gets two more: `embedding`, and `problem`, which is null unless the text is null, empty
or not UTF-8; the embedding is then NaN. On one machine, with two workers:

    pip install pyarrow 'ray[data]'
    python examples/encode_ray.py path/to/checkpoint texts.parquet --column text --out embedded --workers 2

The folder written holds Parquet files, which together have the rows in the order of the input. On a cluster, paths have
to mean the same on every machine.
"""

import importlib.util
import os
from pathlib import Path
from typing import Annotated, Any, NoReturn

if missing := [name for name in ("pyarrow", "ray") if importlib.util.find_spec(name) is None]:
    raise SystemExit(f"error: {' and '.join(missing)} not installed: pip install pyarrow 'ray[data]'")

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import ray
import typer
from ray.data.datasource import BlockBasedFileDatasink


class Embed:
    """What an actor keeps: a model. Called with an Arrow table, it adds the embeddings."""

    def __init__(self, model: str, column: str, settings: dict[str, Any]) -> None:
        from fastbert.encode import Encoder

        self.encoder = Encoder(model, **settings)
        self.column = column

    def __call__(self, table: Any) -> Any:
        from fastbert.encode.files import embed_column

        for name, values in embed_column(self.encoder, table[self.column], self.column).items():
            table = table.append_column(name, values)
        return table


class ParquetFiles(BlockBasedFileDatasink):
    """A Parquet file for each block, its rows in order, the files named in order: `write_parquet` mixes rows up."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), file_format="parquet")

    def write_block_to_file(self, block: Any, file: Any) -> None:
        pq.write_table(block.to_arrow(), file)


def main(
    model: Annotated[str, typer.Argument(help="Folder of a BERT checkpoint, or a name on the Hugging Face hub.")],
    input_file: Annotated[Path, typer.Argument(metavar="INPUT", help="A Parquet file, or a folder of them.")],
    out: Annotated[Path, typer.Option(help="A folder that is new or empty.")],
    column: Annotated[str, typer.Option(help="The column of text.")] = "text",
    workers: Annotated[int, typer.Option(min=1, help="Actors, each with a model.")] = 2,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs for each actor.")] = 0.0,
    rows: Annotated[int, typer.Option(min=1, help="Rows given to an actor at a time, and in a file written.")] = 8192,
    pooling: Annotated[
        str | None, typer.Option(help="Such as mean or cls. Default: the folder's, else mean.", show_default=False)
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(help="Scale embeddings to length 1. Default: as the folder does, else not.", show_default=False),
    ] = None,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster. Default: this machine.")] = None,
) -> None:
    """Embed INPUT on Ray. Exit code 0: every row has an embedding; 1: there are bad rows; 2: bad input."""
    from fastbert.encode import POOLINGS

    if pooling is not None and pooling not in POOLINGS:
        fail(f"unknown pooling {pooling!r}: choose from {', '.join(POOLINGS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        fail(f"--out {str(out)!r} is not an empty folder: choose another")
    known = ds.dataset(input_file, format="parquet").schema.names
    if column not in known:
        fail(f"{str(input_file)!r} has no column {column!r}: choose from {', '.join(known)}")
    # An actor takes a CPU, and so does reading: on a small machine they would wait for each other.
    cpus = None if address else max(os.cpu_count() or 1, workers + 1)
    ray.init(address=address, num_cpus=cpus, include_dashboard=False)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    texts = ray.data.read_parquet(str(input_file.absolute()))
    embedded = texts.repartition(target_num_rows_per_block=rows).map_batches(
        Embed,
        fn_constructor_args=(
            model,
            column,
            {"pooling": pooling, "normalize": normalize, "device": "cuda" if gpus else "cpu"},
        ),
        batch_format="pyarrow",
        batch_size=rows,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=gpus,
    )
    embedded.write_datasink(ParquetFiles(out.absolute()))

    written = ds.dataset(out, format="parquet")
    bad = written.count_rows(filter=ds.field("problem").is_valid())
    typer.echo(f"{written.count_rows() - bad:,} embeddings: {out}")
    if bad:
        typer.echo(f"{bad:,} rows are bad: their problem is named, their embedding is NaN", err=True)
        raise typer.Exit(1)


def fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    typer.run(main)

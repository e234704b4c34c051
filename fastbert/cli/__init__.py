"""The `fastbert` command.

Torch and transformers are imported inside the commands: help must be quick, and Triton's interpreter can only be chosen
before the kernels are defined.
"""

from typing import Annotated

import typer

try:
    from fastbert import __version__
except ImportError as error:  # of that project's file, which has replaced ours
    raise SystemExit(
        f"error: another project has replaced files of this one, fastbert-triton ({error}): pip uninstall fastbert "
        "fastbert-triton, then install fastbert-triton again"
    ) from None

from .attend import attend
from .bench import bench
from .common import check_environment
from .encode import encode
from .env import env
from .tune import tune
from .verify import verify

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
# Each line of the list fits into 80 columns.
app.command(short_help="Compare every output with Hugging Face's, and time both.")(verify)
app.command(short_help="Time a model beside other ways to run it.")(bench)
app.command(short_help="Embed a file of text.")(encode)
app.command(short_help="Show attention, or what an answer comes from.")(attend)
app.command(short_help="Measure on a GPU whether other tiles are faster.")(tune)
app.command(short_help="Print what a bug report needs.")(env)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fastbert {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """fastbert: a drop-in Hugging Face BertModel on fused Triton kernels."""
    check_environment()

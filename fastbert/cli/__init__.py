"""The `fastbert` command.

Torch and transformers are imported inside the commands: help must be quick, and Triton's interpreter can only be chosen
before the kernels are defined.
"""

import typer

from .attend import attend
from .bench import bench
from .common import check_environment
from .encode import encode
from .tune import tune
from .verify import verify

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
app.command()(verify)
app.command()(bench)
app.command()(encode)
app.command()(attend)
app.command()(tune)


@app.callback()
def main() -> None:
    """fastbert: a drop-in Hugging Face BertModel on fused Triton kernels."""
    check_environment()

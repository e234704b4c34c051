"""`python -m fastbert`: the `fastbert` command."""

from fastbert.cli import app

app(prog_name="fastbert")

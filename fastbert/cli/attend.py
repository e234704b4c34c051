"""`fastbert attend`: a look at the attention of one text."""

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from .common import MODEL_HELP, check_unicode, check_writable, default_model, fail, printable, quiet, writing

#: End of the output's name -> the package that makes it, and the extra that brings that.
_NEEDS = {".png": ("matplotlib", "plot"), ".html": ("bertviz", "viz")}


def attend(
    text: Annotated[str, typer.Argument(help="What the model reads.")],
    out: Annotated[Path, typer.Option(help="A .html page, which needs no network, or a .png picture.")],
    model: Annotated[str | None, typer.Option(help=MODEL_HELP, show_default=False)] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(help="A layer to show, from 0; may be repeated. Default: all.", show_default=False),
    ] = None,
    view: Annotated[
        str, typer.Option(help="Of a page: head (lines from token to token) or model (every head of every layer).")
    ] = "head",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: the GPU if there is one.")] = None,
) -> None:
    """Show which tokens of a text attend to which.

    Exit code 0: written; 2: the input cannot be used.
    """
    _check_out(out)
    if not text.strip():
        fail(f"the text {text!r} is empty: give it some words")
    check_unicode("the text", text)
    model = model or default_model()

    import torch

    from fastbert.families import longest_text
    from fastbert.fusing import fuse
    from fastbert.inputs import InputError, check_backend, load, parse_device, tokenize
    from fastbert.maps.heatmap import attention_heatmap
    from fastbert.maps.page import VIEWS, attention_page

    if view not in VIEWS:
        fail(f"unknown view {view!r}: choose from {', '.join(VIEWS)}")
    title = f"fastbert attentions, {printable(Path(model).name)}"
    try:
        on = parse_device(device)
        check_backend(torch.float32, on)
        with quiet():
            bert, tokenizer = load(model)
        count = bert.config.num_hidden_layers
        unknown = sorted({i for i in layer or () if not 0 <= i < count})
        if unknown:
            fail(f"no layer {', '.join(map(str, unknown))}: this model has 0 to {count - 1}")
        batch = tokenize(tokenizer, [text], None, longest_text(bert))
        inputs = {name: ids.to(on) for name, ids in batch.inputs.items()}
        with torch.inference_mode():
            attentions = fuse(bert).to(on)(**inputs, output_attentions=layer or True).attentions
        (tokens,) = batch.tokens
        with writing("--out", out):
            if out.suffix.lower() == ".png":
                attention_heatmap(attentions, tokens, out, title=title)
            else:
                attention_page(attentions, tokens, out, view=view, title=title)
    except (InputError, ValueError) as error:
        fail(str(error))
    cut = ", its end cut off" if batch.truncated else ""
    typer.echo(f"{len(tokens)} tokens{cut}: {printable(out)}")


def _check_out(out: Path) -> None:
    """Fail before the work on a file that cannot be written."""
    if out.suffix.lower() not in _NEEDS:
        fail(f"--out {str(out)!r} is neither a page nor a picture: let its name end in .html or .png")
    package, extra = _NEEDS[out.suffix.lower()]
    if importlib.util.find_spec(package) is None:
        fail(f"{out.suffix} needs {package}, which is not installed: pip install 'fastbert[{extra}]'")
    check_writable("--out", out)

"""`fastbert attend`: a look at the attention of one text, or at what a classifier's answer comes from."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import MODEL_HELP, check_unicode, check_writable, default_model, fail, printable, quiet, writing

if TYPE_CHECKING:
    import torch

    from fastbert.inputs import Tokenized


def attend(
    text: Annotated[str, typer.Argument(help="What the model reads.")],
    out: Annotated[Path, typer.Option(help="A .html page, which needs no network, or a .png picture.")],
    model: Annotated[str | None, typer.Option(help=MODEL_HELP, show_default=False)] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(help="A layer to show, from 0; may be repeated. Default: all.", show_default=False),
    ] = None,
    head: Annotated[
        list[int] | None,
        typer.Option(help="A head to show, from 0; may be repeated. Default: all.", show_default=False),
    ] = None,
    attribute: Annotated[
        str | None,
        typer.Option(
            help="Of a classifier: what this class comes from, over the text. A label, or its number.",
            show_default=False,
        ),
    ] = None,
    rollout: Annotated[bool, typer.Option("--rollout", help="What reaches the first token, over the text.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: the GPU if there is one.")] = None,
) -> None:
    """Show which tokens of a text attend to which, or colour the text by what a class comes from.

    --attribute multiplies attention by its gradient through the layers (Chefer et al.). --rollout uses attention alone
    (Abnar and Zuidema).

    Exit code 0: written; 2: the input cannot be used.
    """
    _check_out(out)
    if attribute is not None and rollout:
        fail("--attribute and --rollout are two pictures: give one of them")
    if (layer or head) and (attribute is not None or rollout):
        fail("--attribute and --rollout go through all layers and heads: leave --layer and --head out")
    if not text.strip():
        fail(f"the text {text!r} is empty: give it some words")
    check_unicode("the text", text)
    model = model or default_model()

    import torch

    from fastbert.inputs import InputError, check_backend, parse_device

    try:
        on = parse_device(device)
        check_backend(torch.float32, on)
        if attribute is not None:
            batch = _attribute(model, text, attribute, on, out)
        elif rollout:
            batch = _roll_out(model, text, on, out)
        else:
            batch = _show_maps(model, text, layer or [], head, on, out)
    except (InputError, ValueError) as error:
        fail(str(error))
    cut = ", its end cut off" if batch.truncated else ""
    typer.echo(f"{len(batch.tokens[0])} tokens{cut}: {printable(out)}")


def _attentions(
    model: str, text: str, layers: list[int], on: "torch.device"
) -> "tuple[tuple[torch.Tensor | None, ...], Tokenized, Any]":
    """The attentions of a text in these layers, or in all, its tokens and the tokenizer."""
    import torch

    from fastbert.fusing import fuse
    from fastbert.inputs import load, tokenize

    with quiet():
        bert, tokenizer = load(model)
    count = bert.config.num_hidden_layers
    unknown = sorted({i for i in layers if not 0 <= i < count})
    if unknown:
        fail(f"no layer {', '.join(map(str, unknown))}: this model has 0 to {count - 1}")
    fused: Any = fuse(bert).to(on)
    batch = tokenize(tokenizer, [text], None, fused.longest)
    inputs = {name: ids.to(on) for name, ids in batch.inputs.items()}
    with torch.inference_mode():
        maps = fused(**inputs, output_attentions=layers or True, packing=True).attentions  # nothing is padded
    return maps, batch, tokenizer


def _show_maps(
    model: str, text: str, layers: list[int], heads: list[int] | None, on: "torch.device", out: Path
) -> "Tokenized":
    """Draw the attention maps."""
    from fastbert.maps.heatmap import attention_heatmap
    from fastbert.maps.page import attention_page

    attentions, batch, _ = _attentions(model, text, layers, on)
    (tokens,) = batch.tokens
    title = f"Attention of {_name(model)}"
    heads = sorted(set(heads)) if heads else None
    with writing("--out", out):
        if out.suffix.lower() == ".png":
            attention_heatmap(attentions, tokens, out, heads=heads, title=title)
        else:
            attention_page(attentions, tokens, out, text=text, heads=heads, title=title)
    return batch


def _roll_out(model: str, text: str, on: "torch.device", out: Path) -> "Tokenized":
    """Draw how much of each token is mixed into the first one."""
    from fastbert.attribution import rollout

    attentions, batch, tokenizer = _attentions(model, text, [], on)
    about = [
        f"Attention of {_name(model)}, rolled out over {len(attentions)} layers",
        f"the colour of a token is how much of it reaches {batch.tokens[0][0]}, by attention alone; all add up to 1",
    ]
    relevance = rollout([each for each in attentions if each is not None])[0]
    _draw("What reaches the first token", about, text, tokenizer, batch, relevance.tolist(), out)
    return batch


def _attribute(model: str, text: str, wanted: str, on: "torch.device", out: Path) -> "Tokenized":
    """Draw what a class comes from."""
    from fastbert.attribution import attribute
    from fastbert.fusing import fuse
    from fastbert.inputs import load_classifier, tokenize

    with quiet():
        classifier, tokenizer = load_classifier(model)
    names: dict[int, str] = classifier.config.id2label
    label = _find_class(wanted, names)
    fused: Any = fuse(classifier).to(on)
    batch = tokenize(tokenizer, [text], None, fused.base_model.longest)
    inputs = {name: ids.to(on) for name, ids in batch.inputs.items()}
    found = attribute(fused, inputs, label)
    answers = found.logits[0].softmax(0) if len(names) > 1 else found.logits[0]
    best = int(answers.argmax())
    about = [
        f"{_name(model)} gives {names[label]} {answers[label]:.3f}"
        + ("" if best == label else f", and most to {names[best]}: {answers[best]:.3f}"),
        "the colour of a token is its relevance: attention times its gradient, through all layers",
    ]
    _draw(f"What speaks for {names[label]}", about, text, tokenizer, batch, found.relevance[0].tolist(), out)
    return batch


def _find_class(wanted: str, names: dict[int, str]) -> int:
    """The number of a class, from its label or its number."""
    numbers = {str(i): i for i in names} | {name: i for i, name in names.items()}
    if wanted not in numbers:
        listed = ", ".join(f"{i} ({name})" for i, name in sorted(names.items())[:20])
        fail(f"no class {wanted!r}: choose from {listed}{' ...' if len(names) > 20 else ''}")
    return numbers[wanted]


def _draw(
    title: str, about: list[str], text: str, tokenizer: Any, batch: "Tokenized", relevance: list[float], out: Path
) -> None:
    """Draw relevance over the text."""
    from fastbert.maps.text import Coloured, pieces_of, relevance_page, relevance_picture

    if not tokenizer.is_fast:
        fail("to colour a text, its tokenizer has to say where tokens stand in it: give one with a tokenizer.json")
    (tokens,) = batch.tokens
    offsets = tokenizer(text, truncation=True, max_length=len(tokens), return_offsets_mapping=True)["offset_mapping"]
    special = [(token, value) for token, value, (a, b) in zip(tokens, relevance, offsets, strict=True) if a == b]
    coloured = Coloured(title, about, pieces_of(text, offsets, relevance), special)
    with writing("--out", out):
        (relevance_picture if out.suffix.lower() == ".png" else relevance_page)(coloured, out)


def _name(model: str) -> str:
    return printable(Path(model).name)


def _check_out(out: Path) -> None:
    """Fail before the work on a file that cannot be written."""
    if out.suffix.lower() not in (".png", ".html"):
        fail(f"--out {str(out)!r} is neither a page nor a picture: let its name end in .html or .png")
    if out.suffix.lower() == ".png" and importlib.util.find_spec("matplotlib") is None:
        fail(".png needs matplotlib, which is not installed: pip install matplotlib")
    check_writable("--out", out)

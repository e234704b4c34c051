"""Whether padding is dropped inside an encoder, and why not.

What is handed out equals eager's, rows of padding included. So padding is dropped where no output that is handed out
has a row of padding in it, or where labels say that nobody reads it; and, by choice, everywhere.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .attention import self_attention
from .look import strangers_in
from .strangers import hooked_wrapper, unwrapped, why_strange

#: What `packing` may be.
PACKING = ("auto", True, False)

#: What to do where padding is kept under "auto".
_WAY_OUT = "packing=True drops it and gives zeros there, as in fastbert.fuse(model, packing=True)"

#: What a model that calls an encoder may read of its output: every row; the pooled output; rows that have a label other
#: than -100; rows that its mask marks.
READS = ("all", "pooled", "labelled", "marked")


#: sentence-transformers' own modules, one after the other.
_POOLING = ["Transformer", "Pooling"]


def check_packing(packing: Any) -> None:
    """Raise ValueError for anything else than `PACKING`."""
    if packing is not True and packing is not False and packing != "auto":
        raise ValueError(f"packing must be one of {', '.join(map(repr, PACKING))}, got {packing!r}")


class Strangers:
    """The first stranger in an `EncoderModel`, looked for once, where something asks."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @functools.cached_property
    def first(self) -> tuple[str, str] | None:
        return next(find_strangers(self.model), None)


def why_kept(
    model: Any, packing: Any, reads: str, labelled: bool, whole: bool, strangers: Strangers | None = None
) -> str | None:
    """Why rows of padding are kept; None where they are dropped, unless labels at padding are read.

    Args:
        model: an `EncoderModel`.
        packing: the choice.
        reads: one of `READS`.
        labelled: there are labels.
        whole: hidden states or attentions are asked for.
        strangers: in the model.
    """
    if packing is False:
        return "packing=False"
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "what is traced serves every number of tokens"
    found = (strangers or Strangers(model)).first
    if found is not None:
        return f"{found[0]} ({found[1]}) may read it"
    return why_read(model, packing, reads, labelled, whole)


def why_read(model: Any, packing: Any, reads: str, labelled: bool, whole: bool) -> str | None:
    """As `why_kept`, of a model with no stranger in it."""
    if packing is False:
        return "packing=False"
    if packing is True or reads == "marked" or (reads == "pooled" and not whole) or is_captured(model):
        return None
    if whole:
        return f"hidden states or attentions are asked for, every row of them; {_WAY_OUT}"
    if reads == "labelled":
        return None if labelled else f"without labels every row is handed out; {_WAY_OUT}"
    return f"every row of last_hidden_state is handed out; {_WAY_OUT}"


def is_captured(model: Any, which: slice = slice(None)) -> bool:
    """Whether `distill.capture` looks at one of these layers: it takes real tokens."""
    attentions = [self_attention(layer) for _, layer in named_layers(model)[which]]
    return any(found is not None and found[1].watcher is not None for found in attentions)


def find_strangers(model: Any) -> Iterator[tuple[str, str]]:
    """The modules between packing and unpacking that know no packed rows, by name, each with what it is."""
    for name, module in (*model.named_before_layers(), *named_layers(model)):
        for inner, what in strangers_in(module):
            yield f"{name}{inner}", what
    for i, layer in enumerate(model.layers):
        hooked = hooked_wrapper(layer)
        if hooked is not None:
            yield f"{model.encoder_name}.layer.{i}", hooked
    why = why_strange(model.encoder)
    if why is not None:
        yield model.encoder_name, why


def named_layers(model: Any) -> list[tuple[str, Any]]:
    """The layers by name, without torch's wrappers before them."""
    return [(f"{model.encoder_name}.layer.{i}", unwrapped(layer)) for i, layer in enumerate(model.layers)]


def masked_reader(module: nn.Module) -> nn.Module | None:
    """The encoder in a module of sentence-transformers whose own pooling, which leaves padding out, reads its rows."""
    parts = list(module.children()) if isinstance(module, nn.Sequential) else []
    kinds = [type(part) for part in parts[:2]]
    if not all(kind.__module__.startswith("sentence_transformers.") for kind in kinds):
        return None
    return getattr(parts[0], "auto_model", None) if [kind.__name__ for kind in kinds] == _POOLING else None


#: What becomes of padding where it is dropped, by what is read.
_DROPPED = {
    "pooled": "dropped, only the pooled output is read; kept where hidden states or attentions are asked for",
    "labelled": "dropped where there are labels, and every one at padding is -100",
    "marked": "dropped, the pooling after it leaves its rows out",
}


def describe_padding(model: Any, reads: str) -> str:
    """What becomes of a padded batch's padding, and why.

    Args:
        model: an `EncoderModel`.
        reads: one of `READS`.
    """
    reason = why_kept(model, model.packing, reads, labelled=True, whole=False)
    if reason is not None:
        return f"kept: {reason}"
    return "dropped, zeros in its place (packing=True)" if model.packing is True else _DROPPED[reads]

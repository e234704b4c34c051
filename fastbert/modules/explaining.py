"""Which parts of an encoder are on the fast path, and why the others are not."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from torch import nn

from .layer import FusedLayer
from .packing import find_strangers
from .readable import norm_reason
from .strangers import unwrapped
from .swap import FUSED, hugging_face_class, model_class


@dataclass(frozen=True)
class Part:
    """One part of a model and how it runs.

    Attributes:
        layer: the encoder layer, or None for the embeddings.
        name: its path in the layer.
        fused: whether it is on fastbert's path: a kernel on a GPU, the same op in plain PyTorch on a CPU.
        reason: why not, or what inside it is called as a module although it does.
        rows: "all", or "first" where it computes the first row of each sequence only.
    """

    layer: int | None
    name: str
    fused: bool
    reason: str | None
    rows: str = "all"


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; printable.

    Attributes:
        parts: how each part of each encoder runs.
        padding: of each fused encoder, what becomes of padding, and why.
    """

    parts: tuple[Part, ...]
    padding: tuple[str, ...] = ()

    @property
    def fused(self) -> bool:
        """Whether every part is on fastbert's path."""
        return all(part.fused for part in self.parts)

    def __rich__(self) -> Group:
        return Group(self._runs(), *[f"padding is {each}" for each in dict.fromkeys(self.padding)])

    def _runs(self) -> Table | str:
        if self.fused and not any(part.reason for part in self.parts):
            layers = len({part.layer for part in self.parts if part.layer is not None})
            short = "; the last one computes first rows only" if any(p.rows == "first" for p in self.parts) else ""
            return f"every part is fused: embeddings and {layers} layers{short}"
        table = Table("layer", "part", "runs", "because")
        for part in self.parts:
            if not part.fused or part.reason:
                layer = "-" if part.layer is None else str(part.layer)
                table.add_row(layer, part.name, "fused" if part.fused else "unfused", part.reason or "")
        return table

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as capture:
            console.print(self, soft_wrap=True)
        return capture.get().rstrip()


def _explain_part(layer: int | None, name: str, module: Any, context: str | None, strange: str | None) -> Part:
    if context is not None:
        return Part(layer, name, False, context)
    if hasattr(module, "unfused_reason"):
        reason, note = module.unfused_reason(), module.note()
    elif isinstance(module, nn.LayerNorm):  # a layer's own, in some families
        reason, note = norm_reason(module, None), None
    else:
        reason, note = f"{type(module).__name__} is not Hugging Face's module or not yet fused", None
    if strange is not None and reason is None:
        return Part(layer, name, "with hooks" in strange, strange)
    return Part(layer, name, reason is None, note if reason is None else reason)


def explain_encoder(encoder: Any, context: str | None = None) -> Iterator[Part]:
    """The parts of one encoder model.

    Args:
        encoder: one of a family's models, fused or not.
        context: why no part of it is fused, if that is so.
    """
    strange = dict(find_strangers(encoder)) if context is None else {}
    yield _explain_part(None, "embeddings", encoder.embeddings, context, strange.get("embeddings"))
    kind = model_class(encoder)
    layers = getattr(encoder, kind.encoder_name).layer
    for i, wrapped in enumerate(layers):
        layer, name = unwrapped(wrapped), f"{kind.encoder_name}.layer.{i}"
        if context is None and (not isinstance(layer, FusedLayer) or name in strange):
            what = strange.get(name, type(layer).__name__)
            reason = what if " " in what else f"{what} is not Hugging Face's {_layer_name(encoder)}"
            yield Part(i, "layer", "with hooks" in what, reason)
            if not isinstance(layer, FusedLayer):
                continue
        last = context is None and i + 1 == len(layers)
        rows = encoder.read_rows if last and encoder.last_layer_computes_all() is None else "all"
        for part in kind.layer_parts:
            strange_part = strange.get(f"{name}.{part}")
            yield replace(_explain_part(i, part, layer.get_submodule(part), context, strange_part), rows=rows)


def _layer_name(encoder: Any) -> str:
    """Hugging Face's name of a family's layer."""
    family = model_class(encoder).__module__
    layer = next(ours for ours in FUSED.values() if ours.__module__ == family and issubclass(ours, FusedLayer))
    return hugging_face_class(layer).__name__

"""Which parts of an encoder are on the fast path, and why the others are not."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from .layer import FusedLayer
from .swap import hugging_face_class

#: Where torch.compile and torch's checkpoint_wrapper keep the layer that they stand in front of.
_LAYER_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")

#: The parts of a layer that `explain` speaks of, by their path in it.
_PARTS = ("attention.self", "attention.output", "intermediate", "output")


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
    """What `explain` found; printable."""

    parts: tuple[Part, ...]

    @property
    def fused(self) -> bool:
        """Whether every part is on fastbert's path."""
        return all(part.fused for part in self.parts)

    def __rich__(self) -> Table | str:
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
            console.print(self)
        return capture.get().rstrip()


def _explain_part(layer: int | None, name: str, module: Any, context: str | None) -> Part:
    if context is not None:
        return Part(layer, name, False, context)
    if not hasattr(module, "unfused_reason"):
        return Part(layer, name, False, f"{type(module).__name__} is not Hugging Face's module or not yet fused")
    reason = module.unfused_reason()
    return Part(layer, name, reason is None, module.note() if reason is None else reason)


def explain_encoder(encoder: Any, context: str | None = None) -> Iterator[Part]:
    """The parts of one encoder model.

    Args:
        encoder: one of a family's models, fused or not.
        context: why no part of it is fused, if that is so.
    """
    yield _explain_part(None, "embeddings", encoder.embeddings, context)
    layers = encoder.encoder.layer if context is not None else encoder.layers
    for i, wrapped in enumerate(layers):
        layer: Any = wrapped
        for wrapper in _LAYER_WRAPPERS:
            layer = getattr(layer, wrapper, layer)
        if context is None and not isinstance(layer, FusedLayer):
            yield Part(i, "layer", False, f"{type(layer).__name__} is not Hugging Face's {_layer_name(encoder)}")
        else:
            last = context is None and i + 1 == len(layers)
            rows = encoder.read_rows if last and encoder.last_layer_computes_all() is None else "all"
            for name in _PARTS:
                yield replace(_explain_part(i, name, layer.get_submodule(name), context), rows=rows)


def _layer_name(encoder: Any) -> str:
    """Hugging Face's name of a family's layer."""
    return hugging_face_class(type(encoder))._can_record_outputs["hidden_states"].__name__  # type: ignore[attr-defined]

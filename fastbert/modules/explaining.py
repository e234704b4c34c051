"""Which parts of an encoder are on the fast path, and why the others are not."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from torch import nn

from fastbert_kernels import describe_products, uses_triton
from fastbert_kernels.backend import uses_cpu_layers

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
        backends: of each fused encoder, what runs where its weights lie now.
        found: of each encoder, what it is and where.
    """

    parts: tuple[Part, ...]
    padding: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    found: tuple[str, ...] = ()

    @property
    def fused(self) -> bool:
        """Whether every part is on fastbert's path."""
        return all(part.fused for part in self.parts)

    def __rich__(self) -> Group:
        about = [f"found: {', '.join(self.found)}"] if len(self.found) > 1 else []
        about += [f"what is fused runs as {each}" for each in dict.fromkeys(self.backends)]
        about += [f"padding is {each}" for each in dict.fromkeys(self.padding)]
        return Group(self._runs(), *about)

    def _runs(self) -> Table | str:
        if self.fused and not any(part.reason for part in self.parts):
            layers = len({part.layer for part in self.parts if part.layer is not None})
            short = "; the last one computes first rows only" if any(p.rows == "first" for p in self.parts) else ""
            return f"every part is fused: embeddings and {layers} layers{short}"
        table = Table("layer", "part", "runs", "because")
        for alike, parts in _folded(self.parts):
            for part in parts:
                if not part.fused or part.reason:
                    table.add_row(alike, part.name, "fused" if part.fused else "unfused", part.reason or "")
        return table

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as capture:
            console.print(self, soft_wrap=True)
        return capture.get().rstrip()


def _folded(parts: Iterable[Part]) -> Iterator[tuple[str, list[Part]]]:
    """The parts of layers that follow each other and run alike, once: the layers as "2" or "0-11", and the parts."""
    alike: list[tuple[int | None, int | None, list[Part]]] = []
    for layer, group in itertools.groupby(parts, key=lambda part: part.layer):
        found = list(group)
        first, last, before = alike[-1] if alike else (None, None, [])
        if last is not None and layer == last + 1 and _without_layer(before) == _without_layer(found):
            alike[-1] = (first, layer, before)
        else:
            alike.append((layer, layer, found))
    for first, last, found in alike:
        yield "-" if first is None else str(first) if first == last else f"{first}-{last}", found


def _without_layer(parts: list[Part]) -> list[Part]:
    return [replace(part, layer=None, rows="all") for part in parts]


def describe_backend(tensor: torch.Tensor) -> str:
    """What ops run as where a tensor lies, for people."""
    where = "this CPU" if tensor.is_cpu else str(tensor.device)
    try:
        if uses_triton(tensor):
            return f"Triton kernels, interpreted, on {where}" if tensor.is_cpu else f"Triton kernels on {where}"
    except (RuntimeError, TypeError) as error:
        return f"nothing: {error}"
    if uses_cpu_layers(tensor):
        return f"plain PyTorch on {where}, products of layers by {describe_products(tensor.dtype)}"
    return f"plain PyTorch on {where}"


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

"""What inside an encoder is not known to be ours, untouched and unwatched.

Packed rows, (1, tokens, hidden) without a mask, go only where they are understood: into a family's own modules, and
into what works row by row, as a Linear does, a wrapped one too. Anything else gets a batch as Hugging Face lays it out.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules import activation

from .readable import all_are_watched, foreign_hooks, is_infrastructure
from .swap import is_known_part, is_patched, ours_of, unsharded

#: Where torch.compile, torch's checkpoint_wrapper and FSDP keep the layer that they stand in front of.
_LAYER_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")

#: torch's modules whose rows are independent of each other.
_ROW_BY_ROW: tuple[type[nn.Module], ...] = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.Embedding, nn.Identity)

#: Libraries whose modules in the place of these are row by row too: adapters, quantization, parametrization.
_LIBRARIES = (
    "peft.", "bitsandbytes.", "torchao.", "torch.ao.", "torch.nn.utils.parametri", "torch.nn.modules.container",
    "torch.distributed.", "transformers.activations", "transformers.integrations.", "optimum.quanto", "deepspeed.",
    "accelerate.",
)  # fmt: skip

#: Methods for a part of a feed-forward block's rows.
_CHUNKS = ("feed_forward_chunk", "ff_chunk")

#: Activations whose output at one place depends on others.
_MIXING = (
    "MultiheadAttention", "Softmax", "Softmax2d", "LogSoftmax", "Softmin", "GLU",
)  # fmt: skip


def wrappers(layer: Any) -> Iterator[Any]:
    """torch's wrappers before a layer, from the outside, and the layer itself."""
    yield layer
    if unsharded(type(layer)).__module__.startswith("torch."):
        for name in _LAYER_WRAPPERS:
            if hasattr(layer, name):
                yield from wrappers(getattr(layer, name))
                return


def unwrapped(layer: Any) -> Any:
    """A layer without torch's wrappers before it."""
    *_, inner = wrappers(layer)
    return inner


def hooked_wrapper(layer: Any) -> str | None:
    """What a wrapper before a layer is that someone has hooked, who then sees what goes into the layer and comes out of
    it."""
    *before, _ = wrappers(layer)
    return next((f"{type(wrapper).__name__} with hooks" for wrapper in before if foreign_hooks(wrapper)), None)


def takes_ours(module: nn.Module) -> bool:
    """Whether a module is of a family's class with the forward of that class, and so knows our arguments."""
    return ours_of(type(module)) is not None and not is_patched(module) and not _is_replaced(module)


def strangers(root: nn.Module, name: str) -> Iterator[tuple[str, str]]:
    """The modules under one, itself included, that are not known, by name, each with what it is; of a stranger, nothing
    inside.

    Args:
        root: between packing and unpacking.
        name: of the root.
    """
    why = why_strange(root)
    if why is not None:
        yield name, why
        return
    for child_name, child in root.named_children():
        yield from strangers(child, f"{name}.{child_name}")


def why_strange(module: nn.Module) -> str | None:
    """What a module is if it is not known, whatever is inside."""
    kind = type(module)
    if all_are_watched():
        return f"{kind.__name__} under a global hook"
    if foreign_hooks(module):
        return f"{kind.__name__} with hooks"
    if _is_replaced(module):
        return f"{kind.__name__} whose forward was replaced"
    if is_patched(module):
        return f"{kind.__name__} whose class has another forward than Hugging Face's"
    for name in _CHUNKS:
        if name in module.__dict__:
            return f"{kind.__name__} whose {name} was replaced"
    if ours_of(kind) is not None or _is_row_by_row(kind):
        return None
    return kind.__name__


def why_mixes(part: nn.Module) -> str | None:
    """Why what a part of a head, or a pooler, makes of an encoder's rows may depend on rows of padding, or be seen by
    someone; None for Hugging Face's own, untouched and unwatched."""
    for module in part.modules():
        kind = type(module)
        if not (is_known_part(kind) or _is_row_by_row(kind)):
            return kind.__name__
        if all_are_watched() or foreign_hooks(module):
            return f"{kind.__name__} with hooks"
        if _is_replaced(module):
            return f"{kind.__name__} whose forward was replaced"
    return None


def _is_replaced(module: nn.Module) -> bool:
    """Whether someone put a `forward` of their own on a module; accelerate's only moves what goes in and out."""
    forward = module.__dict__.get("forward")
    return forward is not None and not is_infrastructure(getattr(forward, "func", forward))


def _is_row_by_row(kind: type[nn.Module]) -> bool:
    kind = unsharded(kind)
    if kind in _ROW_BY_ROW or kind.__module__.startswith(_LIBRARIES):
        return True
    return kind.__module__ == activation.__name__ and kind.__name__ not in _MIXING

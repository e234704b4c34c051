"""What a layer's modules are found to be: looked at once, and again when something there has changed.

A layer runs as one step of autograd where each module in it may be read instead of called. Finding that out anew in
every forward pass costs as much Python as a third of the step itself.
"""

import itertools
import weakref
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as global_hooks

from .attention import FusedSelfAttention
from .qkv import qkv_parameters
from .readable import HOOKS
from .swap import hugging_face_class

#: What is read of a module besides parameters, children and hooks, by something that only its kind has.
_ATTRIBUTES = {
    "chunk_size_feed_forward": ("chunk_size_feed_forward", "feed_forward_chunk", "is_decoder"),
    "is_cross_attention": ("is_cross_attention",),
    "scaling": (
        "num_attention_heads", "attention_head_size", "scaling", "is_decoder", "is_causal", "watcher", "training",
    ),
    "dropout_stream": ("dropout_stream",),
    "eps": ("eps",),
    "p": ("p", "training"),
}  # fmt: skip

_GLOBAL_HOOKS = [hooks for name, hooks in vars(global_hooks).items() if name.startswith("_global_") and name[-1] == "s"]


def block_arguments(*modules: Any) -> dict[str, Any] | None:
    """What the block of these modules needs of them; None where one has to be called itself."""
    arguments: dict[str, Any] = {}
    for module in modules:
        found = module.block_arguments() if hasattr(module, "block_arguments") else None
        if found is None:
            return None
        arguments |= found
    return arguments


class Look:
    """What one layer was when this was made.

    Attributes:
        attention, feed_forward: what its two blocks need of its modules; None where one has to be called.
        whole: it may run as one step of autograd.
    """

    def __init__(self, layer: Any) -> None:
        self.attention: Any = block_arguments(layer.attention)
        self.feed_forward: Any = block_arguments(layer.intermediate, layer.output)
        read = self.attention is not None and self.feed_forward is not None
        self.whole = read and layer.chunk_size_feed_forward == 0 and not chunk_is_replaced(layer)
        self._layer = weakref.ref(layer)
        _, *self._modules = layer.modules()
        states = [layer.__dict__, *[module.__dict__ for module in self._modules]]
        self._hooks = [state[name] for state in states for name in HOOKS]
        self._attributes = [(state, name) for state in states for name in _attributes_of(state)]
        self._children = [state["_modules"] for state in states if state["_modules"]]
        self._parameters = [state["_parameters"] for state in states if state["_parameters"]]
        attention = getattr(layer.attention, "self", None)
        self._neighbours: list[torch.Tensor] = []
        if self.attention is not None and isinstance(attention, FusedSelfAttention):
            groups = qkv_parameters(attention.query, attention.key, attention.value)
            self._neighbours = [parameter for group in groups for parameter in group]
        self._then = self._now(layer)

    def _now(self, layer: Any) -> tuple[Any, ...]:
        """All that was looked at, to be compared."""
        parameters = [*itertools.chain.from_iterable(map(dict.values, self._parameters))]
        return (
            type(layer),
            torch.is_inference_mode_enabled(),  # a view made there could not be kept for a backward pass
            [state.get(name) for state, name in self._attributes],
            [*map(type, self._modules)],
            [*map(id, itertools.chain.from_iterable(map(dict.values, self._children)))],
            [*map(id, parameters)],
            [*map(type, parameters)],
            [(parameter.data_ptr(), parameter.dtype) for parameter in self._neighbours],
        )

    def holds(self, layer: Any) -> bool:
        """Whether the layer still is as it was. With hooks in it, it is looked at anew each time."""
        return (
            self._layer() is layer
            and not any(self._hooks)
            and not any(_GLOBAL_HOOKS)
            and self._now(layer) == self._then
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles of the layer look for themselves."""
        return type(None), ()


def look_at(layer: nn.Module) -> Look:
    """What a layer is now."""
    look = layer.__dict__.get("_look")
    if look is None or not look.holds(layer):
        look = layer.__dict__["_look"] = Look(layer)
    return look


def _attributes_of(state: dict[str, Any]) -> list[str]:
    """What to watch in a module's state: present, or such as may come."""
    return ["forward", *[name for kind, names in _ATTRIBUTES.items() if kind in state for name in names]]


def chunk_is_replaced(layer: Any) -> bool:
    """Whether someone put a function of their own in the place of Hugging Face's `feed_forward_chunk`."""
    theirs = hugging_face_class(type(layer)).feed_forward_chunk  # type: ignore[attr-defined]
    return getattr(layer.feed_forward_chunk, "__func__", None) is not theirs

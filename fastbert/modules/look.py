"""What modules are found to be: looked at once, and again when something there has changed.

A layer runs as one step of autograd where each module in it may be read instead of called, and packed rows go only to
modules that are known. Finding that out anew in every forward pass would cost a third of the step's own Python.
"""

import itertools
import weakref
from typing import Any

import torch
from torch import nn

from .attention import self_attention
from .qkv import qkv_parameters
from .readable import GLOBAL_HOOKS, HOOKS
from .strangers import strangers
from .swap import hugging_face_class, ours_of

#: What is read of a module besides parameters, children and hooks, by something that only its kind has.
_ATTRIBUTES = {
    "chunk_size_feed_forward": ("chunk_size_feed_forward", "feed_forward_chunk", "ff_chunk", "is_decoder"),
    "is_cross_attention": ("is_cross_attention",),
    "attention_head_size": (
        "num_attention_heads", "n_heads", "attention_head_size", "scaling", "is_decoder", "is_causal", "watcher",
        "training",
    ),
    "dropout_stream": ("dropout_stream",),
    "eps": ("eps",),
    "p": ("p", "training"),
    "act": ("act",),
}  # fmt: skip

_values = itertools.chain.from_iterable


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
    """What a module and those inside it were when this was made.

    Attributes:
        strangers: `strangers.strangers` of it.
    """

    #: Parameters whose places in memory count.
    neighbours: tuple[torch.Tensor, ...] = ()

    def __init__(self, root: Any) -> None:
        self.strangers = _found(root)
        self._root = weakref.ref(root)
        _, *self._modules = root.modules()
        states = [root.__dict__, *[module.__dict__ for module in self._modules]]
        self._hooks = [*GLOBAL_HOOKS, *[state[name] for state in states for name in HOOKS]]
        self._attributes = [(state, name) for state in states for name in _attributes_of(state)]
        self._children = [state["_modules"] for state in states if state["_modules"]]
        self._parameters = [state["_parameters"] for state in states if state["_parameters"]]
        kinds = {ours_of(type(module)) for module in (root, *self._modules)} - {None}
        self._patchable: list[Any] = [hugging_face_class(kind) for kind in kinds if kind is not None]
        self._held = [*_values(map(dict.values, self._parameters))]  # or others could come to have their ids
        self._then = self._now(root)

    def _now(self, root: Any) -> tuple[Any, ...]:
        """All that was looked at, to be compared."""
        parameters = [*_values(map(dict.values, self._parameters))]
        return (
            type(root),
            torch.is_inference_mode_enabled(),  # a view made there could not be kept for a backward pass
            [state.get(name) for state, name in self._attributes],
            [*map(type, self._modules)],
            [*map(id, _values(map(dict.values, self._children)))],
            [*map(id, parameters)],
            [*map(type, parameters)],
            [*_values(map(dict.values, self._hooks))] if any(self._hooks) else [],
            [(parameter.data_ptr(), parameter.dtype) for parameter in self.neighbours],
            [kind.forward for kind in self._patchable],
        )

    def holds(self, root: Any) -> bool:
        """Whether the module still is as it was."""
        return self._root() is root and self._now(root) == self._then

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles of the module look for themselves."""
        return type(None), ()


class LayerLook(Look):
    """What a layer was.

    Attributes:
        attention, feed_forward: what its two blocks need of its modules; None where one has to be called.
        whole: it may run as one step of autograd.
    """

    def __init__(self, layer: Any) -> None:
        self.attention: Any = layer.attention_arguments()
        self.feed_forward: Any = layer.feed_forward_arguments()
        read = self.attention is not None and self.feed_forward is not None
        self.whole = read and not layer.calls_chunks()
        found = self_attention(layer)
        if self.attention is not None and found is not None:
            groups = qkv_parameters(*found[1].linears())
            self.neighbours = tuple(parameter for group in groups for parameter in group)
        super().__init__(layer)


def look_at(layer: nn.Module) -> LayerLook:
    """What a layer of ours is now."""
    return _look(layer, LayerLook)


def strangers_in(module: nn.Module) -> list[tuple[str, str]]:
    """`strangers.strangers` of a layer or another module, now."""
    if ours_of(type(module)) is None or torch.compiler.is_compiling():  # nothing is kept on what is not ours
        return _found(module)
    return _look(module, LayerLook if hasattr(module, "feed_forward_arguments") else Look).strangers


def _found(module: nn.Module) -> list[tuple[str, str]]:
    """The strangers under a module, and its attention if that is not fused, which is no better."""
    found = list(strangers(module, ""))
    attention = self_attention(module)
    reason = None if attention is None else attention[1].unfused_reason()
    return found if attention is None or reason is None else [*found, (f".{attention[0]}", f"unfused: {reason}")]


def forget(module: nn.Module) -> None:
    """Let go of what a module was, and of the memory that it holds."""
    module.__dict__.pop("_look", None)


def _look(module: nn.Module, kind: type[Any]) -> Any:
    look: Any = module.__dict__.get("_look")
    if type(look) is not kind or not look.holds(module):
        module.__dict__["_look"] = look = None  # or it would hold the memory of parameters that have to move
        look = module.__dict__["_look"] = kind(module)
    return look


def _attributes_of(state: dict[str, Any]) -> list[str]:
    """What to watch in a module's state: present, or such as may come."""
    return ["forward", *[name for kind, names in _ATTRIBUTES.items() if kind in state for name in names]]


def chunk_is_replaced(layer: Any) -> bool:
    """Whether someone put a function of their own in the place of Hugging Face's `feed_forward_chunk`."""
    theirs = getattr(hugging_face_class(type(layer)), "feed_forward_chunk", None)  # some families have none
    return getattr(getattr(layer, "feed_forward_chunk", None), "__func__", None) is not theirs

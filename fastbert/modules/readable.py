"""Which modules may be read instead of called.

A fused kernel reads a module's parameters and skips its `forward`. That is only right for exactly PyTorch's own module
with ordinary parameters that nobody watches: a LoRA, quantized, sharded, parametrized or hooked module must be called.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import nn
from torch._subclasses import FakeTensor
from transformers.utils.output_capturing import _active_collector

from fastbert.notices import warn_once

from .swap import hugging_face_class

#: Where hooks come from that belong to the machinery around a model, not to someone who looks inside it.
_INFRASTRUCTURE = ("torch.distributed", "transformers.", "peft.", "deepspeed.", "accelerate.")

#: PEFT's for a batch whose rows have adapters of their own: it counts them.
_COUNTS_ROWS = "_adapter_names_pre_forward_hook"

#: The hook by which transformers and PEFT make the embeddings' output require a gradient, for reentrant checkpointing
#: of a model whose embeddings are frozen. The fused embeddings do what it does.
_REQUIRE_GRADS = "make_inputs_require_grads"

#: The hooks that need no module to be called: that one, and Hugging Face's own, idle unless it records outputs.
_IDLE = (_REQUIRE_GRADS, "output_capturing_hook")

#: What is read of a module. A replica of nn.DataParallel, or FSDP's flat parameters, leave it elsewhere.
_PARAMETERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight", "bias"),
    nn.LayerNorm: ("weight", "bias"),
    nn.Embedding: ("weight",),
    nn.Dropout: (),
}

_MISSING: Any = object()

#: Where modules keep their hooks, and where torch keeps those of all modules.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS: list[dict[int, Any]] = [getattr(torch.nn.modules.module, f"_global{hooks}") for hooks in HOOKS]

#: torch's own hooks of all modules that only note which one runs, as FlopCounterMode does.
_NOTING = "torch.utils.module_tracker"


def all_are_watched() -> bool:
    """Whether someone has hooked every module there is."""
    return any(GLOBAL_HOOKS) and any(
        getattr(hook, "__module__", "") != _NOTING for hooks in GLOBAL_HOOKS for hook in hooks.values()
    )


def is_called(module: nn.Module) -> bool:
    """Whether someone relies on the module being called: a hook, or a replaced `forward`."""
    state = module.__dict__  # a module's attributes are looked up slowly
    if "forward" in state or all_are_watched():
        return True
    for hooks in HOOKS:
        if state[hooks]:
            break
    else:
        return False
    every = [hook for hooks in HOOKS for hook in state[hooks].values()]
    return any(getattr(hook, "__name__", "") not in _IDLE and not _has_no_work(hook, module) for hook in every)


def _has_no_work(hook: Any, module: nn.Module) -> bool:
    """Whether a hook is there to gather the parameters of a module that has none: ZeRO-3 hooks every module."""
    return getattr(hook, "__module__", "").startswith("deepspeed.") and not any(True for _ in module.parameters())


def wants_grad_output(module: nn.Module) -> bool:
    """Whether a hook is there to make the module's output require a gradient."""
    return any(getattr(hook, "__name__", "") == _REQUIRE_GRADS for hook in module._forward_hooks.values())


def is_capturing() -> bool:
    """Whether Hugging Face's own path records the attentions that modules return."""
    # Code that is traced cannot read a context variable.
    recorded = _active_collector.global_var if torch.compiler.is_compiling() else _active_collector.get()
    return recorded is not None and "attentions" in recorded


#: Why a module whose Hugging Face class has another forward than its own runs that.
PATCHED = "the forward of Hugging Face's class was replaced"

_gathered = False


@contextlib.contextmanager
def as_if_gathered() -> Iterator[None]:
    """Look at a model at rest as at one that runs: what FSDP shards, it gathers before it calls the module around."""
    global _gathered
    before, _gathered = _gathered, True
    try:
        yield
    finally:
        _gathered = before


def is_sharded_within(module: nn.Module) -> bool:
    """Whether FSDP shards the module's parameters as part of it or of a module around it."""
    return getattr(module, "_is_fsdp_managed_module", False)


def is_ordinary(parameter: torch.Tensor) -> bool:
    """Whether a parameter is one of PyTorch's own, or what torch.export puts in the place of one while it traces."""
    if type(parameter) is nn.Parameter:
        return parameter.layout is torch.strided
    return torch.compiler.is_compiling() and type(parameter) is FakeTensor and isinstance(parameter, nn.Parameter)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is exactly a `kind` whose ordinary parameters may be read without calling it."""
    if type(module) is not kind or is_called(module):
        return False
    own = module._parameters
    for name in _PARAMETERS[kind]:
        p = own.get(name, _MISSING)
        if p is None or (type(p) is nn.Parameter and p.layout is torch.strided):  # as `is_ordinary` finds, later
            continue
        if p is _MISSING or not (is_ordinary(p) or (_gathered and is_sharded_within(module))):
            return False
    return True


def describe(module: nn.Module, expected: type[nn.Module]) -> str:
    """What `module` is, in a message that it is not a plain `expected`."""
    actual = type(module)
    own = getattr(module, "_parameters", {})  # a function may stand in a module's place
    others = [type(p).__name__ for p in own.values() if p is not None and not is_ordinary(p)]
    if actual is expected and others:  # such as a quantized one
        return f"{actual.__name__} whose weight is {others[0]}"
    if actual is expected:
        return f"{actual.__name__} that is hooked, sharded or changed"
    return f"{actual.__module__}.{actual.__name__}" if actual.__name__ == expected.__name__ else actual.__name__


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    return is_plain(module, nn.Linear)


def is_plain_embedding(module: nn.Module) -> TypeGuard[nn.Embedding]:
    """A plain `nn.Embedding` without the options that change its forward or its gradient's form."""
    return (
        is_plain(module, nn.Embedding)
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
    )


def is_plain_layer_norm(module: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """A plain `nn.LayerNorm` of rows, with weight and bias."""
    if not is_plain(module, nn.LayerNorm):
        return False
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    return weight is not None and bias is not None and weight.dim() == 1


def is_plain_dropout(module: nn.Module) -> TypeGuard[nn.Dropout]:
    return is_plain(module, nn.Dropout)


def is_infrastructure(hook: Any) -> bool:
    """Whether a hook belongs to the machinery around a model, not to someone who looks inside it."""
    hook = getattr(hook, "func", hook)
    return getattr(hook, "__module__", "").startswith(_INFRASTRUCTURE) and hook.__name__ != _COUNTS_ROWS


def foreign_hooks(module: nn.Module) -> bool:
    """Whether someone who looks inside the model has hooked a module."""
    return any(not is_infrastructure(hook) for name in HOOKS for hook in getattr(module, name).values())


def leave(module: nn.Module, reason: str) -> None:
    """Say once that a module runs as Hugging Face's."""
    name = hugging_face_class(type(module)).__name__
    warn_once(f"fastbert: {name} runs unfused: {reason}; fastbert.explain(model) says in which layers")


def fused_repr(module: Any) -> str:
    """What `print` says of a fused module: that it is, or why not."""
    reason, note = module.unfused_reason(), module.note()
    if reason is not None:
        return f"unfused: {reason}"
    return "fused" if note is None else f"fused; {note}"


def called(**modules: nn.Module) -> str | None:
    """A note on linear layers that are called as modules while the rest around them stays fused."""
    names = [f"{name} ({describe(m, nn.Linear)})" for name, m in modules.items() if not is_plain_linear(m)]
    return f"{', '.join(names)} called as a module" if names else None


def not_plain(name: str, module: nn.Module, expected: type[nn.Module]) -> str:
    """The reason that a module cannot be read."""
    return f"{name} is not a plain nn.{expected.__name__} but {describe(module, expected)}"


def norm_reason(norm: nn.Module, dropout: nn.Module | None) -> str | None:
    """Why a LayerNorm and the dropout beside it, if any, cannot be one kernel's."""
    if not is_plain_layer_norm(norm):
        return not_plain("LayerNorm", norm, nn.LayerNorm)
    return None if dropout is None or is_plain_dropout(dropout) else not_plain("dropout", dropout, nn.Dropout)

"""Kernel launches of a forward and a backward pass, counted without a GPU.

Each ATen call that would launch a kernel counts as one (views and allocations do not), and each Triton launch as one.
The Triton path runs in the interpreter, `python -m bench.launches` sets it up.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastbert_kernels

_ALLOCATIONS = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "_unsafe_view",
}


def _is_view(op: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)


class _AtenCalls(TorchDispatchMode):
    def __init__(self, launches: Counter[str]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if not name.startswith("fastbert::") and name not in _FREE | _CPU_DROPOUT and not _is_view(func):
            self.launches[name] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the launches of a block, by name of the operation or kernel."""
    launches: Counter[str] = Counter()

    def counting(kernel: Any) -> Any:
        class Launcher:
            def __getitem__(self, grid: Any) -> Callable[..., Any]:
                launches[kernel.__name__] += 1
                return kernel[grid]

        return Launcher()

    with contextlib.ExitStack() as stack:
        for module in ("attention", "bias_gelu", "column_sums", "embedding", "layer_norm"):
            path = f"{fastbert_kernels.__name__}.{module}.wrap_triton"
            stack.enter_context(mock.patch(path, counting))
        stack.enter_context(_AtenCalls(launches))
        yield launches


def launches_per_layer(build: Callable[[int], torch.nn.Module], **inputs: Any) -> tuple[Counter[str], Counter[str]]:
    """Launches that one more layer costs, forward and backward.

    Args:
        build: makes a model with the given number of layers.
        inputs: what the model is called with.

    Returns:
        Two counters by name: of the forward pass, and of the backward pass of the last hidden state, gradients unset
        before.
    """
    counts = []
    for layers in (2, 3):
        model = build(layers).train()
        with counted() as forward:
            last = model(**inputs).last_hidden_state
        cotangent = torch.randn_like(last)
        with counted() as backward:
            last.backward(cotangent)
        counts.append((forward, backward))
    (forward2, backward2), (forward3, backward3) = counts
    return forward3 - forward2, backward3 - backward2

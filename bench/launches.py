"""Kernel launches of a forward and a backward pass, counted without a GPU.

Each ATen call that would launch a kernel counts as one (views and allocations do not), and each Triton launch as one.
`TRITON_INTERPRET=1 python -m bench.launches` shows the counts of one layer beside Hugging Face's.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

import fastbert
from fastbert_kernels import backend

#: Calls that launch nothing although their schema does not say so.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "_unsafe_view"}

#: A CPU's dropout is three calls, a GPU's one (native_dropout): the draw and the division are not counted.
_CPU_DROPOUT = {"bernoulli_", "div_"}


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
        for name, module in list(sys.modules.items()):
            if name.startswith("fastbert_kernels.") and hasattr(module, "wrap_triton"):
                stack.enter_context(mock.patch.object(module, "wrap_triton", counting))
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


def count(attention: str = "fastbert", maps: bool = False) -> tuple[Counter[str], Counter[str]]:
    """Launches of one training layer, dropout on, ragged batch: "fastbert", or Hugging Face's "eager" or "sdpa"; with
    `maps`, attentions are asked for."""

    def build(layers: int) -> torch.nn.Module:
        config = transformers.BertConfig(
            hidden_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=128,
            vocab_size=50,
            attn_implementation="eager" if attention == "fastbert" else attention,
        )
        return (fastbert if attention == "fastbert" else transformers).BertModel(config)

    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 4:] = 0
    inputs = {"input_ids": torch.randint(1, 50, (3, 7)), "attention_mask": mask, "output_attentions": maps}
    if attention != "fastbert":
        return launches_per_layer(build, **inputs)
    with backend("triton"):
        return launches_per_layer(build, **inputs)


def main() -> None:
    """Print the counts."""
    console = Console()
    table = Table("model", "forward", "backward", "what", title="launches of one layer, training with dropout")
    for name, maps in (("fastbert", False), ("fastbert", True), ("eager", False), ("sdpa", False)):
        forward, backward = count(name, maps)
        what = "; ".join(", ".join(f"{k} {v}" for k, v in c.most_common()) for c in (forward, backward))
        table.add_row(f"{name}, attentions" if maps else name, str(forward.total()), str(backward.total()), what)
    console.print(table)


if __name__ == "__main__":
    main()

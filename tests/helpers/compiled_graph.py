"""Trace training steps through torch.compile as they would be on a GPU, and print what the graphs launch, as JSON.

Run as a script without the interpreter. There is no GPU to run on: the choice of backend, of tiles and of compile
target is made as on one, and tracing stops where a kernel would start.
"""

import collections
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import transformers
import triton
from functorch.compile import min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from triton.backends.compiler import GPUTarget

import fastbert
import fastbert.families.bert
from fastbert_kernels import attention, relation_loss


class TracedError(Exception):
    """All graphs are traced."""


def main() -> None:
    """Print a line of JSON: by the name of a step, of its forward and its backward graph, what is launched."""
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=50,
        attn_implementation="eager",
    )
    model = fastbert.BertModel(config).train().bfloat16()
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 4:] = 0
    offsets = torch.tensor([0, 4, 11, 14], dtype=torch.int32)
    packed = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 7, "max_length_k": 7}
    operand = torch.randn(14, 4, 8, requires_grad=True)
    with _as_on_a_gpu():
        traced = {
            "padded": graphs(model, torch.randint(1, 50, (3, 7)), mask, output_attentions=True),
            "packed by the caller": graphs(model, torch.randint(1, 50, (1, 14)), output_attentions=True, **packed),
            "relations": graphs(relation_loss, operand, operand, operand, operand, offsets, 7),
        }
        launched: dict[str, Any] = {name: [_launches(graph) for graph in found] for name, found in traced.items()}
        launched["graphs of lengths"] = graphs_of_lengths((20, 25, 30, 41, 50, 60, 70, 80, 120, 300))
    print(json.dumps(launched))


def graphs_of_lengths(lengths: Sequence[int]) -> int:
    """How many graphs attention is compiled to for batches of packed sequences whose sizes are symbols."""
    torch._dynamo.reset()
    count = 0

    def compiled(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal count
        count += 1
        count_of_outputs = len(graph.graph.output_node().args[0])
        return lambda *args: [torch.empty(1)] * count_of_outputs

    def step(qkv: torch.Tensor, ends: torch.Tensor, length: int) -> torch.Tensor:
        return attention(qkv, ends, length)[0]

    of_lengths = torch.compile(step, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=compiled))
    with torch.no_grad():
        for number, length in enumerate(lengths):
            ends = torch.arange(5 + number, dtype=torch.int32) * length
            of_lengths(torch.randn(int(ends[-1]), 3, 4, 16), ends, length)
    return count


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    target = mock.Mock()
    target.get_current_target.return_value = GPUTarget("cuda", 90, 32)
    active = property(lambda self: target)
    patches: list[Any] = [
        mock.patch("fastbert_kernels.tiles.arch", lambda device: "sm_90"),  # noqa: PT008 - dynamo traces a lambda
        mock.patch.object(type(triton.runtime.driver), "active", active),
        mock.patch("fastbert_kernels.tiles._FEED_FORWARD_TOKENS", 1),  # no batch is too small, but a graph never fuses
        mock.patch("torch._functorch.config.force_non_lazy_backward_lowering", True),
    ]
    for module in list(sys.modules.values()):
        if module.__name__.startswith("fastbert") and hasattr(module, "uses_triton"):
            patches.append(mock.patch.object(module, "uses_triton", lambda tensor: True))  # noqa: PT008
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def graphs(step: Callable[..., Any], *args: Any, **kwargs: Any) -> list[torch.fx.GraphModule]:
    """The forward and the backward graph of a step, as the default compiler parts them."""
    found: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(graph)
        if len(found) == 2:
            raise TracedError
        return graph

    backend = aot_autograd(fw_compiler=record, bw_compiler=record, partition_fn=min_cut_rematerialization_partition)
    try:
        torch.compile(step, fullgraph=True, backend=backend)(*args, **kwargs)
    except Exception as error:
        if TracedError.__name__ not in repr(error) and len(found) < 2:
            raise
    return found


def _launches(graph: torch.fx.GraphModule) -> dict[str, tuple[int, list[str]]]:
    """By kernel, or by opaque fastbert op, how often it is launched, and the arguments that torch takes for written:
    they are cloned where they are read elsewhere."""
    count: collections.Counter[str] = collections.Counter()
    written: dict[str, set[str]] = collections.defaultdict(set)
    for node in graph.graph.nodes:
        name = _launched(node)
        if name is not None:
            count[name] += 1
            written[name] |= set(node.kwargs.get("tensors_to_clone", ()))
    return {name: (count[name], sorted(written[name])) for name in count}


def _launched(node: torch.fx.Node) -> str | None:
    """The name of the kernel, or of the opaque fastbert op, that a node launches."""
    if "kernel_idx" in node.kwargs:
        kernel: Any = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
        return str(getattr(kernel, "fn", kernel).__name__).lstrip("_")
    return str(node.target) if str(node.target).startswith("fastbert") else None


if __name__ == "__main__":
    main()

"""Trace a training step through torch.compile as it would be on a GPU, and print what the graphs launch, as JSON.

Run as a script without the interpreter. There is no GPU to run on: the choice of backend, of tiles and of compile
target is made as on one, and tracing stops where a kernel would start.
"""

import collections
import json
import sys
from typing import Any
from unittest import mock

import torch
import transformers
import triton
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from triton.backends.compiler import GPUTarget

import fastbert
import fastbert.families.bert


class TracedError(Exception):
    """All graphs are traced."""


def main() -> None:
    """Print how often which kernel is launched, or opaque fastbert op called, in the forward and the backward graph."""
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        if len(graphs) == 2:
            raise TracedError
        return graph

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
    target = mock.Mock()
    target.get_current_target.return_value = GPUTarget("cuda", 90, 32)
    active = property(lambda self: target)
    patches: list[Any] = [
        mock.patch("fastbert_kernels.tiles.arch", lambda device: "sm_90"),  # noqa: PT008 - dynamo traces a lambda
        mock.patch.object(type(triton.runtime.driver), "active", active),
        mock.patch("fastbert_kernels.tiles._FEED_FORWARD_TOKENS", 1),  # no batch is too small, but a graph never fuses
    ]
    for module in list(sys.modules.values()):
        if module.__name__.startswith("fastbert") and hasattr(module, "uses_triton"):
            patches.append(mock.patch.object(module, "uses_triton", lambda tensor: True))  # noqa: PT008
    for patch in patches:
        patch.start()
    # Traced eagerly, as a graph whose backward pass is compiled ahead of it.
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    try:
        with mock.patch("torch._functorch.config.force_non_lazy_backward_lowering", True):
            compiled(torch.randint(1, 50, (3, 7)), mask, output_attentions=True)
    except Exception as error:
        if TracedError.__name__ not in repr(error) and len(graphs) < 2:
            raise
    print(json.dumps([collections.Counter(filter(None, map(_launched, graph.graph.nodes))) for graph in graphs]))


def _launched(node: torch.fx.Node) -> str | None:
    """The name of the kernel, or of the opaque fastbert op, that a node launches."""
    if "kernel_idx" in node.kwargs:
        kernel: Any = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
        return str(getattr(kernel, "fn", kernel).__name__).lstrip("_")
    return str(node.target) if str(node.target).startswith("fastbert") else None


if __name__ == "__main__":
    main()

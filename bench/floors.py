"""The floor of a model's run: the time of the work that nobody can leave out, each part at its own measured limit.

Floor = matrix products as the fastest library that torch has does them at the exact shapes, plus the bytes of
embeddings, norms and optimizer over the measured copy, plus attention at the slower of its products and its bytes.
Padding, launches, Python, bias, activation and dropout are not in it: they can be fused away. It is reached by nobody,
and is the same for all.
"""

import functools
from collections.abc import Iterator

import torch
import transformers

from bench.static.limits import Cost, cost
from fastbert.benchmark.timing import graphed, interleaved
from fastbert.benchmark.workloads import Workload
from fastbert.families import MODEL_TYPES, head_of, intermediate_size
from fastbert_kernels import describe_products
from fastbert_kernels.catalogue import dtype_name
from fastbert_kernels.onednn import product

#: Bytes of the buffer that is copied to measure the copy.
COPY_BYTES = 512 * 1024 * 1024
#: Of the product that measures the rate of products.
SIDES = {"cuda": 8192, "cpu": 2048}
#: Bytes that AdamW in float32 moves for a parameter: it reads weight, gradient and two moments and writes three.
ADAMW_BYTES = 28


class Machine:
    """The measured limits of a device. Each is measured once, when it is first asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._products: dict[tuple[int, int, int, torch.dtype], float] = {}

    @functools.cached_property
    def copy(self) -> float:
        """Bytes read and written, a second, by a copy far larger than any cache."""
        source = torch.empty(COPY_BYTES, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        seconds = interleaved({"copy": lambda: target.copy_(source)}, self.device, seconds=0.3, rounds=(5, 50))
        return 2 * COPY_BYTES / seconds["copy"].median

    def product(self, m: int, n: int, k: int, dtype: torch.dtype) -> float:
        """Seconds of a product of (m, k) and (k, n) by the fastest library that torch has for it."""
        key = (m, n, k, dtype)
        if key not in self._products:
            self._products[key] = self._measure_product(*key)
        return self._products[key]

    def _measure_product(self, m: int, n: int, k: int, dtype: torch.dtype) -> float:
        a = torch.randn(m, k, device=self.device, dtype=dtype)
        b = torch.randn(n, k, device=self.device, dtype=dtype).T  # as a Linear has it
        out = torch.empty(m, n, device=self.device, dtype=dtype)

        def run() -> None:
            torch.mm(a, b, out=out)

        run()
        runs = {"torch.mm": graphed(run) if self.device.type == "cuda" else run}
        if self.device.type == "cpu" and describe_products(dtype) == "oneDNN":
            runs["oneDNN"] = lambda: product(a, b.T)
        times = interleaved(runs, self.device, seconds=0.2 * len(runs), rounds=(3, 50), flush=True)
        return min(found.median for found in times.values())

    def rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of a large square product: the ceiling of everything made of products."""
        side = SIDES[self.device.type]
        return 2 * side**3 / self.product(side, side, side, dtype)

    def seconds(self, work: Cost, dtype: torch.dtype) -> float:
        """The least time of a call whose products and copies overlap."""
        return max(work.flops / self.rate(dtype), work.bytes / self.copy)

    def facts(self, *dtypes: torch.dtype) -> dict[str, float]:
        """The ceilings by name, per second: bytes copied, and FLOPs in each dtype."""
        flops = {f"flops_{dtype_name(dtype)}": self.rate(dtype) for dtype in dtypes}
        return {"copy_bytes": self.copy} | flops


def floor(workload: Workload, config: transformers.PreTrainedConfig, dtype: torch.dtype, machine: Machine) -> float:
    """Seconds that the workload cannot be done under on the machine.

    Args:
        workload: the batch and the task; only its tokens count, not its padding.
        config: of the model.
        dtype: of the products.
        machine: whose measured limits to take.
    """
    training = workload.task != "forward"
    layer = sum(machine.product(*shape, dtype) for shape in _products(workload.tokens, config, training))
    layer += sum(machine.seconds(call, dtype) for call in _layer_calls(workload, config, dtype, training))
    total = config.num_hidden_layers * layer
    total += sum(machine.seconds(call, dtype) for call in _embedding_calls(workload, config, dtype, training))
    if workload.task == "finetune":
        with torch.device("meta"):
            kind = head_of(MODEL_TYPES[config.model_type], "ForSequenceClassification")
            parameters = sum(p.numel() for p in kind(config).parameters())
        total += parameters * ADAMW_BYTES / machine.copy
    return total


def _products(tokens: int, config: transformers.PreTrainedConfig, training: bool) -> Iterator[tuple[int, int, int]]:
    """(m, n, k) of a layer's products."""
    hidden, wide = config.hidden_size, intermediate_size(config)
    for features, out in ((hidden, 3 * hidden), (hidden, hidden), (hidden, wide), (wide, hidden)):
        yield tokens, out, features
        if training:
            yield tokens, features, out  # gradient of the input
            yield out, features, tokens  # gradient of the weight


def _layer_calls(
    workload: Workload, config: transformers.PreTrainedConfig, dtype: torch.dtype, training: bool
) -> Iterator[Cost]:
    name = dtype_name(dtype)
    lengths, heads = workload.lengths, config.num_attention_heads
    width = config.hidden_size // heads
    maps = {"PROBS"} if workload.attentions else set()
    yield cost("attention_forward", lengths=lengths, width=width, heads=heads, dtype=name, flags=maps)
    norm = {"lengths": lengths, "width": config.hidden_size, "dtype": name}
    kept = {"NORMED"} if training else set()
    yield from 2 * [cost("add_layer_norm_forward", **norm, flags={"RESIDUAL"} | kept)]
    if training:
        maps = {"DPROBS"} if workload.attentions else set()
        yield cost("attention_backward", lengths=lengths, width=width, heads=heads, dtype=name, flags=maps)
        yield from 2 * [cost("add_layer_norm_backward", **norm)]


def _embedding_calls(
    workload: Workload, config: transformers.PreTrainedConfig, dtype: torch.dtype, training: bool
) -> Iterator[Cost]:
    for direction in ("forward", "backward") if training else ("forward",):
        yield cost(
            f"embed_{direction}",
            lengths=workload.lengths,
            width=config.hidden_size,
            dtype=dtype_name(dtype),
            flags={"WORD_TABLE"} | ({"NORMED"} if training and direction == "forward" else set()),
        )

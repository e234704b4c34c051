"""Python's time for each layer, without a GPU: what decides small batches.

A launched kernel costs nothing here and the tensors are so small that ATen's work is its calls' own cost; what one more
layer adds is the host's time. `python -m bench.python_time` shows ours beside Hugging Face's sdpa, interleaved.

Left out: CUDA's own launch, for every kernel on both sides. Dropout is off, because of it a CPU makes several calls
where a GPU makes one.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

import fastbert

from .stand_in import as_on_a_gpu

#: The two depths whose difference is taken.
LAYERS = (2, 10)


def build(library: Any, layers: int) -> torch.nn.Module:
    """A model of 1 head of 16, from `fastbert` or `transformers`."""
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=1,
        intermediate_size=16,
        vocab_size=8,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager" if library is fastbert else "sdpa",
    )
    return library.BertModel(config)


def steps(library: Any, layers: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    ids, cotangent = torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, 16)
    served, trained = build(library, layers).eval(), build(library, layers).train()

    def inference() -> None:
        with torch.inference_mode():
            served(ids)

    def forward() -> Any:
        return trained(ids).last_hidden_state

    def training() -> None:  # gradients add up, in one more call a parameter on both sides
        forward().backward(cotangent)

    return {"inference": inference, "training, forward": forward, "training, forward and backward": training}


def seconds_per_layer(rounds: int) -> dict[tuple[str, str], float]:
    """Median seconds one more layer takes, by (step, "fastbert" or "sdpa")."""
    contenders = {}
    for (name, library), layers in itertools.product({"fastbert": fastbert, "sdpa": transformers}.items(), LAYERS):
        for step, run in steps(library, layers).items():
            contenders[step, name, layers] = run
    times: dict[tuple[str, str, int], list[float]] = {key: [] for key in contenders}
    with as_on_a_gpu():
        for _ in range(rounds):
            for key, run in contenders.items():
                run()  # not timed: another model has been in the caches
                start = time.process_time()  # not what other processes take
                run()
                times[key].append(time.process_time() - start)
    few, many = LAYERS
    median = {key: statistics.median(values) for key, values in times.items()}
    return {
        (step, name): (median[step, name, many] - median[step, name, few]) / (many - few)
        for step, name, layers in contenders
        if layers == few
    }


def main(rounds: Annotated[int, typer.Option(min=3, help="Measurements of each.")] = 150) -> None:
    """Time Python's part of one layer, ours beside Hugging Face's sdpa."""
    torch.set_num_threads(1)
    found = seconds_per_layer(rounds)
    table = Table("step", "fastbert", "HF sdpa", "ratio", title="host time of one layer, microseconds")
    for step in dict.fromkeys(step for step, _ in found):
        ours, theirs = found[step, "fastbert"] * 1e6, found[step, "sdpa"] * 1e6
        table.add_row(step, f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)

"""Python's time for each layer, without a GPU: what decides small batches.

A launched kernel costs nothing here and the tensors are so small that ATen's work is its calls' own cost; what one more
layer adds is the host's time. `python -m bench.python_time` shows ours beside Hugging Face's sdpa, interleaved, and
beside ours by Triton's own lookup of each kernel. What `graphed` replays is not looked up: nothing is saved there.

Left out: CUDA's own launch, for every kernel on both sides. Dropout is off, because of it a CPU makes several calls
where a GPU makes one.
"""

import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any
from unittest import mock

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

import fastbert
from fastbert.tuning.problems import COMPILED

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


class _TritonsLaunch:
    """A kernel launched by Triton itself each time."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return functools.partial(self.kernel.run, grid=grid, warmup=False, enable_fp_fusion=True)


#: Contender -> the library, and what each kernel's id stands for in place of our launches.
CONTENDERS: dict[str, tuple[Any, dict[int, _TritonsLaunch]]] = {
    "fastbert": (fastbert, {}),
    "Triton's launch": (fastbert, {id(kernel): _TritonsLaunch(kernel) for kernel in COMPILED.values()}),
    "sdpa": (transformers, {}),
}


def times_per_layer(rounds: int) -> dict[tuple[str, str], tuple[float, float]]:
    """Seconds, and launches, that one more layer takes, by (step, contender). Of times the lower decile is taken."""
    runs = {}
    for (name, (library, _)), layers in itertools.product(CONTENDERS.items(), LAYERS):
        for step, run in steps(library, layers).items():
            runs[step, name, layers] = run
    times: dict[tuple[str, str, int], list[float]] = {key: [] for key in runs}
    launches = dict.fromkeys(runs, 0)
    with as_on_a_gpu() as launched:
        ours = {name: dict(theirs) for name, (_, theirs) in CONTENDERS.items()}
        for _ in range(rounds):
            for key, run in runs.items():
                with mock.patch("fastbert_kernels.launch._launchers", ours[key[1]]):
                    run()  # not timed: another model has been in the caches
                    before = launched.total()
                    start = time.process_time()  # not what other processes take
                    run()
                    times[key].append(time.process_time() - start)
                    launches[key] = launched.total() - before
    few, many = LAYERS
    low = {key: statistics.quantiles(values, n=10, method="inclusive")[0] for key, values in times.items()}
    return {
        (step, name): (
            (low[step, name, many] - low[step, name, few]) / (many - few),
            (launches[step, name, many] - launches[step, name, few]) / (many - few),
        )
        for step, name, layers in runs
        if layers == few
    }


def main(rounds: Annotated[int, typer.Option(min=3, help="Measurements of each.")] = 150) -> None:
    """Time Python's part of one layer, ours beside Hugging Face's sdpa, and beside ours by Triton's own launch."""
    torch.set_num_threads(1)
    found = times_per_layer(rounds)
    table = Table(
        title="host time of one layer, microseconds", caption="graphed replays launches: nothing is saved there"
    )
    for name in ("step", "fastbert", "HF sdpa", "ratio", "launches", "by Triton's launch", "saved a launch"):
        table.add_column(name, justify="left" if name == "step" else "right", no_wrap=name == "step")
    for step in dict.fromkeys(step for step, _ in found):
        (ours, launches), (tritons, _), (theirs, _) = (found[step, name] for name in CONTENDERS)
        us = (f"{1e6 * x:.0f}" for x in (ours, theirs))
        saved = f"{1e6 * (tritons - ours) / launches:.1f}" if launches else "-"
        table.add_row(step, *us, f"{ours / theirs:.2f}", f"{launches:.0f}", f"{1e6 * tritons:.0f}", saved)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    typer.run(main)

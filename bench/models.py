"""Runs of models, on any device: what `bench.cpu` and `bench.gpu` share."""

import dataclasses
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.floors import Machine, floor
from fastbert.benchmark.measure import Field, random_source
from fastbert.benchmark.results import Results
from fastbert.benchmark.workloads import Workload

#: The shapes of known models. Weights are random: they change no time.
CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "minilm": transformers.BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
    "base": transformers.BertConfig(),
    "large": transformers.BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "roberta": transformers.RobertaConfig(max_position_embeddings=514, type_vocab_size=1),
    "xlm-roberta": transformers.XLMRobertaConfig(vocab_size=250_002, max_position_embeddings=514, type_vocab_size=1),
    "distilbert": transformers.DistilBertConfig(),
}

#: A model of `CONFIGS`, what is done with it, and in which dtype.
Item = tuple[str, Workload, torch.dtype]


def run(
    plan: Iterable[Item],
    contenders: Sequence[str],
    device: torch.device,
    results: Results,
    path: Path,
    *,
    seconds: float,
    rounds: tuple[int, int],
    deadline: float = float("inf"),
) -> None:
    """Measure a plan, saving after each item: an interruption loses the item it falls in and no other.

    Args:
        plan: what to measure; neighbours with the same model, dtype and kind of task share what was compiled.
        contenders: keys of `fastbert.benchmark.contenders.CONTENDERS`.
        device: where to run.
        results: is filled.
        path: where it is saved.
        seconds, rounds: as `interleaved` takes them, for each item.
        deadline: on `time.perf_counter`'s clock; what comes after it is recorded as out of time.
    """
    plan = list(plan)
    machine = Machine(device)
    results.facts["ceilings"] = machine.facts(*dict.fromkeys(dtype for _, _, dtype in plan))
    field, made_for = None, None
    with _progress() as progress:
        bar = progress.add_task("", total=len(plan))
        for model, workload, dtype in plan:
            if made_for != (model, dtype, workload.task == "finetune"):
                made_for = (model, dtype, workload.task == "finetune")
                field = None  # before its successor takes memory
                source = random_source(CONFIGS[model], workload.task)
                field = Field(model, source, contenders, dtype=dtype, device=device)
            assert field is not None
            least = None
            if time.perf_counter() < deadline:
                progress.update(bar, description=f"{workload.name}: the floor")
                least = floor(workload, CONFIGS[model], dtype, machine)
            for row in field.measure(
                workload,
                seconds=seconds,
                rounds=rounds,
                deadline=deadline,
                tell=lambda message: progress.update(bar, description=message),
            ):
                results.rows.append(dataclasses.replace(row, floor=least))
            results.save(path)
            progress.advance(bar)
    results.finished = True
    results.save(path)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)

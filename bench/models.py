"""Runs of models, on any device: what `bench.cpu` and `bench.gpu` share."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.floors import Machine, floor
from fastbert.benchmark.measure import Field, Row, random_source
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


class Contest:
    """Contenders on one item after another; neighbours with the same model, dtype and kind of task share what was
    built."""

    def __init__(self, contenders: Sequence[str], machine: Machine) -> None:
        """
        Args:
            contenders: keys of `fastbert.benchmark.contenders.CONTENDERS`.
            machine: where to run; its measured limits make the floors.
        """
        self.contenders, self.machine = contenders, machine
        self._field: Field | None = None
        self._made_for: tuple[str, torch.dtype, bool] | None = None

    def measure(
        self,
        item: Item,
        *,
        seconds: float,
        rounds: tuple[int, int],
        deadline: float = float("inf"),
        tell: Callable[[str], object] = lambda message: None,
    ) -> list[Row]:
        """A row for each contender, with its floor.

        Args:
            item: what to measure.
            seconds, rounds: as `interleaved` takes them.
            deadline: on `time.perf_counter`'s clock; what comes after it is recorded as out of time.
            tell: called with what is going on, for people.
        """
        model, workload, dtype = item
        made_for = (model, dtype, workload.task == "finetune")
        if self._made_for != made_for:
            self._field, self._made_for = None, made_for  # before its successor takes memory
            source = random_source(CONFIGS[model], workload.task)
            self._field = Field(model, source, self.contenders, dtype=dtype, device=self.machine.device)
        assert self._field is not None
        least = None
        if time.perf_counter() < deadline:
            tell(f"{workload.name}: the floor")
            least = floor(workload, CONFIGS[model], dtype, self.machine)
        rows = self._field.measure(workload, seconds=seconds, rounds=rounds, deadline=deadline, tell=tell)
        return [dataclasses.replace(row, floor=least) for row in rows]


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
        plan: what to measure.
        contenders: as of `Contest`.
        device: where to run.
        results: is filled.
        path: where it is saved.
        seconds, rounds, deadline: as of `Contest.measure`, for each item.
    """
    plan = list(plan)
    contest = Contest(contenders, Machine(device))
    results.facts["ceilings"] = contest.machine.facts(*dict.fromkeys(dtype for _, _, dtype in plan))
    with _progress() as progress:
        bar = progress.add_task("", total=len(plan))
        for item in plan:
            results.rows += contest.measure(
                item,
                seconds=seconds,
                rounds=rounds,
                deadline=deadline,
                tell=lambda message: progress.update(bar, description=message),
            )
            results.save(path)
            progress.advance(bar)
    results.finished = True
    results.save(path)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)

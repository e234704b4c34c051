"""Contenders on a workload: what they return is compared first, then they are timed together."""

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fastbert.families import MODEL_TYPES, head_of
from fastbert.graphs.recording import Replayed
from fastbert.graphs.training import GraphedStep, graphed_step

from . import contenders
from .timing import Run, Times, interleaved, peak_memory
from .workloads import Task, Workload

#: What an output may differ from float32 eager by, beyond twice what eager itself differs by in the same dtype.
SLACK = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Row:
    """One contender on one workload.

    Attributes:
        workload: the workload's name.
        model: what people call the model.
        task, attentions: what was done.
        dtype: "float32", "float16" or "bfloat16"; for the task "finetune" in half precision, that of autocast.
        batch, seq, tokens, fill: the batch's shape, its tokens, and tokens over positions.
        contender: a key of `contenders.CONTENDERS`.
        times: how long it took; None when it was not timed.
        peak_bytes: allocated at the peak of one run beyond weights, gradients and optimizer state; None on a CPU, and
            of replays, whose memory was allocated when they were recorded.
        floor: the least time that the work can take, in seconds, where it is known.
        error: largest difference of an output from float32 eager's at a token, or, when training, of a gradient
            relative to the largest gradient (in the 2-norm), whichever is larger.
        bound: what the error may be.
        problem: why it was not timed.
    """

    workload: str
    model: str
    task: Task
    attentions: bool
    dtype: str
    batch: int
    seq: int
    tokens: int
    fill: float
    contender: str
    times: Times | None = None
    peak_bytes: int | None = None
    floor: float | None = None
    error: float | None = None
    bound: float | None = None
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)


@dataclass
class _Job:
    """A contender set up for a workload."""

    model: contenders.Model
    module: nn.Module
    workload: Workload
    batch: dict[str, Tensor]
    autocast: torch.dtype | None
    optimizer: torch.optim.Optimizer | None = None

    def module_pools(self) -> bool:
        return getattr(self.module, "pooler", None) is not None

    def call(self) -> Any:
        extra = {"output_attentions": True} if self.workload.attentions else {}
        if self.autocast is None:
            return self.model(**self.batch, **extra)
        with torch.autocast(self.batch["input_ids"].device.type, self.autocast):
            return self.model(**self.batch, **extra)

    def loss(self) -> tuple[Tensor, Any]:
        output = self.call()
        mask = self.batch["attention_mask"]
        if self.workload.task == "finetune":
            loss = output.loss
        else:
            loss = (output.last_hidden_state * mask[:, :, None]).square().mean()
        if self.workload.attentions:
            for probs in output.attentions:
                loss = loss + (probs * mask[:, None, :, None]).square().mean()
        return loss, output

    def run(self) -> None:
        """What is timed."""
        if self.workload.task == "forward":
            with torch.inference_mode():
                self.call()
            return
        loss, _ = self.loss()
        loss.backward()
        if self.optimizer is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
        self.module.zero_grad(set_to_none=True)

    def warm_up(self) -> None:
        """Compile and allocate what a run needs."""
        if self.workload.task != "forward":
            self.module.train()
        self.run()
        if self.replayed is None:
            self.run()
        else:
            _replay(self.replayed, self.run)

    def peak(self, device: torch.device) -> int | None:
        """The `peak_bytes` of a row."""
        return peak_memory(self.run, device) if self.replayed is None else None

    @property
    def replayed(self) -> Replayed | None:
        """What a run replays, if it is a replay."""
        return self.model if isinstance(self.model, Replayed) else None

    def results(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Outputs at tokens and, when training, gradients, both with dropout off: float32."""
        mask = self.batch["attention_mask"].bool()
        gradients = {}
        if self.workload.task == "forward":
            with torch.inference_mode():
                if self.replayed is not None:
                    self.call()  # records it, if it has to be: what is compared is a replay
                output = self.call()
        else:
            loss, output = self.loss()
            loss.backward()
            gradients = {n: p.grad.float() for n, p in self.module.named_parameters() if p.grad is not None}
            self.module.zero_grad(set_to_none=True)
        if isinstance(output, tuple):  # ONNX Runtime: last hidden state, pooler output if there is one, attentions
            main, maps = output[0], output[2 if self.module_pools() else 1 :]
        else:
            main = output.logits if "logits" in output else output.last_hidden_state
            maps = output.attentions if self.workload.attentions else ()
        outputs = [main[mask] if main.dim() == 3 else main]
        outputs += [probs.transpose(1, 2)[mask] for probs in maps]
        return [o.detach().float() for o in outputs], gradients


@dataclass
class _GraphedJob(_Job):
    """A fine-tuning step in CUDA graphs."""

    step: GraphedStep | None = None

    def _record(self, max_grad_norm: float | None) -> GraphedStep:
        assert self.optimizer is not None
        return graphed_step(
            self.module, self.optimizer, contenders.BUCKETS, contenders.MAX_SEQUENCES, max_grad_norm=max_grad_norm
        )

    def _call(self, step: GraphedStep) -> None:
        with torch.autocast(self.batch["input_ids"].device.type, self.autocast, enabled=self.autocast is not None):
            step(**self.batch)

    def run(self) -> None:
        assert self.step is not None
        self._call(self.step)

    def warm_up(self) -> None:
        self.step = self._record(1.0)
        super().warm_up()

    @property
    def replayed(self) -> Replayed | None:
        return self.step

    def results(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Outputs of the model itself; gradients of a replay, as the optimizer's first moment got them."""
        outputs, _ = super().results()
        optimizer: Any = self.optimizer
        dropouts = [module for module in self.module.modules() if isinstance(module, nn.Dropout)]
        rates = [dropout.p for dropout in dropouts]
        try:
            for dropout in dropouts:
                dropout.p = 0.0
            self.module.train()
            step = self._record(None)
            self._call(step)
            for state in optimizer.state.values():
                state["exp_avg"].zero_()
            _replay(step, lambda: self._call(step))
        finally:
            self.module.eval()
            for dropout, p in zip(dropouts, rates, strict=True):
                dropout.p = p
        share = 1 - optimizer.defaults["betas"][0]
        moments = {name: optimizer.state[p]["exp_avg"] for name, p in self.module.named_parameters()}
        return outputs, {name: moment / share for name, moment in moments.items()}


def _replay(replayed: Replayed, run: Run) -> None:
    """Run; RuntimeError if that was no replay."""
    before = replayed.replays
    run()
    if replayed.replays == before:
        raise RuntimeError(f"not replayed: {', '.join(replayed.plain)}")


Built = tuple[contenders.Model, nn.Module]


class Field:
    """The contenders of one model in one dtype. What one workload built, the next with the same needs uses again."""

    def __init__(
        self,
        model: str,
        source: Any,
        names: Sequence[str],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """
        Args:
            model: what people call it.
            source: a Hugging Face `BertModel` or `BertForSequenceClassification` with eager attention, float32.
            names: keys of `contenders.CONTENDERS`.
            dtype: the working dtype.
            device: where to run.
        """
        self.model, self.source, self.names, self.dtype, self.device = model, source, list(names), dtype, device
        self._built: dict[tuple[str, bool, torch.dtype], Built] = {}

    def measure(
        self,
        workload: Workload,
        batch: dict[str, Tensor] | None = None,
        *,
        seconds: float = 10.0,
        rounds: tuple[int, int] = (5, 100),
        deadline: float = float("inf"),
        tell: Callable[[str], object] = lambda message: None,
    ) -> Iterator[Row]:
        """Compare, then time, all contenders on a workload.

        Args:
            workload: what to do.
            batch: what the model is called with; None for random ids. "finetune" adds labels.
            seconds, rounds: as `timing.interleaved` takes them.
            deadline: on `time.perf_counter`'s clock; contenders not set up by then are left out, and their rows say so.
            tell: called with what is going on, for people.

        Returns:
            A row for each contender, in their order.
        """
        batch = self._inputs(workload, batch)
        truth = self._truth(workload, batch)
        rows: dict[str, Row] = {}
        jobs: dict[str, _Job] = {}
        bound: float | None = None
        for name in sorted(self.names, key=lambda name: name != "eager"):  # whose error the others are bound by
            blank = self._blank(workload, name)
            why = self.missing(name, workload)
            if why is None and time.perf_counter() > deadline:
                why = "out of time"
            if why is not None:
                rows[name] = dataclasses.replace(blank, problem=why)
                continue
            tell(f"{workload.name}: {contenders.CONTENDERS[name]}")
            try:
                job = self._job(name, workload, batch)
                error = _error(job.results(), truth)
                if bound is None:
                    own = error if name == "eager" else self._eager_error(workload, batch, truth)
                    bound = 2 * own + SLACK[self.dtype]
                if not error <= bound:
                    rows[name] = dataclasses.replace(blank, error=error, bound=bound, problem=_wrong(error, bound))
                    continue
                job.warm_up()
                peak = job.peak(self.device)
            except Exception as failure:  # a peer that cannot do it is a row, not the end of the run
                rows[name] = dataclasses.replace(blank, problem=f"failed: {type(failure).__name__}: {failure}"[:300])
                continue
            jobs[name] = job
            rows[name] = dataclasses.replace(blank, error=error, bound=bound, peak_bytes=peak)
        tell(f"{workload.name}: timing")
        times = interleaved({name: job.run for name, job in jobs.items()}, self.device, seconds=seconds, rounds=rounds)
        for name, job in jobs.items():
            job.module.eval()
            rows[name] = dataclasses.replace(rows[name], times=times[name])
        del jobs
        gc.collect()
        yield from (rows[name] for name in self.names)

    def missing(self, name: str, workload: Workload) -> str | None:
        """Why a contender cannot take part, for people; None when it can."""
        return contenders.missing(
            name,
            task=workload.task,
            attentions=workload.attentions,
            dtype=self.dtype,
            device=self.device,
        )

    def ready(self, name: str, workload: Workload) -> Run:
        """One contender on one workload as `measure` would time it, for a timer of the caller's.

        Args:
            name: a key of `contenders.CONTENDERS` that is not `missing`.
            workload: what to do, on random ids.

        Raises:
            ValueError: when its results are wrong.
        """
        batch = self._inputs(workload)
        truth = self._truth(workload, batch)
        bound = 2 * self._eager_error(workload, batch, truth) + SLACK[self.dtype]
        job = self._job(name, workload, batch)
        error = _error(job.results(), truth)
        if not error <= bound:
            raise ValueError(f"{contenders.CONTENDERS[name]} on {workload.name!r} is {_wrong(error, bound)}")
        job.warm_up()
        return job.run

    def _inputs(self, workload: Workload, batch: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        batch = workload.batch(self.source.config.vocab_size, self.device) if batch is None else dict(batch)
        if workload.task == "finetune":
            batch["labels"] = torch.arange(len(workload.lengths), device=self.device) % 2
        return batch

    def _blank(self, workload: Workload, name: str) -> Row:
        return Row(
            workload=workload.name,
            model=self.model,
            task=workload.task,
            attentions=workload.attentions,
            dtype=str(self.dtype).removeprefix("torch."),
            batch=len(workload.lengths),
            seq=workload.seq,
            tokens=workload.tokens,
            fill=workload.fill,
            contender=name,
        )

    def _job(self, name: str, workload: Workload, batch: dict[str, Tensor], dtype: torch.dtype | None = None) -> _Job:
        dtype = self.dtype if dtype is None else dtype
        step = workload.task == "finetune"
        weights = torch.float32 if step else dtype
        key = (name, workload.attentions, weights)
        if key not in self._built:
            self._built[key] = contenders.build(
                name, self.source, attentions=workload.attentions, dtype=weights, device=self.device
            )
        model, module = self._built[key]
        module.eval()
        replays = step and name == "fastbert-graphed"
        # A step that goes nowhere is the same work, and the next workload finds the weights as they were built.
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, fused=True, capturable=replays) if step else None
        autocast = dtype if step and dtype != torch.float32 else None
        if replays:
            return _GraphedJob(module, module, workload, batch, autocast, optimizer)
        return _Job(model, module, workload, batch, autocast, optimizer)

    def _truth(self, workload: Workload, batch: dict[str, Tensor]) -> Any:
        return self._job("eager", workload, batch, torch.float32).results()

    def _eager_error(self, workload: Workload, batch: dict[str, Tensor], truth: Any) -> float:
        return _error(self._job("eager", workload, batch).results(), truth)


def _wrong(error: float, bound: float) -> str:
    return f"wrong: its error {error:.1e} is over {bound:.1e}"


def _error(got: tuple[list[Tensor], dict[str, Tensor]], want: tuple[list[Tensor], dict[str, Tensor]]) -> float:
    """Largest output difference, or gradient difference relative to the largest gradient, in the 2-norm."""
    absent = sorted(want[1].keys() - got[1].keys())
    if len(got[0]) != len(want[0]) or absent:
        raise RuntimeError(f"{len(got[0])} of {len(want[0])} outputs came out, gradients that miss: {absent}")
    errors = [(g - w).abs().max() for g, w in zip(got[0], want[0], strict=True)]
    if want[1]:
        largest = torch.stack([w.norm() for w in want[1].values()]).max()
        errors += [(got[1][name] - w).norm() / largest for name, w in want[1].items()]
    return torch.stack(errors).max().item()  # NaN if one is


def random_source(config: transformers.PreTrainedConfig, task: Task) -> transformers.PreTrainedModel:
    """A model of Hugging Face's with fixed random weights, eager: with a classifier for "finetune", else the encoder
    alone."""
    kind = MODEL_TYPES[config.model_type]
    if task == "finetune":
        kind = head_of(kind, "ForSequenceClassification")
    config = type(config)(**(config.to_dict() | {"attn_implementation": "eager"}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval()

"""Models on a CPU against Hugging Face, interleaved in one run: `python -m bench.cpu` (or `make bench`).

Every round runs each contender once, in an order that rotates; what counts is the median over the rounds. Outputs are
compared before anything is timed. The figures are ratios of this run and say nothing about a GPU.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fastbert

LENGTHS = {
    "ragged": [8, 12, 16, 20, 24, 30, 36, 42, 50, 58, 66, 76, 88, 100, 114, 128],
    "full": [128] * 16,
}


def make_batch(lengths: list[int], vocab_size: int) -> dict[str, torch.Tensor]:
    """Random ids of the given lengths, padded: input_ids and attention_mask, int64 (batch, longest)."""
    mask = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]
    ids = torch.randint(1, vocab_size, mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask.long()}


def make_models(config: transformers.BertConfig) -> dict[str, torch.nn.Module]:
    """The contenders, with the same weights: Hugging Face's two attentions, and fastbert."""
    models: dict[str, torch.nn.Module] = {}
    for name in ("HF eager", "HF sdpa"):
        models[name] = transformers.AutoModel.from_config(config, attn_implementation=name.split()[1])
    models["fastbert"] = fastbert.fuse(transformers.AutoModel.from_config(config))
    weights = models["HF eager"].state_dict()
    for model in models.values():
        model.load_state_dict(weights)
    return models


def forward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return model(**batch).last_hidden_state


def train(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    model.zero_grad(set_to_none=True)
    last = model(**batch).last_hidden_state
    (last * batch["attention_mask"][:, :, None]).square().mean().backward()
    return last.detach()


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in track(range(rounds), description="rounds", transient=True):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    return times


def check(models: dict[str, torch.nn.Module], batch: dict[str, torch.Tensor], tolerance: float) -> None:
    """Raise unless every contender agrees with the first at the tokens."""
    outputs = {name: forward(model, batch) for name, model in models.items()}
    tokens = batch["attention_mask"].bool()
    first = next(iter(outputs.values()))[tokens].double()
    for name, output in outputs.items():
        error = (output[tokens].double() - first).abs().max().item()
        if not error <= tolerance:
            raise RuntimeError(f"{name} differs by {error:.1e}, over {tolerance:.0e}: no time is shown for it")


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of each workload.")] = 9,
    layers: Annotated[int, typer.Option(help="Encoder layers; the shape of each is BERT-base's.")] = 12,
    training: Annotated[bool, typer.Option(help="Also time forward and backward.")] = True,
) -> None:
    """Time BERT-base in float32 on ragged and full batches."""
    console = Console()
    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    models = make_models(config)
    table = Table("workload", "fill", *models, "vs HF eager", "vs HF sdpa", title="median seconds, interleaved")
    for workload, lengths in LENGTHS.items():
        batch = make_batch(lengths, config.vocab_size)
        fill = sum(lengths) / (len(lengths) * max(lengths))
        for kind, step in {"forward": forward, **({"training": train} if training else {})}.items():
            for model in models.values():
                model.train(kind == "training")
            check(models, batch, 1e-4)
            times = interleaved({name: partial(step, m, batch) for name, m in models.items()}, rounds)
            medians = {name: statistics.median(seconds) for name, seconds in times.items()}
            ours = medians["fastbert"]
            ratios = [f"{medians[peer] / ours:.2f}x (0.9/fill: {0.9 / fill:.2f})" for peer in ("HF eager", "HF sdpa")]
            table.add_row(f"{workload} {kind}", f"{fill:.2f}", *(f"{s:.3f}" for s in medians.values()), *ratios)
    console.print(table)
    console.print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    typer.run(main)

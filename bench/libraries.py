"""A usual call of each library around BERT, with its BERT fused and not, in one run: `python -m bench.libraries`.

A real checkpoint and the ragged texts of `bench.embed`. What each call gives is compared with Hugging Face's eager
attention before anything is timed. A library that is not installed is named and left out. The figures are ratios of
this run on this machine.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

from bench.embed import CHECKPOINT, sentence_transformer, sentences
from fastbert import fuse
from fastbert.benchmark.provenance import facts
from fastbert.benchmark.results import save_json
from fastbert.benchmark.timing import Times, interleaved
from fastbert.inputs import parse_device

BATCH = 16
#: How far results may be from eager's, relative to their largest: rounding, of gradients too.
TOLERANCE = 1e-3
OURS, EAGER, SDPA = "fastbert", "eager", "sdpa"

#: A call of a library, made once for a contender that can do it; it returns what is compared.
Make = Callable[[str, Path, torch.device], Callable[[], torch.Tensor] | None]


def classifier(contender: str, folder: Path, device: torch.device) -> Any:
    """A classifier without dropout, so that steps can be compared, its encoder fused or not."""
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder,
        attn_implementation=EAGER if contender == EAGER else SDPA,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        local_files_only=True,
    ).to(device)
    torch.nn.init.normal_(model.classifier.weight)
    return fuse(model) if contender == OURS else model


def batch(folder: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """Texts with labels, padded to the longest of them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    inputs = tokenizer(sentences(BATCH), padding=True, truncation=True, max_length=256, return_tensors="pt")
    return {**inputs.to(device), "labels": (torch.arange(BATCH) % 2).to(device)}


def _step(model: Any, inputs: dict[str, torch.Tensor], optimizer: Any, backward: Callable[[Any], Any]) -> torch.Tensor:
    loss = model(**inputs).loss
    backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def trainer(contender: str, folder: Path, device: torch.device) -> Callable[[], torch.Tensor]:
    """A step of transformers' Trainer."""
    model, inputs = classifier(contender, folder, device).train(), batch(folder, device)
    arguments = transformers.TrainingArguments(
        report_to=[], use_cpu=device.type == "cpu", disable_tqdm=True, output_dir="bench-output/trainer"
    )
    made = transformers.Trainer(model, arguments)
    made.create_optimizer()
    made.current_gradient_accumulation_steps = 1

    def step() -> torch.Tensor:
        loss = made.training_step(model, inputs)
        made.optimizer.step()
        made.optimizer.zero_grad()
        return loss.detach()

    return step


def peft(contender: str, folder: Path, device: torch.device) -> Callable[[], torch.Tensor]:
    """A step with LoRA on queries and values."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        classifier(contender, folder, device), LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
    ).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    inputs = batch(folder, device)
    return lambda: _step(model, inputs, optimizer, torch.Tensor.backward)


def accelerate(contender: str, folder: Path, device: torch.device) -> Callable[[], torch.Tensor]:
    """A step by accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device.type == "cpu")
    model = classifier(contender, folder, device).train()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-4))
    inputs = batch(folder, device)
    return lambda: _step(model, inputs, optimizer, accelerator.backward)


def sentence_transformers(contender: str, folder: Path, device: torch.device) -> Callable[[], torch.Tensor]:
    """Embeddings of 256 texts."""
    attention = EAGER if contender == EAGER else SDPA
    model = sentence_transformer(folder, device, attention, fused=contender == OURS)
    texts = sentences(256)
    return lambda: model.encode(texts, convert_to_tensor=True, show_progress_bar=False)


def bertviz(contender: str, folder: Path, device: torch.device) -> Callable[[], torch.Tensor] | None:
    """The attentions that bertviz draws; it has no model of its own, and sdpa none to draw."""
    if contender == SDPA:
        return None
    model, inputs = classifier(contender, folder, device).eval(), batch(folder, device)

    @torch.inference_mode()
    def maps() -> torch.Tensor:
        return torch.stack(model(**inputs, output_attentions=True).attentions)

    return maps


def captum(contender: str, folder: Path, device: torch.device) -> Callable[[], torch.Tensor]:
    """Integrated gradients of the embeddings, 16 steps."""
    from captum.attr import LayerIntegratedGradients

    model, inputs = classifier(contender, folder, device).eval(), batch(folder, device)
    words, mask = (inputs[name][:4] for name in ("input_ids", "attention_mask"))
    gradients = LayerIntegratedGradients(
        lambda ids, mask: model(ids, attention_mask=mask).logits[:, 1], model.bert.embeddings
    )
    return lambda: gradients.attribute(words, words * 0, additional_forward_args=(mask,), n_steps=16).detach()


def compiled(contender: str, folder: Path, device: torch.device) -> Callable[[], torch.Tensor]:
    """A forward pass under torch.compile."""
    model, inputs = torch.compile(classifier(contender, folder, device).eval()), batch(folder, device)

    @torch.inference_mode()
    def logits() -> torch.Tensor:
        return model(**inputs).logits

    return logits


#: Name of the distribution -> what is called, and how it is made.
LIBRARIES: dict[str, tuple[str, Make]] = {
    "transformers": ("a step of Trainer", trainer),
    "peft": ("a step with LoRA", peft),
    "accelerate": ("a step", accelerate),
    "sentence-transformers": ("encode, 256 texts", sentence_transformers),
    "bertviz": ("the maps that it draws", bertviz),
    "captum": ("integrated gradients, 16 steps", captum),
    "torch": ("torch.compile, a forward pass", compiled),
}


def measure(
    make: Make, folder: Path, device: torch.device, seconds: float
) -> tuple[dict[str, float], dict[str, Times]]:
    """How far each contender's result is from eager's, and the times of those that are near."""
    made = {name: make(name, folder, device) for name in (EAGER, SDPA, OURS)}
    runs = {name: run for name, run in made.items() if run is not None}
    # Twice: the second result has a step of training behind it.
    found = {name: [run().float().cpu() for _ in range(2)] for name, run in runs.items()}
    apart = {
        name: max(
            ((ours - theirs).abs().max() / theirs.abs().max()).item()
            for ours, theirs in zip(results, found[EAGER], strict=True)
        )
        for name, results in found.items()
    }
    right = {name: run for name, run in runs.items() if apart[name] <= TOLERANCE}
    return apart, interleaved(right, device, seconds=seconds, rounds=(5, 50))


def main(
    library: Annotated[list[str] | None, typer.Option(help="One of them; may be repeated. Default: all.")] = None,
    model: Annotated[Path, typer.Option(help="A folder of a BERT with its tokenizer.")] = CHECKPOINT,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: the GPU if there is one.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="For each library, once five rounds are done.")] = 10.0,
    json_file: Annotated[Path, typer.Option("--json", help="Where results go.")] = Path("bench-output/libraries.json"),
) -> None:
    """Time a usual call of each library. Exit code 1: a result differs."""
    on, console, ok = parse_device(device), Console(), True
    chosen = library or list(LIBRARIES)
    if unknown := [name for name in chosen if name not in LIBRARIES]:
        raise typer.BadParameter(f"unknown library {', '.join(unknown)}: there are {', '.join(LIBRARIES)}")
    table = Table("library", "call", "apart", "fastbert ms", "over eager", "over sdpa", box=None, pad_edge=False)
    rows: list[dict[str, Any]] = []
    about = facts(on)
    for name in chosen:
        call, make = LIBRARIES[name]
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            table.add_row(name, call, "not installed", "-", "-", "-")
            continue
        apart, times = measure(make, model, on, seconds)
        ok &= OURS in times
        rows.append(
            {"library": name, "version": version, "call": call, "apart": apart}
            | {"times": {contender: asdict(taken) for contender, taken in times.items()}}
        )
        own = times.get(OURS)
        ratios = [f"{times[peer].median / own.median:.2f}x" if own and peer in times else "-" for peer in (EAGER, SDPA)]
        spent = "wrong: not timed" if own is None else f"{own.median * 1e3:.1f}"
        table.add_row(f"{name} {version}", call, f"{apart[OURS]:.1e}", spent, *ratios)
        save_json(json_file, {"facts": about, "rows": rows})  # what is done is kept
    console.print(table)
    console.print(f"{about['device']}; {json_file}")
    raise typer.Exit(0 if ok else 1)


if __name__ == "__main__":
    typer.run(main)

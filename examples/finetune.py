"""Fine-tune a BERT checkpoint with fastbert and Hugging Face's Trainer, on a CPU or a GPU.

The task: which of six subjects is a docstring of Python's standard library about? `data/docstrings.jsonl` holds 960
texts to train on and 240 to test on. What makes it fastbert is where `BertForSequenceClassification` comes from.

    python examples/finetune.py --compare eager
"""

import importlib.util
import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

DATA = Path(__file__).parent / "data" / "docstrings.jsonl"
DEMO_CHECKPOINT = Path(__file__).parents[1] / ".cache" / "minilm"
MAX_LENGTH = 128


class Precision(StrEnum):
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class Attention(StrEnum):
    EAGER = "eager"
    SDPA = "sdpa"


def load_task(tokenizer: Any) -> tuple[list[str], list[dict[str, Any]], list[dict[str, Any]]]:
    """The labels, the training set and the test set: `input_ids`, `attention_mask` and `labels` of each text."""
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    labels = sorted({row["label"] for row in rows})
    sets: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for row in rows:
        encoded = tokenizer(row["text"], truncation=True, max_length=MAX_LENGTH, return_token_type_ids=False)
        sets[row["split"]].append({**encoded, "labels": labels.index(row["label"])})
    return labels, sets["train"], sets["test"]


def accuracy(prediction: Any) -> dict[str, float]:
    """The share of texts whose highest logit is their label's."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def progress_bar(name: str) -> Any:
    """A callback that shows the last loss behind a bar, where Trainer would print a line a step."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers import TrainerCallback

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("loss {task.fields[loss]}"))

    class Bar(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.progress = Progress(TextColumn(f"{name:<8}"), *columns)
            self.task = self.progress.add_task("", total=state.max_steps, loss="-")
            self.progress.start()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                self.progress.update(self.task, completed=state.global_step, loss=f"{logs['loss']:.3f}")

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.progress.stop()

    return Bar()


def plot_losses(curves: dict[str, list[float]], path: Path) -> None:
    """Draw the loss of each step as a PNG, one line a model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axis = figure.subplots()
    for (name, losses), style in zip(curves.items(), ("-", "--", ":"), strict=False):
        axis.plot(range(1, len(losses) + 1), losses, style, linewidth=1.3, label=name)
    axis.set(xlabel="step", ylabel="training loss", title="The subject of a docstring")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path)


def fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def make_folder(output: Path) -> None:
    """The folder of --output, with those above it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--output {str(output)!r} cannot be a folder ({error.strerror}): choose another place")


def read_checkpoint(model: str) -> tuple[Any, Any]:
    """The configuration and the tokenizer of a BERT checkpoint."""
    from transformers import AutoConfig, AutoTokenizer

    if model == str(DEMO_CHECKPOINT) and not DEMO_CHECKPOINT.is_dir():
        fail(f"no checkpoint in {model!r}: run `make demo`, which fetches one, or name a folder with a BERT checkpoint")
    try:
        config, tokenizer = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        fail(f"no BERT checkpoint in {model!r}: name a folder saved by transformers ({str(error).splitlines()[0]})")
    if config.model_type != "bert":
        fail(f"model {model!r} is of type {config.model_type!r}, not 'bert': this example takes BERT only")
    if config.max_position_embeddings < MAX_LENGTH:
        fail(f"model {model!r} takes {config.max_position_embeddings} tokens, and the texts have up to {MAX_LENGTH}")
    return config, tokenizer


def main(
    model: Annotated[
        str, typer.Argument(help="Folder of a BERT checkpoint. Default: what `make demo` fetched.", show_default=False)
    ] = str(DEMO_CHECKPOINT),
    output: Annotated[Path, typer.Option(help="Folder for the trained model and the plot.")] = Path("finetune-output"),
    compare: Annotated[
        list[Attention] | None, typer.Option(help="Train Hugging Face's model too, same seed. May be repeated.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 100,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="A base or large model wants 5e-5 or less.")] = 2e-4,
    dropout: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Default: the checkpoint's.", show_default=False)
    ] = None,
    precision: Annotated[Precision, typer.Option(help="fp16 needs a GPU.")] = Precision.FP32,
    seed: int = 0,
) -> None:
    """Fine-tune a BERT checkpoint with fastbert, test it and draw its loss."""
    missing = [name for name in ("accelerate", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        fail(f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}")
    make_folder(output)

    import torch
    import transformers
    from rich.console import Console
    from rich.table import Table

    import fastbert

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if precision is Precision.FP16 and not torch.cuda.is_available():
        fail("--precision fp16 needs a GPU, and torch sees none here: use bf16 or fp32")
    config, tokenizer = read_checkpoint(model)
    labels, train_set, test_set = load_task(tokenizer)
    config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    if dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    arguments = transformers.TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=2 * batch_size,
        learning_rate=learning_rate,
        optim="adamw_torch_fused",
        bf16=precision is Precision.BF16,
        fp16=precision is Precision.FP16,
        seed=seed,
        logging_steps=1,
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )

    console = Console(highlight=False)
    table = Table("model", "mean of the last 10 losses", "test accuracy", "seconds")
    curves: dict[str, list[float]] = {}
    for name in ("fastbert", *(f"HF {attention}" for attention in dict.fromkeys(compare or ()))):
        transformers.set_seed(seed)
        if name == "fastbert":
            network = fastbert.BertForSequenceClassification.from_pretrained(model, config=config)
            console.print(str(fastbert.explain(network)), markup=False)
        else:
            network = transformers.BertForSequenceClassification.from_pretrained(
                model, config=config, attn_implementation=name.removeprefix("HF ")
            )
        trainer = transformers.Trainer(
            network,
            arguments,
            train_dataset=train_set,
            eval_dataset=test_set,
            processing_class=tokenizer,
            compute_metrics=accuracy,
            callbacks=[progress_bar(name)],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        seconds = trainer.train().metrics["train_runtime"]
        curves[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        last = curves[name][-10:]
        score = trainer.evaluate()["eval_accuracy"]
        table.add_row(name, f"{sum(last) / len(last):.4f}", f"{score:.1%}", f"{seconds:.1f}")
        if name == "fastbert":
            trainer.save_model(str(output / "model"))

    console.print(table)
    for name, losses in list(curves.items())[1:]:
        apart = max(abs(a - b) for a, b in zip(losses, curves["fastbert"], strict=True))
        console.print(f"fastbert and {name}: at no step are the losses further apart than {apart:.1e}")
    drops = max(config.hidden_dropout_prob, config.attention_probs_dropout_prob) > 0
    if drops and len(curves) > 1:
        console.print("(the two draw dropout differently, as two seeds do; with --dropout 0 they agree to rounding)")
    plot_losses(curves, output / "loss.png")
    console.print(f"model: {output / 'model'} (loads in plain transformers too)\nplot:  {output / 'loss.png'}")


if __name__ == "__main__":
    typer.run(main)

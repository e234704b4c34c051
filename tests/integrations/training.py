"""Trainer on the example's task, as the tests use it."""

import functools
from pathlib import Path
from typing import Any

import finetune
import torch
import transformers

import fastbert

#: How far losses may be from Hugging Face's after a few steps without dropout.
CLOSE = 1e-4
#: How far two runs of the same steps may be from each other: a GPU may sum in another order each time.
SAME = 1e-5 if torch.cuda.is_available() else 0.0


@functools.cache
def task(checkpoint: Path) -> tuple[Any, int, list[dict[str, Any]], list[dict[str, Any]]]:
    """A checkpoint's tokenizer, how many labels there are, the training set and the test set."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    labels, train_set, test_set = finetune.load_task(tokenizer)
    return tokenizer, len(labels), train_set, test_set


def network(kind: str, checkpoint: Path, dropout: float | None = 0.0, seed: int = 0) -> Any:
    """A classifier on a checkpoint. kind: `own` and `fused` are fastbert's two ways in, `eager` and `sdpa` plain."""
    transformers.set_seed(seed)
    changes: dict[str, Any] = {"num_labels": task(checkpoint)[1]}
    if dropout is not None:
        changes |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if kind == "own":
        return fastbert.BertForSequenceClassification.from_pretrained(checkpoint, **changes)
    attention = "sdpa" if kind == "fused" else kind
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        checkpoint, attn_implementation=attention, **changes
    )
    return fastbert.fuse(model) if kind == "fused" else model


def trainer(
    model: Any, checkpoint: Path, folder: Path, test_texts: int | None = 60, **changes: Any
) -> transformers.Trainer:
    """A Trainer over the task, with some of its tests: every step logged, nothing saved, unless told otherwise."""
    tokenizer, _, train_set, test_set = task(checkpoint)
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 40,
        "learning_rate": 5e-4,
        "optim": "adamw_torch_fused",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    made = transformers.Trainer(
        model,
        transformers.TrainingArguments(**settings | changes),
        train_dataset=train_set,
        eval_dataset=test_set[:test_texts],
        processing_class=tokenizer,
        compute_metrics=finetune.accuracy,
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def losses(made: transformers.Trainer) -> list[float]:
    """The loss of each step logged so far."""
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def apart(ours: list[float], theirs: list[float]) -> float:
    """The largest difference of two loss curves."""
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))

"""Fine-tune a few parameters with PEFT's LoRA on a fused model, and merge them.

The task is that of `finetune.py`: the subject of a docstring. Adapted products are called as modules, and all around
them stays fused; once merged, the whole model is fused again.

    python examples/lora.py
"""

import importlib.util
from typing import Annotated, Any

import typer
from finetune import fail, load_task
from steps import DEMO_CHECKPOINT, load, predict, train


def main(
    model: Annotated[str, typer.Argument(help="Folder of a BERT checkpoint.")] = str(DEMO_CHECKPOINT),
    rank: Annotated[int, typer.Option(min=1, help="Of LoRA's matrices.")] = 8,
    steps: Annotated[int, typer.Option(min=1)] = 100,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 2e-3,
    seed: int = 0,
) -> None:
    """Train LoRA adapters on queries and values, test them, and merge them into the model."""
    if importlib.util.find_spec("peft") is None:
        fail("peft not installed: pip install peft")
    from peft import LoraConfig, TaskType, get_peft_model

    import fastbert

    network, tokenizer = load(model, "AutoModelForSequenceClassification", seed, num_labels=6)
    _, train_set, test_set = load_task(tokenizer)
    adapted: Any = get_peft_model(network, LoraConfig(TaskType.SEQ_CLS, r=rank, target_modules=["query", "value"]))
    adapted.print_trainable_parameters()
    typer.echo(str(fastbert.explain(adapted)))

    def to_batch(rows: list[Any]) -> Any:
        return tokenizer.pad(rows, return_tensors="pt")

    train(adapted, train_set, to_batch, steps, batch_size, learning_rate)
    merged = adapted.merge_and_unload()
    typer.echo(f"merged: {fastbert.explain(merged)}")
    right = sum(
        int((output.logits.argmax(-1) == batch["labels"]).sum())
        for batch, output in predict(merged, test_set, to_batch)
    )
    typer.echo(f"test accuracy {right / len(test_set):.1%}")


if __name__ == "__main__":
    typer.run(main)

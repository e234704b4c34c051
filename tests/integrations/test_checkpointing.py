"""Gradient checkpointing of both kinds: the same gradients, the same dropout, and less memory."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from models import ids, mask_of, randomize, tiny_config
from torch import nn
from training import SAME, apart, losses, network, task, trainer

import fastbert
from fastbert_kernels import backend

KINDS = [pytest.param(False, id="non-reentrant"), pytest.param(True, id="reentrant")]


def classifier(device: torch.device) -> Any:
    torch.manual_seed(0)
    config = tiny_config(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    model = fastbert.BertForSequenceClassification(config)
    randomize(model)
    return model.to(device).train()


def step(model: nn.Module, device: torch.device) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one step with dropout, from a fixed seed."""
    torch.manual_seed(3)
    x, mask, labels = ids(device=device), mask_of([11, 3, 7], 11, device), torch.tensor([0, 1, 1], device=device)
    model.zero_grad()
    torch.manual_seed(5)
    loss = model(input_ids=x, attention_mask=mask, labels=labels).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adapter", [False, True], ids=["all trained", "LoRA, rest frozen"])
@pytest.mark.parametrize("backend_name", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("reentrant", KINDS)
def test_same_loss_gradients_and_dropout(
    device: torch.device, reentrant: bool, backend_name: str, adapter: bool
) -> None:
    model = classifier(device)
    if adapter:
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    with backend(backend_name):
        wanted_loss, wanted = step(model, device)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss, grads = step(model, device)
        model.gradient_checkpointing_disable()
        last_loss, _ = step(model, device)
    assert abs(loss - wanted_loss) <= SAME
    assert abs(last_loss - wanted_loss) <= SAME
    assert grads.keys() == wanted.keys()
    difference = max((grads[name] - grad).abs().max().item() for name, grad in wanted.items())
    print(
        f"gradients with and without differ by {difference:.1e}, of {max(g.abs().max() for g in wanted.values()):.1e}"
    )
    assert difference <= 1e-6


def saved_bytes(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """How much memory a forward pass keeps for the backward pass, parameters left out."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**inputs).loss
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    total = sum(size for pointer, size in kept.items() if pointer not in parameters)
    assert loss.requires_grad  # the graph, and with it all that is kept, lives until here
    return total


def with_and_without(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[int, int, int]:
    """Bytes kept without checkpointing, with the non-reentrant kind, and with the reentrant one."""
    without = saved_bytes(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = saved_bytes(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    return without, checkpointed, saved_bytes(model, inputs)


def test_memory_falls_as_it_does_with_hugging_face(checkpoint: Path) -> None:
    tokenizer, _, train_set, _ = task(checkpoint)
    inputs = dict(transformers.DataCollatorWithPadding(tokenizer)(train_set[:8]))
    print(f"batch {tuple(inputs['input_ids'].shape)}, fill {inputs['attention_mask'].float().mean():.2f}")
    shares, checkpointed = {}, {}
    for kind in ("own", "eager", "sdpa"):
        without, *both = with_and_without(network(kind, checkpoint, dropout=None).train(), inputs)
        shares[kind], checkpointed[kind] = max(both) / without, max(both)
        print(f"{kind}: {without} bytes, checkpointed {both}: {shares[kind]:.3f}")
    for plain in ("eager", "sdpa"):
        assert checkpointed["own"] <= checkpointed[plain]
        assert shares["own"] <= 1.5 * shares[plain]


def test_memory_falls_on_the_kernels_too(device: torch.device) -> None:
    inputs = {"input_ids": ids(2, 16, device), "attention_mask": mask_of([16, 7], 16, device)}
    with backend("triton"):
        without, *both = with_and_without(classifier(device), inputs | {"labels": torch.zeros(2).long().to(device)})
    print(f"{without} bytes, checkpointed {both}")
    assert max(both) < 0.4 * without


@pytest.mark.parametrize("reentrant", KINDS)
def test_trainer_checkpoints_without_changing_the_run(tiny: Path, tmp_path: Path, reentrant: bool) -> None:
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_steps": 4}
    plain = trainer(network("own", tiny, dropout=None), tiny, tmp_path, **settings)
    plain.train()
    settings |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    checkpointed = trainer(network("own", tiny, dropout=None), tiny, tmp_path, **settings)
    checkpointed.train()
    layer = checkpointed.model.bert.encoder.layer[0]
    assert layer.gradient_checkpointing
    assert layer._gradient_checkpointing_func.keywords["use_reentrant"] is reentrant
    # The reentrant kind runs the layers without gradients first, where a CPU's products round once less.
    rounding = 1e-5 * max(losses(plain)) if reentrant and not torch.cuda.is_available() else 0.0
    assert apart(losses(checkpointed), losses(plain)) <= SAME + 4 * rounding
    for a, b in zip(checkpointed.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3 if rounding else 1e-6, rtol=1e-5)  # Adam magnifies small gradients

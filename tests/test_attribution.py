"""Relevance of tokens for a class equals the rule as the paper has it, on Hugging Face's eager model."""

import copy
from typing import Any

import pytest
import torch
import transformers
from family_table import FAMILIES, Family
from models import ids, mask_of, randomize, tiny_config

import fastbert
from fastbert.attribution import attribute, rollout
from fastbert_kernels import backend

LENGTHS = [11, 4, 1]


def classifiers(device: torch.device) -> tuple[Any, Any]:
    """A classifier of three classes with eager attention, and the same one fused."""
    plain = transformers.BertForSequenceClassification(tiny_config(num_labels=3))
    randomize(plain)
    plain = plain.to(device).eval()
    return plain, fastbert.fuse(copy.deepcopy(plain))


def ragged(device: torch.device) -> dict[str, torch.Tensor]:
    return {"input_ids": ids(3, 11, device), "attention_mask": mask_of(LENGTHS, 11, device)}


def rule(model: Any, inputs: dict[str, torch.Tensor], row: int, label: int) -> torch.Tensor:
    """Chefer et al.'s R of one sequence, unpadded, with whole matrices: relevance (length,) without R's first 1."""
    length = LENGTHS[row]
    output = model(inputs["input_ids"][row : row + 1, :length], output_attentions=True)
    gradients = torch.autograd.grad(output.logits[0, label], output.attentions)
    relevance = torch.eye(length, dtype=torch.float64, device=gradients[0].device)
    for probabilities, gradient in zip(output.attentions, gradients, strict=True):
        weights = (probabilities[0] * gradient[0]).double().clamp(min=0).mean(0)
        relevance = relevance + weights @ relevance
    return relevance[0] - torch.eye(length, dtype=torch.float64, device=relevance.device)[0]


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_relevance_is_the_rule_on_eager(device: torch.device, name: str) -> None:
    plain, fused = classifiers(device)
    inputs = ragged(device)
    classes = torch.tensor([2, 0, 1], device=device)
    with backend(name):
        found = attribute(fused, inputs, classes)
    torch.testing.assert_close(found.logits, plain(**inputs).logits, atol=1e-4, rtol=1e-4)
    assert found.classes.tolist() == [2, 0, 1]
    for row, length in enumerate(LENGTHS):
        wanted = rule(plain, inputs, row, int(classes[row]))
        torch.testing.assert_close(found.relevance[row, :length].double(), wanted, atol=1e-4, rtol=1e-4)
        assert not found.relevance[row, length:].any()
        assert found.relevance[row, :length].max() > 0.01


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_familys_classifier(family: Family) -> None:
    plain, fused = family.pair("ForSequenceClassification", num_labels=3)
    inputs = family.batch()
    found = attribute(fused, inputs, 1).relevance
    output = plain(**inputs, output_attentions=True)
    gradients = torch.autograd.grad(output.logits[:, 1].sum(), output.attentions)
    wanted = torch.eye(found.shape[1]).expand(len(found), -1, -1)
    for probabilities, gradient in zip(output.attentions, gradients, strict=True):
        wanted = wanted + (probabilities.detach() * gradient).clamp(min=0).mean(1) @ wanted
    wanted = wanted[:, 0] - torch.eye(found.shape[1])[0]
    torch.testing.assert_close(found, wanted * inputs["attention_mask"], atol=1e-4, rtol=1e-4)
    assert found.max() > 0.001


def test_classes(device: torch.device) -> None:
    _, fused = classifiers(device)
    inputs = ragged(device)
    highest = attribute(fused, inputs)
    assert highest.classes.equal(highest.logits.argmax(1))
    one = attribute(fused, inputs, 1)
    assert one.classes.tolist() == [1, 1, 1]
    assert not one.relevance.allclose(attribute(fused, inputs, 2).relevance)


def test_rollout_is_the_product_of_layers(device: torch.device) -> None:
    plain, fused = classifiers(device)
    inputs = ragged(device)
    found = rollout(fused(**inputs, output_attentions=True).attentions)
    wanted = torch.eye(11, device=device).expand(3, 11, 11)
    for probabilities in plain(**inputs, output_attentions=True).attentions:
        wanted = (probabilities.mean(1) + torch.eye(11, device=device)) / 2 @ wanted
    torch.testing.assert_close(found, wanted[:, 0], atol=1e-5, rtol=1e-4)
    assert not found[1, 4:].any()


def test_nothing_of_the_model_changes(device: torch.device) -> None:
    _, fused = classifiers(device)
    fused.bert.requires_grad_(False)
    before = [parameter.requires_grad for parameter in fused.parameters()]
    with torch.inference_mode():
        assert attribute(fused, ragged(device)).relevance.max() > 0
    assert [parameter.requires_grad for parameter in fused.parameters()] == before
    assert all(parameter.grad is None for parameter in fused.parameters())


def test_what_has_no_attribution(device: torch.device) -> None:
    plain, fused = classifiers(device)
    inputs = ragged(device)
    left = inputs | {"attention_mask": inputs["attention_mask"].flip(1)}
    tokens = fastbert.BertForTokenClassification(tiny_config()).to(device).eval()
    for model, batch, classes, message in (
        (plain, inputs, 0, r"holds no fused encoder: call fastbert.fuse\(model\)"),
        (fused.bert, inputs, 0, "BertModel is no classifier"),
        (copy.deepcopy(fused).train(), inputs, 0, r"call model.eval\(\)"),
        (tokens, inputs, 0, r"needs logits \(batch, labels\), and these are \(3, 11, 2\)"),
        (fused, left, 0, "pad on the right"),
        (fused, inputs, 3, "from 0 to 2, got"),
        (fused, inputs, torch.tensor([0, 1]), r"\(batch,\) = \(3,\), got \(2,\)"),
        (fused, inputs, torch.tensor(0.5), "an int or int"),
    ):
        with pytest.raises(ValueError, match=message):
            attribute(model, batch, classes)

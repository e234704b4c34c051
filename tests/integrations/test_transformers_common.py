"""Transformers' own common model tests, on our models and heads.

They come with its source release only, which is not installed: unpack the one of the installed version and name its
folder in TRANSFORMERS_SOURCE. They need `parameterized` too.

    pip download --no-deps --no-binary transformers transformers==5.24.0
    TRANSFORMERS_SOURCE=transformers-5.24.0 pytest tests/integrations/test_transformers_common.py
"""

import importlib
import inspect
import os
import sys
import types
import unittest
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastbert import families
from fastbert.modules import swap

SOURCE = Path(os.environ.get("TRANSFORMERS_SOURCE", "nowhere"))

if not (SOURCE / "tests" / "test_modeling_common.py").exists():
    pytest.skip("transformers' own tests: TRANSFORMERS_SOURCE names no source release", allow_module_level=True)
pytest.importorskip("parameterized")

#: DistilBERT's words for BERT's sizes.
DISTILBERT = {
    "hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim", "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}  # fmt: skip

#: One line a family: its configuration, and what that calls sizes otherwise than BERT's does.
FAMILIES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "Bert": (transformers.BertConfig, {}),
    "Roberta": (transformers.RobertaConfig, {}),
    "XLMRoberta": (transformers.XLMRobertaConfig, {}),
    "Camembert": (transformers.CamembertConfig, {}),
    "Data2VecText": (transformers.Data2VecTextConfig, {}),
    "Electra": (transformers.ElectraConfig, {}),
    "DistilBert": (transformers.DistilBertConfig, DISTILBERT),
    "MPNet": (transformers.MPNetConfig, {}),
}

#: Tests that demand an attention of another name than "eager", whose semantics ours has.
OTHER_ATTENTION = ("test_can_set_attention_dynamically", "test_sdpa_can_dispatch_non_composite_models")

SETTINGS = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}


def _common_tests() -> Any:
    """The module of common tests, in a package of its own; what the release leaves out of its package is empty."""
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(SOURCE / "tests")]
    modules = {"transformers_tests": package}
    for name, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        parent, _, _ = name.partition(".")
        for part in (parent, name):
            modules[f"transformers_tests.{part}"] = types.ModuleType(f"transformers_tests.{part}")
        setattr(modules[f"transformers_tests.{name}"], mixin, type(mixin, (), {}))
    sys.modules.update(modules)
    return importlib.import_module("transformers_tests.test_modeling_common")


class ModelTester:
    """What the common tests ask a family's tests for: a small configuration, and inputs with a padded row."""

    batch_size, seq_length, num_choices = 13, 7, 4
    is_training = True

    def __init__(self, config: type[Any], names: dict[str, Any]) -> None:
        self.config, self.names = config, names
        for name, value in SETTINGS.items():
            setattr(self, name, value)

    def get_config(self) -> Any:
        return self.config(**{self.names.get(name, name): value for name, value in SETTINGS.items()})

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        config, shape = self.get_config(), (self.batch_size, self.seq_length)
        mask = torch.ones(shape, dtype=torch.long)
        mask[-1, 4:] = 0
        return config, {"input_ids": torch.randint(2, SETTINGS["vocab_size"], shape), "attention_mask": mask}


common = _common_tests()


def _cases(family: str) -> type[Any]:
    """The common tests of a family's models and heads."""
    config, names = FAMILIES[family]
    models = tuple(
        swap.FUSED[theirs] for theirs in (*families.MODELS, *families.HEADS) if theirs.config_class is config
    )
    generates = any(model.can_generate() for model in models)
    bases = (common.ModelTesterMixin, *[common.GenerationTesterMixin] * generates, unittest.TestCase)

    class Cases(*bases):  # type: ignore[misc]
        all_model_classes = models

        def setUp(self) -> None:  # noqa: N802
            self.model_tester = ModelTester(config, names)

        def _prepare_for_class(self, inputs: Any, model: Any, return_labels: bool = False) -> Any:
            inputs = super()._prepare_for_class(inputs, model, return_labels)
            if return_labels and "next_sentence_label" in inspect.signature(model.forward).parameters:
                inputs["labels"] = torch.zeros_like(inputs["input_ids"])
                inputs["next_sentence_label"] = torch.zeros(len(inputs["input_ids"]), dtype=torch.long)
            if return_labels and model.__name__ == "ElectraForPreTraining":  # which labels each token
                inputs["labels"] = torch.zeros_like(inputs["input_ids"])
            return inputs

    for name in OTHER_ATTENTION:
        reason = "it demands an attention of another name"
        setattr(Cases, name, pytest.mark.xfail(reason=reason, strict=True)(getattr(Cases, name)))
    return Cases


for _family in FAMILIES:
    globals()[f"Test{_family}"] = _cases(_family)

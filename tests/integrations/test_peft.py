"""PEFT around a fused model: adapters, what they train, saving, loading, merging."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from models import ids, mask_of, randomize, tiny_config
from torch import nn
from training import CLOSE, apart, losses, network, task, trainer
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.models.bert import modeling_bert as hf
from transformers.utils import check_peft_version

import fastbert
from fastbert import notices
from fastbert.modules.qkv import adjacent

LINEAR = "peft.tuners.lora.layer.Linear"
CLS = "SEQ_CLS"  # with it PEFT trains the classifier too
CONFIGS = {
    "query and value": peft.LoraConfig(task_type=CLS, r=4, target_modules=["query", "value"]),
    "all linears": peft.LoraConfig(task_type=CLS, r=4, target_modules="all-linear"),
    "modules to save": peft.LoraConfig(
        task_type=CLS, r=4, target_modules=["query", "output.dense"], modules_to_save=["pooler", "intermediate.dense"]
    ),
    "DoRA": peft.LoraConfig(task_type=CLS, r=4, use_dora=True, target_modules=["key", "output.dense"]),
    "IA3": peft.IA3Config(
        task_type=CLS, target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]
    ),
    "prefix": peft.PrefixTuningConfig(task_type=CLS, num_virtual_tokens=5),
    "prompt": peft.PromptTuningConfig(task_type=CLS, num_virtual_tokens=5),
}
#: The linear layers that each calls as modules, in every encoder layer.
CALLED: dict[str, dict[str, tuple[str, ...]]] = {
    "query and value": {"attention.self": ("query", "value")},
    "all linears": {
        "attention.self": ("query", "key", "value"),
        "attention.output": ("dense",),
        "intermediate": ("dense",),
        "output": ("dense",),
    },
    "prefix": {},
    "prompt": {},
}


def plain_model(cls: type[nn.Module] = transformers.BertForSequenceClassification, **changes: Any) -> Any:
    """The same model each time, in eval mode."""
    torch.manual_seed(0)
    plain = transformers.BertForSequenceClassification(tiny_config(num_labels=3, **changes))
    randomize(plain)
    model = cls(tiny_config(num_labels=3, **changes))
    model.load_state_dict(plain.state_dict())
    return model.eval()


def adapted(model: nn.Module, config: str | peft.PeftConfig) -> peft.PeftModel:
    """The model with an adapter that changes what it computes; the same each time."""
    torch.manual_seed(1)
    config = CONFIGS[config] if isinstance(config, str) else config
    model = peft.get_peft_model(model, copy.deepcopy(config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) * 0.2)
    return model


def batch(device: str = "cpu") -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    return {"input_ids": ids(), "attention_mask": mask_of([11, 3, 7], 11), "labels": torch.tensor([0, 2, 1])}


def why_no_prefix() -> str | None:
    """Why prefix tuning fails without fastbert: what is not there cannot be compared."""
    try:
        adapted(plain_model(), "prefix")(**batch())
    except ValueError as error:
        return f"PEFT {peft.__version__} with transformers {transformers.__version__}, without fastbert: {error}"
    return None


def why_not_loaded() -> str | None:
    """Why transformers itself loads no adapter of this PEFT."""
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        return f"PEFT {peft.__version__} with transformers {transformers.__version__}, without fastbert: {error}"
    return None


NO_PREFIX = why_no_prefix()
TOO_OLD = why_not_loaded()
PREFIX = pytest.param("prefix", marks=pytest.mark.skipif(NO_PREFIX is not None, reason=str(NO_PREFIX)))


def outcome(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradient of every parameter that is trained."""
    model.zero_grad()
    out = model(**batch())
    out.loss.backward()
    return out.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def furthest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference of a parameter's gradients, beside that gradient's largest element."""
    return max(((ours[name] - grad).abs().max() / grad.abs().max()).item() for name, grad in theirs.items())


def fused_first(name: str) -> peft.PeftModel:
    return adapted(fastbert.fuse(plain_model()), name)


def fused_after(name: str) -> peft.PeftModel:
    return fastbert.fuse(adapted(plain_model(), name))


def own_class(name: str) -> peft.PeftModel:
    return adapted(plain_model(fastbert.BertForSequenceClassification), name)


ORDERS = [fused_first, fused_after, own_class]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", [PREFIX if name == "prefix" else name for name in CONFIGS])
def test_an_adapters_outputs_and_gradients_are_hugging_faces(name: str, order: Callable[[str], nn.Module]) -> None:
    base, _ = outcome(plain_model())
    wanted, wanted_grads = outcome(adapted(plain_model(), name))
    assert (wanted - base).abs().max() > 0.05  # the adapter does something
    model = order(name)
    got, grads = outcome(model)
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)
    assert grads.keys() == wanted_grads.keys()
    difference = furthest(grads, wanted_grads)
    print(f"{name}, {order.__name__}: gradients differ by {difference:.1e}, relative")
    assert difference < 1e-4

    assert fastbert.explain(model).fused
    if name in CALLED:
        notes = {(part.layer, part.name): part.reason for part in fastbert.explain(model).parts if part.reason}
        assert notes == {
            (layer, part): f"{', '.join(f'{linear} ({LINEAR})' for linear in linears)} called as a module"
            for layer in (0, 1)
            for part, linears in CALLED[name].items()
        }

    fastbert.unfuse(model)
    got, grads = outcome(model)
    assert torch.equal(got, wanted)
    assert all(torch.equal(grads[n], grad) for n, grad in wanted_grads.items())


@pytest.mark.parametrize("name", ["query and value", "all linears", "modules to save", PREFIX])
def test_an_adapter_saved_from_one_loads_into_the_other(name: str, tmp_path: Path) -> None:
    ours, theirs = fused_first(name), adapted(plain_model(), name)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded_plain = peft.PeftModel.from_pretrained(plain_model(), tmp_path / "ours").eval()
    loaded_fused = peft.PeftModel.from_pretrained(fastbert.fuse(plain_model()), tmp_path / "theirs").eval()
    assert (
        type(loaded_plain.base_model.bert if name == "prefix" else loaded_plain.base_model.model.bert) is hf.BertModel
    )
    inputs = batch()
    with torch.no_grad():
        wanted = theirs(**inputs).logits
        torch.testing.assert_close(ours(**inputs).logits, wanted, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(loaded_plain(**inputs).logits, wanted, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(loaded_fused(**inputs).logits, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.skipif(TOO_OLD is not None, reason=str(TOO_OLD))
def test_hugging_faces_own_way_to_adapters(tmp_path: Path) -> None:
    fused_first("query and value").save_pretrained(tmp_path)
    theirs, ours = plain_model(), plain_model(fastbert.BertForSequenceClassification)
    with torch.no_grad():
        base = theirs(**batch()).logits
        for model in (theirs, ours):
            model.load_adapter(str(tmp_path))
        wanted = theirs(**batch()).logits
        assert (wanted - base).abs().max() > 0.05
        torch.testing.assert_close(ours(**batch()).logits, wanted, atol=2e-5, rtol=1e-4)
        ours.disable_adapters()
        torch.testing.assert_close(ours(**batch()).logits, base, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["query and value", "all linears", "DoRA", "IA3"])
def test_merging_puts_the_merged_weights_on_the_fast_path(
    name: str, order: Callable[[str], nn.Module], safe: bool
) -> None:
    wanted = outcome(adapted(plain_model(), name))[0]
    model = order(name)
    inputs = batch()
    model(**inputs)
    merged = model.merge_and_unload(safe_merge=safe)
    assert str(fastbert.explain(merged)).splitlines()[0] == "every part is fused: embeddings and 2 layers"
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, wanted, atol=5e-5, rtol=1e-4)
    for layer in merged.bert.encoder.layer:
        block = layer.attention.self
        assert adjacent((block.query.weight, block.key.weight, block.value.weight))
    theirs = adapted(plain_model(), name).merge_and_unload(safe_merge=safe)
    for (key, a), b in zip(merged.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6, msg=key)


@pytest.mark.parametrize("order", ORDERS)
def test_merged_unmerged_disabled(order: Callable[[str], nn.Module]) -> None:
    model, inputs = order("all linears"), batch()
    with torch.no_grad():
        base, theirs = plain_model()(**inputs).logits, adapted(plain_model(), "all linears")
        wanted = theirs(**inputs).logits
        model.merge_adapter()
        torch.testing.assert_close(model(**inputs).logits, wanted, atol=5e-5, rtol=1e-4)
        assert fastbert.explain(model).fused
        model.unmerge_adapter()
        torch.testing.assert_close(model(**inputs).logits, wanted, atol=5e-5, rtol=1e-4)
        with model.disable_adapter():
            torch.testing.assert_close(model(**inputs).logits, base, atol=5e-5, rtol=1e-4)
        unloaded = model.unload()
        assert fastbert.explain(unloaded).fused
        torch.testing.assert_close(unloaded(**inputs).logits, theirs.unload()(**inputs).logits, atol=5e-5, rtol=1e-4)


def test_one_batch_with_an_adapter_a_text() -> None:
    def two(model: nn.Module) -> peft.PeftModel:
        wrapped = adapted(model, "query and value")
        wrapped.add_adapter("second", CONFIGS["query and value"])
        return wrapped.eval()

    theirs, ours, inputs = two(plain_model()), two(fastbert.fuse(plain_model())), batch()
    with torch.no_grad():
        for choice in (["default", "second", "__base__"], ["second", "second", "default"]):
            wanted = theirs(**inputs, adapter_names=choice).logits
            torch.testing.assert_close(ours(**inputs, adapter_names=choice).logits, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "layer_norm"),
    [
        (peft.LNTuningConfig(task_type=CLS, target_modules=["1.output.LayerNorm"]), "LNTuningLayer"),
        (
            peft.LoraConfig(task_type=CLS, target_modules=["0.output.dense"], modules_to_save=["1.output.LayerNorm"]),
            "ModulesToSaveWrapper",
        ),
    ],
)
def test_what_cannot_stay_fused_says_which_layer_and_why(
    config: peft.PeftConfig, layer_norm: str, caplog: pytest.LogCaptureFixture
) -> None:
    notices.say_once.cache_clear()
    theirs, ours = adapted(plain_model(), config), adapted(fastbert.fuse(plain_model()), config)
    wanted, wanted_grads = outcome(theirs)
    with caplog.at_level(logging.WARNING, "fastbert"):
        got, grads = outcome(ours)
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)
    for name, grad in wanted_grads.items():
        torch.testing.assert_close(grads[name], grad, atol=1e-5, rtol=1e-3)
    reason = f"LayerNorm is not a plain nn.LayerNorm but {layer_norm}"
    assert f"BertOutput runs unfused: {reason}" in caplog.text
    unfused = [(part.layer, part.name, part.reason) for part in fastbert.explain(ours).parts if not part.fused]
    assert unfused == [(1, "output", reason)]


@pytest.mark.parametrize("name", ["all linears", PREFIX])
def test_gradients_on_a_real_checkpoint_and_real_text(name: str, checkpoint: Path) -> None:
    tokenizer, _, train_set, _ = task(checkpoint)
    inputs = dict(transformers.DataCollatorWithPadding(tokenizer)(train_set[:6]))
    config = copy.deepcopy(CONFIGS[name])
    grads = {}
    for kind in ("eager", "own"):
        model = network(kind, checkpoint)
        torch.manual_seed(1)
        model = peft.get_peft_model(model, config).eval()
        with torch.no_grad():
            for parameter_name, p in model.named_parameters():
                if "lora_B" in parameter_name:  # which PEFT starts at zero, and lora_A's gradient with it
                    p.normal_(std=0.02)
        model(**inputs).loss.backward()
        grads[kind] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    difference = furthest(grads["own"], grads["eager"])
    print(f"{name}: gradients differ by {difference:.1e}, relative")
    assert difference < 1e-4


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["kept", "non-reentrant", "reentrant"])
def test_trainer_trains_an_adapter_and_nothing_else(tiny: Path, tmp_path: Path, reentrant: bool | None) -> None:
    settings: dict[str, Any] = {"learning_rate": 1e-2, "gradient_checkpointing": reentrant is not None}
    if reentrant is not None:
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    runs = []
    for kind in ("own", "eager"):
        torch.manual_seed(1)
        model = peft.get_peft_model(network(kind, tiny), CONFIGS["all linears"])
        before = {name: value.clone() for name, value in model.state_dict().items()}
        made = trainer(model, tiny, tmp_path, **settings)
        made.train()
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
        runs.append(losses(made))
    assert runs[0] != [runs[0][0]] * len(runs[0])
    assert apart(*runs) < CLOSE

"""Hugging Face's Trainer and accelerate around both ways in, on the example's task."""

import logging
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from training import CLOSE, SAME, apart, losses, network, task, trainer
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert import notices

KINDS_OF_MODEL = ["own", pytest.param("fused", marks=pytest.mark.slow)]


def run(kind: str, checkpoint: Path, folder: Path, dropout: float = 0.0, **changes: Any) -> transformers.Trainer:
    """A Trainer that has trained."""
    made = trainer(network(kind, checkpoint, dropout), checkpoint, folder, **changes)
    made.train()
    return made


@pytest.fixture(scope="module")
def theirs(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> transformers.Trainer:
    """Hugging Face's own model after a short training without dropout."""
    return run("sdpa", checkpoint, tmp_path_factory.mktemp("theirs"))


@pytest.mark.parametrize("kind_of_model", KINDS_OF_MODEL)
def test_trained_evaluated_saved_and_opened_in_plain_transformers(
    kind_of_model: str, checkpoint: Path, theirs: transformers.Trainer, tmp_path: Path
) -> None:
    ours = run(kind_of_model, checkpoint, tmp_path)
    print(f"{kind_of_model}: losses differ by {apart(losses(ours), losses(theirs)):.1e}")
    assert apart(losses(ours), losses(theirs)) < CLOSE
    measured, wanted = ours.evaluate(), theirs.evaluate()
    print(measured)
    assert measured["eval_accuracy"] > 0.4  # of six labels
    assert measured["eval_accuracy"] == wanted["eval_accuracy"]
    assert abs(measured["eval_loss"] - wanted["eval_loss"]) < CLOSE
    assert fastbert.explain(ours.model).fused

    ours.save_model(str(tmp_path / "saved"))
    opened = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert type(opened) is hf.BertForSequenceClassification
    for (name, a), b in zip(opened.state_dict().items(), ours.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert abs(trainer(opened, checkpoint, tmp_path).evaluate()["eval_loss"] - measured["eval_loss"]) < CLOSE


RECIPE: dict[str, Any] = {
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.2,
    "train_sampling_strategy": "group_by_length",
    "warmup_steps": 3,
    "weight_decay": 0.01,
    "label_smoothing_factor": 0.1,
}


def test_the_recipe_is_followed_as_with_hugging_face(tiny: Path, tmp_path: Path) -> None:
    ours, theirs = (run(kind, tiny, tmp_path, **RECIPE) for kind in ("own", "eager"))
    assert apart(losses(ours), losses(theirs)) < CLOSE
    norms = [
        [entry["grad_norm"] for entry in made.state.log_history if "grad_norm" in entry] for made in (ours, theirs)
    ]
    assert apart(*norms) < 1e-4 * max(norms[1])
    assert max(norms[1]) > 0.2  # clipping has something to do
    fills = [batch["attention_mask"].float().mean().item() for batch in ours.get_train_dataloader()]
    assert statistics.mean(fills) > 0.8  # grouped; shuffled batches are half padding


@pytest.mark.parametrize("kind_of_model", KINDS_OF_MODEL)
def test_resumed_in_the_middle_of_an_epoch_equals_uninterrupted(kind_of_model: str, tiny: Path, tmp_path: Path) -> None:
    settings = {**RECIPE, "max_steps": 8, "save_strategy": "steps", "save_steps": 3}
    whole = run(kind_of_model, tiny, tmp_path, dropout=0.1, **settings)
    resumed = trainer(network(kind_of_model, tiny, dropout=0.1, seed=5), tiny, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 8
    assert apart(losses(resumed), losses(whole)) <= SAME
    for (name, a), b in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert (a - b).abs().max() <= SAME, name


def test_the_best_checkpoint_is_loaded_at_the_end(tiny: Path, tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    ours = run("fused", tiny, tmp_path, load_best_model_at_end=True, metric_for_best_model="accuracy", **settings)
    assert ours.state.best_metric is not None
    best = load_file(Path(ours.state.best_model_checkpoint) / "model.safetensors")
    assert all(torch.equal(value, best[name]) for name, value in ours.model.state_dict().items())
    assert ours.evaluate()["eval_accuracy"] == ours.state.best_metric


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.gpu)])
def test_autocast_follows_float32(precision: str, checkpoint: Path, tmp_path: Path) -> None:
    """On a CPU accelerate leaves fp16 out in silence. The next test compares a step's error with Hugging Face's."""
    settings = {precision: True, "use_cpu": not torch.cuda.is_available(), "max_steps": 4}
    full, half = (run("own", checkpoint, tmp_path, **changes) for changes in ({"max_steps": 4}, settings))
    print(f"{precision}: losses differ from float32 by {apart(losses(half), losses(full)):.1e}")
    assert 1e-6 < apart(losses(half), losses(full)) < 1e-2
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_scaled_gradients_in_a_loop_of_ones_own(
    tiny: Path, device: torch.device, dtype: torch.dtype
) -> None:
    tokenizer, _, train_set, _ = task(tiny)
    batch = transformers.DataCollatorWithPadding(tokenizer)(train_set[:8]).to(device)
    grads = {}
    for kind, cast in (("truth", None), ("eager", dtype), ("own", dtype)):
        model = network("eager" if kind == "truth" else kind, tiny).to(device).train()
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        with torch.autocast(device.type, cast, enabled=cast is not None):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grads[kind] = [p.grad.clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 1024.0  # no gradient overflowed
    errors = {
        kind: math.sqrt(sum((a - b).square().sum().item() for a, b in zip(grads[kind], grads["truth"], strict=True)))
        for kind in ("own", "eager")
    }
    print(f"{dtype}: gradient error {errors['own']:.1e}, Hugging Face {errors['eager']:.1e}")
    assert errors["own"] <= 2 * errors["eager"] + 1e-6


def resume(model: torch.nn.Module, tiny: Path, folder: Path) -> None:
    """Resume a model from the first step of one with two layers, 32 wide, for six labels."""
    settings: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    run("own", tiny, folder, **settings | {"max_steps": 1})
    trainer(model, tiny, folder, **settings).train(resume_from_checkpoint=str(folder / "checkpoint-1"))


def other_model(tiny: Path, **changes: Any) -> fastbert.BertForSequenceClassification:
    settings: dict[str, Any] = {"num_labels": 6, **changes}
    return fastbert.BertForSequenceClassification(transformers.BertConfig.from_pretrained(tiny, **settings))


@pytest.mark.parametrize(
    ("changes", "saved", "own"),
    [({"intermediate_size": 48}, r"64, 32", r"48, 32"), ({"num_labels": 3}, r"6, 32", r"3, 32")],
)
def test_resuming_from_another_width_names_both(
    tiny: Path, tmp_path: Path, changes: dict[str, int], saved: str, own: str
) -> None:
    with pytest.raises(RuntimeError, match=rf"\[{saved}\].* from checkpoint.* current model is .*\[{own}\]"):
        resume(other_model(tiny, **changes), tiny, tmp_path)


@pytest.mark.parametrize("layers", [1, 3])
def test_resuming_from_another_depth_names_both(
    tiny: Path, tmp_path: Path, layers: int, caplog: pytest.LogCaptureFixture
) -> None:
    notices.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "fastbert"), pytest.raises(ValueError, match="optimizer's group"):
        resume(other_model(tiny, num_hidden_layers=layers), tiny, tmp_path)
    assert f"a checkpoint with 2 encoder layers is loaded into a model with {layers}" in caplog.text


@pytest.mark.slow
def test_a_hundred_steps_follow_eager(checkpoint: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 100, "per_device_train_batch_size": 16, "learning_rate": 2e-4}
    ours, theirs = (run(kind, checkpoint, tmp_path, test_texts=None, **settings) for kind in ("own", "eager"))
    scores = [made.evaluate()["eval_accuracy"] for made in (ours, theirs)]
    print(f"losses differ by {apart(losses(ours), losses(theirs)):.1e}; accuracies {scores}")
    assert apart(losses(ours), losses(theirs)) < 1e-3
    assert min(scores) > 0.7  # of six labels
    assert abs(scores[0] - scores[1]) < 0.01


@pytest.mark.slow
def test_dropout_leads_to_the_same_accuracy_over_three_seeds(checkpoint: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 100, "per_device_train_batch_size": 16, "learning_rate": 2e-4}
    scores: dict[str, list[float]] = {"own": [], "eager": []}
    for seed in range(3):
        for kind, found in scores.items():
            model = network(kind, checkpoint, dropout=None, seed=seed)
            made = trainer(model, checkpoint, tmp_path, test_texts=None, seed=seed, **settings)
            made.train()
            found.append(made.evaluate()["eval_accuracy"])
    texts = len(task(checkpoint)[3])
    means = {kind: statistics.mean(found) for kind, found in scores.items()}
    # What one run's accuracy scatters by: over the seeds, and at least by the choice of the texts it is measured on.
    scatter = max(math.sqrt(means["eager"] * (1 - means["eager"]) / texts), *map(statistics.stdev, scores.values()))
    bound = 2 * scatter * math.sqrt(2 / 3)
    print(f"{scores}: means differ by {abs(means['own'] - means['eager']):.4f}, bound {bound:.4f}")
    assert min(*scores["own"], *scores["eager"]) > 0.7
    assert abs(means["own"] - means["eager"]) < bound


@pytest.mark.slow
@pytest.mark.parametrize("kind_of_model", KINDS_OF_MODEL)
def test_torch_compile(kind_of_model: str, tiny: Path, tmp_path: Path) -> None:
    compiled = run(kind_of_model, tiny, tmp_path, torch_compile=True)
    ours = run(kind_of_model, tiny, tmp_path)
    print(f"{kind_of_model}: compiled and not, losses differ by {apart(losses(compiled), losses(ours)):.1e}")
    assert apart(losses(compiled), losses(ours)) < 1e-4
    assert compiled.evaluate()["eval_accuracy"] == ours.evaluate()["eval_accuracy"]

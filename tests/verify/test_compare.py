"""The comparison passes what is right, and fails what is broken in any of the ways it claims to see."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertModel

from fastbert.inputs import SENTENCES, InputError, load, parse_device, parse_dtype, tokenize
from fastbert.verify.compare import _errors, compare, gradient_group
from fastbert.verify.report import Check, Report

TEXT = ["Rain is falling.", "Who left the kitchen window open last night?"]


@pytest.fixture(scope="module")
def report(checkpoint: Path) -> Report:
    return compare(checkpoint, TEXT, device="cpu", train=True, repeats=0)


def changed(change: Callable[[BertModel], None]) -> Callable[..., BertModel]:
    """fastbert's fuse, followed by damage to the model."""
    from fastbert.fusing import fuse

    def fuse_and_change(model: BertModel, packing: bool = True) -> BertModel:
        fused = fuse(model, packing=packing)
        change(fused)
        return fused

    return fuse_and_change


def returning(change: Callable[[Any], None]) -> Callable[..., BertModel]:
    """fastbert's fuse, followed by damage to what the model returns."""

    def damage(model: BertModel) -> None:
        def hook(module: Any, args: Any, output: Any) -> Any:
            change(output)
            return output

        model.register_forward_hook(hook)

    return changed(damage)


def test_fastbert_is_within_every_bound(report: Report) -> None:
    broken = [check for check in [*report.outputs, *report.gradients] if not check.ok]
    assert not broken
    assert report.ok


def test_every_output_and_every_parameter_is_checked(report: Report, checkpoint: Path) -> None:
    model, _ = load(checkpoint)
    layers = model.config.num_hidden_layers
    names = ["last_hidden_state", "pooler_output"]
    names += [f"hidden_states[{i}]" for i in range(layers + 1)] + [f"attentions[{i}]" for i in range(layers)]
    assert [check.name for check in report.outputs] == names
    assert [check.name for check in report.gradients] == [name for name, _ in model.named_parameters()]
    assert {check.shape for check in report.outputs if "attentions" in check.name} == {
        (2, model.config.num_attention_heads, 11, 11)
    }


def test_hugging_face_in_float32_has_an_error_of_its_own(report: Report) -> None:
    """A truth computed in the working dtype would show none."""
    assert all(1e-9 < check.hf_error < 1e-5 for check in report.outputs)
    assert all(math.isfinite(check.hf_error) for check in report.gradients)


def test_errors_are_told_by_their_largest_and_their_root_mean_square(report: Report) -> None:
    for check in [*report.outputs, *report.gradients]:
        assert 0 < check.rms <= check.error
        assert 0 < check.hf_rms <= check.hf_error
    got, exact = torch.tensor([[3.0, 9.0], [1.0, 5.0]]), torch.tensor([[0.0, 0.0], [-3.0, 0.0]]).double()
    assert _errors(got, exact, torch.tensor([[True, False]])) == (4.0, 12.5**0.5)


def test_the_typical_ratio_is_of_all_tensors(report: Report) -> None:
    checks = [Check("x", (1,), 0.0, 0.0, 0.0, rms=rms, hf_rms=2.0) for rms in (1.0, 8.0, 3.0, math.nan)]
    checks.append(Check("x", (1,), 0.0, 0.0, 0.0, rms=1.0, hf_rms=0.0))
    assert dataclasses.replace(report, outputs=checks[:2], gradients=checks[2:]).typical_ratio == 1.5
    assert dataclasses.replace(report, outputs=checks[3:], gradients=[]).typical_ratio is None


def test_report_is_json_with_its_provenance(report: Report) -> None:
    result = json.loads(json.dumps(report.to_dict()))
    assert result["ok"] is True
    assert set(result) == {"ok", "typical_ratio", "provenance", "outputs", "gradients", "timings", "timing_skipped"}
    numbers = {"error", "hf_error", "rms", "hf_rms", "ratio", "bound"}
    assert set(result["outputs"][0]) == {"name", "shape", "ok", "problem"} | numbers
    about = result["provenance"]
    assert about["versions"]["torch"] == torch.__version__
    assert about["dtype"] == "float32"
    assert about["backend"] == "torch"
    assert about["fill"] == pytest.approx(about["tokens"] / 22)


def test_timings_compare_three_models(tiny: Path) -> None:
    report = compare(tiny, TEXT, device="cpu", train=True, repeats=1)
    assert [timing.name for timing in report.timings] == [
        "forward",
        "forward, all outputs",
        "forward+backward",
        "forward+backward, all outputs",
    ]
    assert all(timing.fastbert > 0 and timing.eager_ratio > 0 for timing in report.timings)
    assert [timing.hf_sdpa is None for timing in report.timings] == [False, True, False, True]


def test_attentions_are_returned_for_drawing(report: Report) -> None:
    assert len(report.attentions) == report.provenance["layers"]
    assert report.tokens[0] == ["[CLS]", "rain", "is", "falling", ".", "[SEP]"]
    torch.testing.assert_close(report.attentions[0][0, :, :6].sum(-1), torch.ones(12, 6))


def test_half_precision_is_held_to_hugging_faces_own_error(tiny: Path) -> None:
    report = compare(tiny, TEXT, dtype="bf16", device="cpu", train=True, repeats=0)
    assert report.ok
    for check in report.outputs:
        assert check.bound == pytest.approx(2 * check.hf_error + 1e-5)
    assert report.timing_skipped == "no repeats asked for"


def test_packing_false_compares_padding_too(tiny: Path) -> None:
    assert compare(tiny, TEXT, device="cpu", packing=False, repeats=0).ok


def test_weight_changed_in_one_layer_is_caught(tiny: Path) -> None:
    def nudge(model: BertModel) -> None:
        with torch.no_grad():
            model.encoder.layer[1].output.dense.bias[3] += 1e-3

    report = compare(tiny, TEXT, device="cpu", fuse=changed(nudge), repeats=1)
    failed = [check.name for check in report.outputs if not check.ok]
    assert not report.ok
    assert "hidden_states[2]" in failed
    assert "hidden_states[1]" not in failed
    assert not report.timings
    assert "out of bounds" in str(report.timing_skipped)


def test_wrong_gradient_is_caught_though_outputs_are_right(tiny: Path) -> None:
    def halve(model: BertModel) -> None:
        model.encoder.layer[0].attention.self.query.weight.register_hook(lambda grad: grad / 2)

    report = compare(tiny, TEXT, device="cpu", fuse=changed(halve), train=True, repeats=0)
    assert all(check.ok for check in report.outputs)
    assert [check.name for check in report.gradients if not check.ok] == ["encoder.layer.0.attention.self.query.weight"]


def test_frozen_parameter_is_a_missing_gradient(tiny: Path) -> None:
    def freeze(model: BertModel) -> None:
        model.pooler.dense.bias.requires_grad_(False)

    report = compare(tiny, TEXT, device="cpu", fuse=changed(freeze), train=True, repeats=0)
    assert [(c.name, c.problem) for c in report.gradients if not c.ok] == [("pooler.dense.bias", "no gradient")]


def poison(output: Any) -> None:
    output.pooler_output = output.pooler_output.clone()
    output.pooler_output[0, 0] = math.nan


def touch_padding(output: Any) -> None:
    output.attentions[0][0, 0, -1, 0] = 1e-7


def drop_attentions(output: Any) -> None:
    output.attentions = None


def hide_a_layer(output: Any) -> None:
    output.attentions = (None, *output.attentions[1:])


def crop(output: Any) -> None:
    output.attentions = tuple(layer[..., :-1] for layer in output.attentions)


def widen(output: Any) -> None:
    output.pooler_output = output.pooler_output.double()


def add_a_layer(output: Any) -> None:
    output.hidden_states = (*output.hidden_states, output.last_hidden_state)


@pytest.mark.parametrize(
    ("damage", "name", "problem"),
    [
        (poison, "pooler_output", "not finite"),
        (touch_padding, "attentions[0]", "not zero at padding"),
        (drop_attentions, "attentions[1]", "missing"),
        (hide_a_layer, "attentions[0]", "missing"),
        (crop, "attentions[1]", "has shape (2, 2, 11, 10) instead of (2, 2, 11, 11)"),
        (widen, "pooler_output", "is torch.float64 on cpu instead of torch.float32 on cpu"),
        (add_a_layer, "hidden_states[3]", "Hugging Face returns no such output"),
    ],
)
def test_damaged_output_is_named(tiny: Path, damage: Callable[[Any], None], name: str, problem: str) -> None:
    report = compare(tiny, TEXT, device="cpu", fuse=returning(damage), repeats=0)
    assert (name, problem) in [(check.name, check.problem) for check in report.outputs if not check.ok]
    json.dumps(report.to_dict(), allow_nan=False)


def test_checkpoint_without_pooler_gets_the_same_one_in_every_model(tiny: Path, tmp_path: Path) -> None:
    model, tokenizer = load(tiny)
    weights = {name: weight for name, weight in model.state_dict().items() if not name.startswith("pooler")}
    model.save_pretrained(tmp_path, state_dict=weights)
    tokenizer.save_pretrained(tmp_path)
    assert compare(tmp_path, TEXT, device="cpu", repeats=0).ok


def test_checkpoint_with_missing_weights_is_refused(tiny: Path, tmp_path: Path) -> None:
    model, tokenizer = load(tiny)
    weights = {name: weight for name, weight in model.state_dict().items() if "layer.0.output" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="not a whole checkpoint: 4 weights"):
        load(tmp_path)


def test_other_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "albert"}')
    with pytest.raises(InputError, match="'albert', which fastbert has not: it takes bert"):
        load(tmp_path)


def test_long_sentences_are_cut_and_counted(tiny: Path) -> None:
    model, tokenizer = load(tiny)
    batch = tokenize(tokenizer, SENTENCES, 20, model.config.max_position_embeddings)
    assert batch.mask.shape == (len(SENTENCES), 20)
    assert batch.truncated == sum(len(tokenizer(s)["input_ids"]) > 20 for s in SENTENCES) > 0
    assert [len(tokens) for tokens in batch.tokens] == batch.mask.sum(1).tolist()
    with pytest.raises(InputError, match="max length 999 is out of range"):
        tokenize(tokenizer, SENTENCES, 999, model.config.max_position_embeddings)


def test_built_in_sentences_differ_in_length(tiny: Path) -> None:
    _, tokenizer = load(tiny)
    lengths = [len(tokenizer(sentence)["input_ids"]) for sentence in SENTENCES]
    assert min(lengths) <= 6
    assert max(lengths) >= 100
    assert sum(lengths) < len(lengths) * max(lengths) / 2


@pytest.mark.parametrize("name", ["float64", "int8", "half", ""])
def test_unknown_dtype(name: str) -> None:
    with pytest.raises(InputError, match=f"unknown dtype '{name}'"):
        parse_dtype(name)


@pytest.mark.parametrize(("name", "message"), [("gpu9", "unknown device 'gpu9'"), ("meta", "no kernels for device")])
def test_unknown_device(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_device(name)


def test_gradient_groups() -> None:
    assert gradient_group("encoder.layer.11.attention.output.LayerNorm.bias") == "layer 11 attention"
    assert gradient_group("encoder.layer.11.output.LayerNorm.bias") == "layer 11 mlp"
    assert gradient_group("embeddings.LayerNorm.bias") == "embeddings"


def test_check_that_is_not_a_number_is_not_ok() -> None:
    check = Check("x", (1,), math.nan, 0.0, 1.0)
    assert not check.ok
    assert check.to_dict()["error"] is None

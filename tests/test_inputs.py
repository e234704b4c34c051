"""A checkpoint that cannot be used is told in one line that names what is wrong; none is read as another one."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification, BertModel

from fastbert.inputs import InputError, load, tokenize


@pytest.fixture
def broken(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the checkpoint with fields of one of its JSON files changed."""

    def change(name: str, **fields: Any) -> Path:
        folder = tmp_path / "broken"
        shutil.copytree(tiny, folder, dirs_exist_ok=True)
        (folder / name).write_text(json.dumps(json.loads((tiny / name).read_text()) | fields))
        return folder

    return change


def one_line(folder: Path) -> str:
    with pytest.raises(InputError) as raised:
        load(folder)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", "abc", "hidden_size"),
        ("num_attention_heads", "2", "num_attention_heads"),
        ("num_attention_heads", 3, "hidden_size 32 does not divide into num_attention_heads 3"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0, which has to be a whole number from 1 on"),
        ("num_hidden_layers", -1, "num_hidden_layers is -1, which has to be a whole number from 1 on"),
        ("num_hidden_layers", 1, "16 weights that its config.json has no place for, as encoder.layer.1."),
        ("num_hidden_layers", 3, "16 weights miss, as encoder.layer.2."),
        ("max_position_embeddings", "128", "max_position_embeddings"),
        ("layer_norm_eps", None, "layer_norm_eps"),
        ("hidden_act", "gelux", "hidden_act 'gelux' is no activation of transformers"),
        ("dtype", "float99", "cannot use config.json of"),
        ("id2label", "x", "cannot use config.json of"),
    ],
)
def test_configurations_of_no_model(broken: Callable[..., Path], field: str, value: Any, message: str) -> None:
    assert message in one_line(broken("config.json", **{field: value}))


def test_a_chunk_size_of_letters(broken: Callable[..., Path]) -> None:
    said = one_line(broken("config.json", chunk_size_feed_forward="x"))
    by_transformers = "'chunk_size_feed_forward' expected int"  # of 5.17
    assert re.search(f"{by_transformers}|chunk_size_feed_forward is 'x', not a whole number", said)


@pytest.mark.parametrize("content", ["", "garbage", "[1, 2]", "{}", '"text"', "\x00"])
def test_a_configuration_of_garbage(broken: Callable[..., Path], content: str) -> None:
    folder = broken("config.json")
    (folder / "config.json").write_text(content)
    assert f"cannot use config.json of {str(folder)!r}" in one_line(folder)


@pytest.mark.parametrize("value", ["512", [512], -5, 60.5, True, 2])
def test_a_longest_text_that_is_no_length(broken: Callable[..., Path], value: Any) -> None:
    message = one_line(broken("tokenizer_config.json", model_max_length=value))
    assert f"has model_max_length {value!r}: write a whole number of at least 3" in message


def test_a_longest_text_that_says_no_limit(broken: Callable[..., Path]) -> None:
    for value in (1e30, int(1e30), None):
        load(broken("tokenizer_config.json", model_max_length=value))


@pytest.mark.parametrize("names", [["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]])
def test_a_checkpoint_without_its_tokenizer(broken: Callable[..., Path], names: list[str]) -> None:
    folder = broken("config.json")
    for name in names:
        (folder / name).unlink()
    assert f"the tokenizer of {str(folder)!r} has no words: add its files" in one_line(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tiny: Path, broken: Callable[..., Path], value: float) -> None:
    folder = broken("config.json")
    model = BertModel.from_pretrained(tiny)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[7, 3] = value
    model.save_pretrained(folder)
    assert "its weight embeddings.word_embeddings.weight has NaN or infinite values" in one_line(folder)


def test_a_checkpoint_with_a_head_is_taken_and_one_with_more_inside_the_encoder_is_not(
    tiny: Path, broken: Callable[..., Path]
) -> None:
    folder = broken("config.json")
    model = BertForSequenceClassification.from_pretrained(tiny)
    model.save_pretrained(folder)
    load(folder)
    weights = model.state_dict()
    weights["bert.embeddings.position_ids"] = torch.arange(128)[None]  # of old versions
    model.save_pretrained(folder, state_dict=weights)
    load(folder)
    weights["bert.encoder.layer.0.attention.self.query.lora_A"] = torch.ones(2)
    model.save_pretrained(folder, state_dict=weights)
    assert "lora_A: mend the configuration" in one_line(folder)


def test_names_that_no_folder_can_have() -> None:
    with pytest.raises(InputError, match=r"File name too long|not found"):
        load("x" * 300)


def test_a_sentence_that_is_not_utf_8(tiny: Path) -> None:
    _, tokenizer = load(tiny)
    with pytest.raises(InputError, match="sentence 2 is not UTF-8"):
        tokenize(tokenizer, ["rain", "\udcff"], None, 128)

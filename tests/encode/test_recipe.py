"""What a folder of sentence-transformers says is what `Encoder` does: as that library does it, or not at all."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embedded import TEXTS, plain_embeddings

from fastbert.encode import POOLINGS, Encoder
from fastbert.encode.pooling import pool
from fastbert.inputs import InputError

MODULES = [
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def folder(tiny: Path, tmp_path: Path, **files: Any) -> Path:
    """The checkpoint as old versions of sentence-transformers save it; files by name, without .json, `/` as `__`."""
    made = tmp_path / "made"
    shutil.copytree(tiny, made, dirs_exist_ok=True)
    content = {"modules": MODULES, "1_Pooling__config": {"pooling_mode_cls_token": True}, **files}
    for name, value in content.items():
        path = made / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(value))
    return made


def test_poolings_are_their_formulas() -> None:
    lengths = [3, 1, 5]
    hidden = torch.randn(9, 4)
    texts = hidden.split(lengths)
    formulas = {
        "mean": lambda x: x.mean(0),
        "cls": lambda x: x[0],
        "max": lambda x: x.max(0).values,
        "mean_sqrt_len_tokens": lambda x: x.sum(0) / len(x) ** 0.5,
        "weightedmean": lambda x: sum((i + 1) * row for i, row in enumerate(x)) / sum(range(1, len(x) + 1)),
        "lasttoken": lambda x: x[-1],
    }
    assert formulas.keys() == POOLINGS.keys()
    found = pool(tuple(formulas), hidden, torch.tensor(lengths))
    wanted = torch.stack([torch.cat([formula(x) for formula in formulas.values()]) for x in texts])
    torch.testing.assert_close(found, wanted)


def test_an_old_folder_is_followed_unless_something_else_is_asked_for(tiny: Path, tmp_path: Path) -> None:
    prompts = {"prompts": {"query": "question: ", "none": ""}, "default_prompt_name": "query"}
    settings = {"max_seq_length": 9, "do_lower_case": True}
    made = folder(tiny, tmp_path, sentence_bert_config=settings, config_sentence_transformers=prompts)
    encoder = Encoder(made, device="cpu")
    assert (encoder.poolings, encoder.normalize, encoder.max_length) == (("cls",), True, 9)
    asked = [f"question: {text}" for text in TEXTS]
    wanted = plain_embeddings(tiny, asked, "cls", max_length=9)
    np.testing.assert_allclose(encoder(TEXTS), wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=2e-6)
    other = Encoder(made, pooling="mean", normalize=False, max_length=12, prompt="", device="cpu")
    np.testing.assert_allclose(other(TEXTS), plain_embeddings(tiny, TEXTS, max_length=12), atol=2e-6)
    assert Encoder(made, prompt_name="none", device="cpu").prompt == ""
    assert encoder.settings()["prompt"] == "question: "


def test_poolings_side_by_side_are_wider(tiny: Path, tmp_path: Path) -> None:
    both = {"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}
    encoder = Encoder(folder(tiny, tmp_path, **{"1_Pooling__config": both}), device="cpu", normalize=False)
    assert encoder.hidden == 64
    found = encoder(TEXTS)
    for place, name in enumerate(("cls", "max")):
        alone = Encoder(tiny, pooling=name, device="cpu")(TEXTS)
        np.testing.assert_allclose(found[:, 32 * place : 32 * (place + 1)], alone, atol=2e-6)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules": [*MODULES, {"idx": 3, "path": "3", "type": "sentence_transformers.models.Dense"}]},
         "by Transformer, Pooling, Normalize, Dense, of which encode can do Transformer, Pooling and Normalize only: "
         "embed by sentence-transformers itself, after fastbert.fuse"),
        ({"modules": [{"idx": 0, "path": "", "type": "custom.Transformer"}, *MODULES[:1]]}, "by custom.Transformer"),
        ({"modules": MODULES[1:2]}, "by Transformer, of which"),
        ({"modules": {"a": 1}}, "modules.json of .* is no list of modules"),
        ({"modules": [{**MODULES[1], "path": "0_Transformer"}, MODULES[0]]}, "has its model in '0_Transformer'"),
        ({"1_Pooling__config": {"pooling_mode": "attention"}}, "asks for pooling 'attention': encode knows mean, cls"),
        ({"1_Pooling__config": [1]}, "has no 1_Pooling/config.json"),
        ({"2_Normalize__config": {"module_input_name": "token_embeddings"}}, "module_input_name is 'token_embeddings'"),
        ({"sentence_bert_config": {"max_seq_length": "9"}}, "max_seq_length is '9', not a whole number"),
        ({"sentence_bert_config": {"transformer_task": "fill-mask"}}, "transformer_task is 'fill-mask', which encode"),
        ({"config_sentence_transformers": {"model_type": "SparseEncoder"}}, "model_type is 'SparseEncoder'"),
        ({"config_sentence_transformers": {"default_prompt_name": "a"}}, "has no prompt 'a', which its default"),
        ({"1_Pooling__config": {"include_prompt": False},
          "config_sentence_transformers": {"prompts": {"a": "b"}, "default_prompt_name": "a"}},
         "leaves the tokens of its prompt out"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_an_error(tiny: Path, tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Encoder(folder(tiny, tmp_path, **files), device="cpu")


def test_a_name_on_the_hub_is_asked_for_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    from fastbert.encode.recipe import Recipe, read_recipe

    def raises(error: Exception) -> None:
        def download(*args: Any) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)

    raises(errors.EntryNotFoundError("404"))
    assert read_recipe("someone/model") == Recipe()
    raises(errors.LocalEntryNotFoundError("offline"))
    with pytest.raises(InputError, match="cannot see whether 'someone/model' has a modules"):
        read_recipe("someone/model")

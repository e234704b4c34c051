"""The ways to a fused encoder of any family: auto classes, and `fuse` on whatever holds one."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import assert_close, randomize
from torch import nn

import fastbert
from fastbert.families import HEADS, MODEL_TYPES, MODELS
from fastbert.modules.swap import is_ours

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60,
    "max_position_embeddings": 40,
}  # fmt: skip


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = torch.randint(4, 60, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    return ids.masked_fill(mask == 0, 1), mask


def config_of(model_type: str) -> Any:
    return transformers.AutoConfig.for_model(model_type, **SIZES, pad_token_id=1)


@pytest.mark.parametrize("theirs", [*MODELS, *HEADS], ids=lambda kind: kind.__name__)
def test_each_class_is_fastberts_under_its_name(theirs: type[Any]) -> None:
    ours = getattr(fastbert, theirs.__name__)
    assert issubclass(ours, theirs)
    assert ours.__name__ == theirs.__name__
    assert theirs.__name__ in fastbert.__all__


AUTO = [name for name in fastbert.__all__ if name.startswith("AutoModel")]


#: Each family with one of them, and each of them with one family.
WAYS = [("AutoModelForSequenceClassification", model_type) for model_type in MODEL_TYPES]
WAYS += [(name, "bert") for name in AUTO if name != "AutoModelForSequenceClassification"]


@pytest.mark.parametrize(("name", "model_type"), WAYS)
def test_auto_classes_give_the_familys(name: str, model_type: str) -> None:
    theirs = getattr(transformers, name)
    config = config_of(model_type)
    model = getattr(fastbert, name).from_config(config, packing=False)
    assert type(model) is getattr(fastbert, type(theirs.from_config(config)).__name__)
    assert fastbert.explain(model).fused
    assert model.base_model.packing is False


def test_auto_class_opens_a_checkpoint(tmp_path: Path) -> None:
    plain = transformers.AutoModel.from_config(config_of("xlm-roberta")).eval()
    plain.save_pretrained(tmp_path)
    opened = fastbert.AutoModel.from_pretrained(tmp_path)
    assert type(opened) is fastbert.XLMRobertaModel
    ids, mask = batch()
    with torch.no_grad():
        assert_close(opened(ids, mask).last_hidden_state, plain(ids, mask).last_hidden_state)


def test_architecture_of_no_family() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.AlbertConfig(vocab_size=30, embedding_size=8, **sizes)
    known = "|".join(MODEL_TYPES)
    with pytest.raises(ValueError, match=f"AlbertModel holds no encoder that fastbert fuses.*({known})"):
        fastbert.AutoModel.from_config(config)


def _two_towers() -> nn.Module:
    image = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        image, config_of("roberta"), projection_dim=8
    )
    return transformers.VisionTextDualEncoderModel(config)


def _encoder_decoder() -> nn.Module:
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(config_of("roberta"), config_of("bert"))
    model = transformers.EncoderDecoderModel(config)
    model.config.decoder_start_token_id, model.config.pad_token_id = 2, 1
    return model


HOLDERS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Any, Any], Any], list[str]]] = {
    "DPR": (
        lambda: transformers.DPRQuestionEncoder(transformers.DPRConfig(**SIZES)),
        lambda model, ids, mask: model(ids, mask).pooler_output,
        ["BertModel"],
    ),
    "an image and a text encoder": (
        _two_towers,
        lambda model, ids, mask: (
            model(input_ids=ids, attention_mask=mask, pixel_values=torch.ones(3, 3, 8, 8)).logits_per_text
        ),
        ["RobertaModel"],
    ),
    "an encoder and a decoder": (
        _encoder_decoder,
        lambda model, ids, mask: model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids).logits,
        ["RobertaModel"],
    ),
    "two encoders": (
        lambda: nn.ModuleDict(
            {name: transformers.AutoModel.from_config(config_of(name)) for name in ("mpnet", "distilbert")}
        ),
        lambda model, ids, mask: torch.stack([each(ids, mask).last_hidden_state for each in model.values()]),
        ["MPNetModel", "DistilBertModel"],
    ),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_fuse_finds_encoders_inside_anything(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, call, found = HOLDERS[name]
    plain = make().eval()
    randomize(plain)
    with caplog.at_level("INFO", "fastbert"):
        fused = fastbert.fuse(copy.deepcopy(plain))
    assert all(f"{kind} in " in caplog.text for kind in found)
    several = sum(isinstance(module, MODELS) for module in fused.modules()) > 1  # the decoder is one too
    assert several == ("found: " in str(fastbert.explain(fused)))
    inside = [type(module).__name__ for module in fused.modules() if isinstance(module, MODELS) and is_ours(module)]
    assert inside == found
    ids, mask = batch()
    with torch.no_grad():
        assert_close(call(fused, ids, mask), call(plain, ids, mask))
        fastbert.unfuse(fused)
        assert torch.equal(call(fused, ids, mask), call(plain, ids, mask))


def _row(model: type[Any]) -> str:
    """A family's row in README: its name in configurations, its model, and the heads beside those that all have."""
    own = [head.__name__ for head in HEADS if head.config_class is model.config_class]
    start = model.__name__.removesuffix("Model")
    more = sorted(name.removeprefix(start) for name in own if not name.endswith(COMMON))
    return (
        f"| `{model.config_class.model_type}` | `{model.__name__}` | {', '.join(f'`{end}`' for end in more) or '-'} |"
    )


#: The heads that every family has.
COMMON = (
    "ForMaskedLM", "ForSequenceClassification", "ForMultipleChoice", "ForTokenClassification", "ForQuestionAnswering",
)  # fmt: skip


def test_readme_names_every_family() -> None:
    page = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    _, table = page.split("<!-- families:begin -->\n")
    table, _ = table.split("<!-- families:end -->")
    heading = "| family | model | heads beside the five that all have |\n|---|---|---|\n"
    assert table == heading + "".join(f"{_row(model)}\n" for model in MODELS), "put this table into README.md"
    for model in MODELS:
        heads = [head.__name__ for head in HEADS if head.config_class is model.config_class]
        assert all(any(name.endswith(end) for name in heads) for end in COMMON)

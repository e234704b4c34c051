"""Who looks at attention: bertviz renders our maps; captum attributes through our layers."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer

import fastbert

TEXT = "The keeper of the clocks would not be paid."


@pytest.fixture
def looked_at(checkpoint: Path) -> tuple[tuple[torch.Tensor, ...], list[str]]:
    """The maps and the tokens of a sentence."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    batch = tokenizer(TEXT, return_tensors="pt")
    with torch.inference_mode():
        attentions = fastbert.BertModel.from_pretrained(checkpoint)(**batch, output_attentions=True).attentions
    return attentions, tokenizer.convert_ids_to_tokens(batch["input_ids"][0])


def shown(page: str) -> dict[str, Any]:
    """What a page's script is given."""
    (found,) = re.findall(r"const params = (\{.*\});", page)
    return json.loads(found)


@pytest.mark.parametrize("view", ["head_view", "model_view"])
def test_bertviz_takes_our_outputs(looked_at: tuple[Any, list[str]], view: str) -> None:
    bertviz = pytest.importorskip("bertviz", reason="pip install bertviz")
    attentions, tokens = looked_at
    params = shown(getattr(bertviz, view)(attentions, tokens, html_action="return").data)
    torch.testing.assert_close(torch.tensor(params["attention"][0]["attn"]), torch.cat(attentions))
    some = [attentions[0], None, attentions[2], *[None] * 3]  # as output_attentions=[0, 2] gives them
    params = shown(getattr(bertviz, view)(some, tokens, include_layers=[0, 2], html_action="return").data)
    torch.testing.assert_close(torch.tensor(params["attention"][0]["attn"]), torch.cat([attentions[0], attentions[2]]))


def test_captum_attributes_as_with_hugging_face(checkpoint: Path) -> None:
    attr = pytest.importorskip("captum.attr", reason="needs `make test-all`")
    theirs = transformers.BertForSequenceClassification.from_pretrained(checkpoint, attn_implementation="eager").eval()
    with torch.no_grad():
        theirs.classifier.weight.normal_()  # a head whose answer depends on the text
    ours = fastbert.fuse(copy.deepcopy(theirs))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    batch = tokenizer([TEXT, "Rain is falling."], padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    special = (ids == tokenizer.cls_token_id) | (ids == tokenizer.sep_token_id)
    baseline = torch.where(special, ids, tokenizer.pad_token_id)

    def attributed(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        def logit(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return model(ids, attention_mask=mask).logits[:, 1]

        gradients = attr.LayerIntegratedGradients(logit, model.bert.embeddings)
        return gradients.attribute(
            ids, baseline, additional_forward_args=(mask,), n_steps=24, return_convergence_delta=True
        )

    their_shares, their_delta = attributed(theirs)
    our_shares, our_delta = attributed(ours)
    print(f"convergence delta: fastbert {our_delta.tolist()}, Hugging Face {their_delta.tolist()}")
    assert fastbert.explain(ours).fused
    where = mask.bool()
    assert their_shares[where].abs().max() > 0.1
    torch.testing.assert_close(our_shares[where], their_shares[where], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(our_delta, their_delta, atol=1e-3, rtol=1e-3)

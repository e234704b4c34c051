"""Who looks at attention: bertviz renders our maps, in a real browser too; captum attributes through our layers."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

import fastbert
from fastbert.cli import app
from fastbert.maps.page import attention_page

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
    bertviz = pytest.importorskip("bertviz", reason="pip install 'fastbert[viz]'")
    attentions, tokens = looked_at
    params = shown(getattr(bertviz, view)(attentions, tokens, html_action="return").data)
    torch.testing.assert_close(torch.tensor(params["attention"][0]["attn"]), torch.cat(attentions))
    some = [attentions[0], None, attentions[2], *[None] * 3]  # as output_attentions=[0, 2] gives them
    params = shown(getattr(bertviz, view)(some, tokens, include_layers=[0, 2], html_action="return").data)
    torch.testing.assert_close(torch.tensor(params["attention"][0]["attn"]), torch.cat([attentions[0], attentions[2]]))


def test_a_page_holds_the_maps_and_needs_no_network(looked_at: tuple[Any, list[str]], tmp_path: Path) -> None:
    pytest.importorskip("bertviz", reason="pip install 'fastbert[viz]'")
    attentions, tokens = looked_at
    page = attention_page(attentions, tokens, tmp_path / "new" / "a.html", title="a < b").read_text()
    params = shown(page)
    torch.testing.assert_close(torch.tensor(params["attention"][0]["attn"]), torch.cat(attentions), atol=5.1e-5, rtol=0)
    assert params["attention"][0]["left_text"] == tokens
    assert "<title>a &lt; b</title>" in page
    assert not re.search(r"<(script|link)[^>]*(src|href)=", page)
    for maps, words, view, message in (
        (attentions, tokens, "neuron", "unknown view 'neuron': choose from head, model"),
        ([None], tokens, "head", "no attention maps"),
        (attentions, tokens[:-1], "head", r"attentions\[0\] has shape \(1, 12, 12, 12\): 11 tokens"),
        ([torch.zeros(1, 12, 700, 700)], ["a"] * 700, "head", "5,880,000 probabilities are more"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_page(maps, words, tmp_path / "b.html", view=view)
    assert not (tmp_path / "b.html").exists()


def attend(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["attend", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.mark.parametrize("out", ["a.html", "a.png"])
def test_attend_writes_pages_and_pictures(tiny: Path, tmp_path: Path, out: str) -> None:
    pytest.importorskip("bertviz", reason="pip install 'fastbert[viz]'")
    result = attend(TEXT, "--model", tiny, "--out", tmp_path / out, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "12 tokens" in result.stdout
    if out.endswith("png"):
        assert (tmp_path / out).read_bytes().startswith(b"\x89PNG")
        return
    assert len(shown((tmp_path / out).read_text())["attention"][0]["attn"]) == 2
    result = attend(TEXT, "--model", tiny, "--out", tmp_path / out, "--layer", "1", "--view", "model")
    assert result.exit_code == 0, result.output
    params = shown((tmp_path / out).read_text())
    assert params["include_layers"] == [1]
    assert len(params["attention"][0]["attn"]) == 1


def test_what_attend_cannot_show(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("bertviz", reason="pip install 'fastbert[viz]'")
    page = tmp_path / "a.html"
    for arguments, message in (
        ([TEXT, "--out", tmp_path / "a.svg"], "let its name end in .html or .png"),
        ([" ", "--out", page], "is empty"),
        ([TEXT, "--out", page, "--view", "neuron"], "unknown view 'neuron': choose from head, model"),
        ([TEXT, "--out", page, "--layer", "0", "--layer", "2"], "no layer 2: this model has 0 to 1"),
        ([TEXT, "--out", page, "--device", "tpu"], "unknown device 'tpu'"),
    ):
        result = attend(*arguments, "--model", tiny)
        assert result.exit_code == 2, result.output
        assert message in result.stderr
    assert not page.exists()


@pytest.mark.slow
@pytest.mark.parametrize("view", ["head", "model"])
def test_a_browser_draws_the_page(
    looked_at: tuple[Any, list[str]], browser: Callable[[Path], str], tmp_path: Path, view: str
) -> None:
    pytest.importorskip("bertviz", reason="pip install 'fastbert[viz]'")
    attentions, tokens = looked_at
    drawn = browser(attention_page(attentions, tokens, tmp_path / "a.html", view=view))
    assert drawn.count("<line") >= len(tokens) ** 2
    if view == "head":
        assert all(f">{token}</text>" in drawn for token in tokens)
        assert len(re.findall(r"<option[^>]*>\d+</option>", drawn)) == 6


def test_captum_attributes_as_with_hugging_face(checkpoint: Path) -> None:
    attr = pytest.importorskip("captum.attr", reason="pip install 'fastbert[integrations]'")
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

"""Attention maps as a page: it holds the maps, stays small, says how to be read, and runs nothing of a text."""

import base64
import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastbert.maps import page
from fastbert.maps.page import attention_page

#: Tokens that end a script, run as one, or begin a comment in it, where they are not escaped.
HOSTILE = [
    "</script><script>document.title='run'</script>",
    "<img/src=x/onerror=document.title='run'>",
    "<!--<script>",
    '"};document.title=`run`;//',
    "const data = {};",
    "\N{LINE SEPARATOR}&lt;&",
]


def maps(layers: int = 3, heads: int = 2, seq: int = 7) -> list[torch.Tensor]:
    return [torch.softmax(3 * torch.randn(2, heads, seq, seq), dim=-1) for _ in range(layers)]


def held(written: Path) -> tuple[dict[str, Any], torch.Tensor]:
    """What a page's script is given; and its probabilities (layers, heads, seq, seq), 0 where it has none."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*)</script>', written.read_text())
    data = json.loads(found)
    keys, values = (np.frombuffer(base64.b64decode(data[name]), "<u2") for name in ("keys", "values"))
    seq = len(data["tokens"])
    shape = (len(data["layers"]), len(data["heads"]), seq, data["kept"])
    whole = torch.zeros(*shape[:3], seq)
    where = torch.from_numpy(keys.astype(np.int64).reshape(shape))
    return data, whole.scatter(3, where, torch.from_numpy(values.astype(np.float32).reshape(shape) / 65535))


def test_a_page_holds_the_maps_and_needs_no_network(tmp_path: Path) -> None:
    attentions = maps()
    written = attention_page(attentions, list("abcde"), tmp_path / "new" / "a.html", text="a < b", title="c < d")
    data, found = held(written)
    assert (data["tokens"], data["layers"], data["heads"]) == (list("abcde"), [0, 1, 2], [0, 1])
    wanted = torch.stack([layer[0, :, :5, :5] for layer in attentions])
    torch.testing.assert_close(found, wanted, atol=8e-6, rtol=0)
    content = written.read_text()
    assert "<title>c &lt; d</title>" in content
    assert "<q>a &lt; b</q>" in content
    assert "On the left stand the queries" in content
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=|https?://(?!www.w3.org/)", content)


def test_layers_heads_and_sentences_are_chosen(tmp_path: Path) -> None:
    attentions = maps()
    chosen = [None, attentions[1], None]
    data, found = held(attention_page(chosen, list("abcdefg"), tmp_path / "a.html", heads=[1], sentence=1))
    assert (data["layers"], data["heads"]) == ([1], [1])
    torch.testing.assert_close(found[0, 0], attentions[1][1, 1], atol=8e-6, rtol=0)


def test_a_long_text_makes_a_small_page_of_its_strongest_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attentions = maps(layers=2, seq=40)
    monkeypatch.setattr(page, "PROBABILITIES", 2 * 2 * 40 * 10)
    written = attention_page(attentions, ["a"] * 40, tmp_path / "a.html", text="word " * 200)
    data, found = held(written)
    assert data["kept"] == 10
    wanted = torch.stack([layer[0] for layer in attentions])
    wanted = torch.where(wanted >= wanted.topk(10).values[..., -1:], wanted, 0.0)
    torch.testing.assert_close(found, wanted, atol=8e-6, rtol=0)
    assert "of each query its 10 strongest keys are shown" in written.read_text()
    assert "<details>" in written.read_text()


@pytest.mark.parametrize(
    ("attentions", "tokens", "heads", "message"),
    [
        ([None], ["a"], None, "nothing to show"),
        (maps(), ["a"] * 8, None, "with 8 tokens"),
        (maps(), ["a"], [1, 2], "no head 2: layer 0 has 0 to 1"),
        ([*maps(1, 2), *maps(1, 3)], ["a"], None, r"these have \[2, 3\]"),
    ],
)
def test_what_cannot_be_shown(tmp_path: Path, attentions: Any, tokens: Any, heads: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_page(attentions, tokens, tmp_path / "a.html", heads=heads)
    assert not (tmp_path / "a.html").exists()


def test_a_browser_shows_hostile_tokens_and_runs_none(browser: Callable[[Path], str], tmp_path: Path) -> None:
    title = "<script>document.title='run'</script>"
    attentions = [torch.full((1, 2, 6, 6), 1 / 6) for _ in range(3)]
    drawn = browser(attention_page(attentions, HOSTILE, tmp_path / "a.html", text=title, title=title))
    assert re.findall("<title>(.*?)</title>", drawn)[0] == html.escape(title, quote=False)
    assert "<img" not in drawn
    assert drawn.count("<line") == len(HOSTILE) ** 2
    shown = [token if len(token) <= 26 else f"{token[:25]}\N{HORIZONTAL ELLIPSIS}" for token in HOSTILE]
    assert all(drawn.count(f">{html.escape(token, quote=False)}</text>") == 2 for token in shown)
    assert drawn.count("<canvas") == 3 * 2
    assert re.findall(r"<option[^>]*>(.*?)</option>", drawn) == [*"012", *"01", "mean of all"]

"""Attention maps as a page: what a text holds is shown, and never run."""

import html
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastbert.maps.page import VIEWS, _escape, attention_page

#: Tokens that end a script, run as one, or begin a comment in it, where they are not escaped.
HOSTILE = [
    "</script><script>document.title='run'</script>",
    "<img/src=x/onerror=document.title='run'>",
    "<!--<script>",
    '"};document.title=`run`;//',
    "const params = {};",
    "\N{LINE SEPARATOR}&lt;&",
    "<script src='https://example.org/require.js'></script>",
]


def test_data_cannot_leave_its_place_in_a_script() -> None:
    data = json.dumps({"left_text": HOSTILE})
    page = _escape(f"<b></b>\n    const params = {data}; // HACK: {data} is replaced\n    const more = 1;\n")
    (found,) = re.findall(r"const params = (.*);\n", page)
    assert json.loads(found) == {"left_text": HOSTILE}
    assert not re.search("[<>&]", found)
    assert page == f"<b></b>\n    const params = {found};\n    const more = 1;\n"


def test_a_page_of_another_make_is_refused() -> None:
    with pytest.raises(ValueError, match="bertviz's page has no 'const params = '"):
        _escape("<script>let params = {}</script>")


@pytest.mark.parametrize("view", list(VIEWS))
def test_a_browser_shows_hostile_tokens_and_runs_none(
    browser: Callable[[Path], str], tmp_path: Path, view: str
) -> None:
    pytest.importorskip("bertviz", reason="pip install 'fastbert[viz]'")
    maps = [torch.rand(1, 2, len(HOSTILE), len(HOSTILE)) for _ in range(2)]
    title = "<script>document.title='run'</script>"
    drawn = browser(attention_page(maps, HOSTILE, tmp_path / "a.html", view=view, title=title))
    assert re.findall("<title>(.*?)</title>", drawn) == [html.escape(title, quote=False)]
    assert "<img" not in drawn
    assert drawn.count("<line") >= len(HOSTILE) ** 2
    if view == "head":  # the other writes tokens when a thumbnail is clicked
        assert all(f">{html.escape(token, quote=False)}</text>" in drawn for token in HOSTILE)

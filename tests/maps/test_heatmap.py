"""Attention maps as a PNG: every layer and head is on it, and what cannot be drawn says so."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image

from fastbert.maps.heatmap import _Grid, attention_heatmap


def maps(layers: int = 2, heads: int = 3, seq: int = 6) -> list[torch.Tensor]:
    return [torch.softmax(3 * torch.randn(2, heads, seq, seq), dim=-1) for _ in range(layers)]


def pixels(path: Path) -> np.ndarray:
    return image.imread(path)[..., :3]


def test_picture_has_size_and_colour(tmp_path: Path) -> None:
    path = attention_heatmap(maps(), list("abcdef"), tmp_path / "new" / "maps.png")
    drawn = pixels(path)
    assert drawn.shape[0] > 250
    assert drawn.shape[1] > 400
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 50


def test_each_sentence_has_its_own_picture_and_padding_is_not_drawn(tmp_path: Path) -> None:
    attentions = maps()
    first = pixels(attention_heatmap(attentions, list("abcd"), tmp_path / "0.png"))
    second = pixels(attention_heatmap(attentions, list("abcd"), tmp_path / "1.png", sentence=1))
    assert not np.array_equal(first, second)
    for layer in attentions:
        layer[:, :, 4:] = layer[:, :, :, 4:] = 1.0
    assert np.array_equal(first, pixels(attention_heatmap(attentions, list("abcd"), tmp_path / "2.png")))


def test_layers_not_selected_are_left_out(tmp_path: Path) -> None:
    attentions = maps(layers=3)
    whole = pixels(attention_heatmap(attentions, list("abcdef"), tmp_path / "whole.png"))
    part = pixels(attention_heatmap([attentions[0], None, attentions[2]], list("abcdef"), tmp_path / "part.png"))
    assert part.shape[0] < whole.shape[0]
    assert part.shape[1] == whole.shape[1]


def test_long_sentence_stays_within_a_page(tmp_path: Path) -> None:
    drawn = pixels(attention_heatmap(maps(1, 2, 300), ["token"] * 300, tmp_path / "long.png"))
    assert drawn.shape[0] < 700


@pytest.mark.parametrize(
    ("attentions", "tokens", "sentence", "message"),
    [
        ([], ["a"], 0, "nothing to show"),
        ([None], ["a"], 0, "nothing to show"),
        (maps(), [], 0, "nothing to show"),
        (maps(), ["a"] * 7, 0, "with 7 tokens"),
        (maps(), ["a"], 2, "showing sentence 2"),
        ([torch.zeros(3, 4, 4)], ["a"], 0, r"shape \(3, 4, 4\)"),
    ],
)
def test_what_cannot_be_drawn(
    tmp_path: Path, attentions: list[torch.Tensor], tokens: list[str], sentence: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        attention_heatmap(attentions, tokens, tmp_path / "x.png", sentence=sentence)


def test_dollars_are_tokens_and_no_formula(tmp_path: Path) -> None:
    attention_heatmap(maps(seq=2), ["$\\frac$", "$"], tmp_path / "x.png", title="$\\frac$")


def test_tokens_are_named_as_far_as_names_can_be_read(tmp_path: Path) -> None:
    for layers, heads, length, named in ((6, 12, 29, True), (6, 12, 30, False), (1, 1, 350, True), (1, 1, 360, False)):
        grid = _Grid.of({i: torch.zeros(heads, length, length) for i in range(layers)}, ["token"] * length)
        assert grid.labelled == named
        assert grid.panel >= length * 0.11 or not named
        assert grid.width < 45
    one = pixels(attention_heatmap(maps(2, 3, 40), ["token"] * 40, tmp_path / "one.png", heads=[1]))
    assert one.shape[1] < pixels(attention_heatmap(maps(2, 3, 40), ["token"] * 40, tmp_path / "all.png")).shape[1] / 2

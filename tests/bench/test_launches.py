"""Kernel launches per layer, which decide small batches."""

import pytest
import torch

from bench.launches import count


@pytest.mark.skipif(torch.cuda.is_available(), reason="counted through the interpreter")
def test_launches_per_layer() -> None:
    forward, backward = count("fastbert")
    assert forward.total() == 8, forward
    assert backward.total() == 14, backward
    assert forward["attention_forward"] == 1
    assert backward["attention_backward_dq"] == 1


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="counted through the interpreter")
def test_launches_per_layer_with_the_activation_inside_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastbert.modules.layer.feed_forward_is_fused", lambda x, weight, activation: True)
    forward, backward = count("fastbert")
    assert forward.total() == 7, forward
    assert backward.total() == 13, backward
    assert forward["feed_forward_forward"] == 1
    assert backward["feed_forward_backward"] == 1
    assert "bias_activation_forward" not in forward


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="counted through the interpreter")
def test_launches_per_layer_with_attentions() -> None:
    forward, backward = count("fastbert", maps=True)
    assert forward.total() == 8, forward  # the map is written by the same kernel
    assert backward.total() == 18, backward  # and one product of batches, whose factors are copied, for its gradient
    assert backward["attention_backward_dq"] == 1


def test_the_count_sees_hugging_faces_launches() -> None:
    forward, backward = count("eager")
    assert forward.total() >= 20
    assert forward["addmm"] == 6
    assert backward["mm"] == 12

"""What a layer is found to be is cached, and found anew when anything there has changed."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import ids, pair
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from fastbert.modules.look import look_at


def _replace(path: str, module: nn.Module) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        owner, _, name = path.rpartition(".")
        setattr(layer.get_submodule(owner), name, module)

    return change


def _set(path: str, name: str, value: Any) -> Callable[[Any], None]:
    return lambda layer: setattr(layer.get_submodule(path), name, value)


class OwnLinear(nn.Linear):
    """A Linear that has to be called."""


def _retype(layer: Any) -> None:
    layer.output.dense.__class__ = OwnLinear


def _new_data(path: str) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        weight = layer.get_submodule(path).weight
        weight.data = weight.data.clone()

    return change


def _new_parameter(layer: Any) -> None:
    layer.intermediate.dense.weight = nn.Parameter(layer.intermediate.dense.weight.detach().clone())


CHANGES: dict[str, Callable[[Any], Any]] = {
    "forward hook": lambda layer: layer.attention.self.query.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda layer: layer.output.LayerNorm.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda layer: layer.intermediate.dense.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda layer: layer.attention.register_full_backward_pre_hook(lambda *_: None),
    "forward replaced": _set("attention.output.dense", "forward", lambda x: x),
    "chunk replaced": _set("", "feed_forward_chunk", lambda x: x),
    "chunk size": _set("", "chunk_size_feed_forward", 4),
    "module replaced": _replace("attention.self.key", nn.Linear(32, 32)),
    "activation replaced": _replace("intermediate.intermediate_act_fn", nn.ReLU()),
    "class changed": _retype,
    "parameter replaced": _new_parameter,
    "bias removed": _set("output.dense", "bias", None),
    "data of a projection": _new_data("attention.self.value"),
    "dropout's p": _set("output.dropout", "p", 0.3),
    "dropout's mode": _set("attention.output.dropout", "training", True),
    "attention's mode": _set("attention.self", "training", True),
    "eps": _set("attention.output.LayerNorm", "eps", 1e-3),
    "scaling": _set("attention.self", "scaling", 0.5),
    "heads": _set("attention.self", "num_attention_heads", 2),
    "stream": _set("output", "dropout_stream", 99),
    "watcher": _set("attention.self", "watcher", lambda *_: None),
    "decoder": _set("attention.self", "is_decoder", True),
    "half precision": lambda layer: layer.half(),
    "frozen class of a parameter": lambda layer: setattr(layer.output.dense.weight, "__class__", OwnParameter),
}


class OwnParameter(nn.Parameter):
    """A parameter that may not be read."""


@pytest.mark.parametrize("name", CHANGES)
def test_every_kind_of_change_is_seen(name: str) -> None:
    _, fused = pair()
    layer = fused.encoder.layer[1]
    before = look_at(layer)
    assert before.whole
    assert look_at(layer) is before  # while nothing changes
    CHANGES[name](layer)
    assert look_at(layer) is not before


def test_a_global_hook_is_seen() -> None:
    _, fused = pair()
    layer = fused.encoder.layer[0]
    before = look_at(layer)
    handle = register_module_forward_hook(lambda *_: None)
    try:
        assert look_at(layer) is not before
    finally:
        handle.remove()


def test_values_in_place_change_nothing_of_it() -> None:
    _, fused = pair()
    layer = fused.encoder.layer[0]
    before = look_at(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2.0)
    assert look_at(layer) is before
    assert before.attention["qkv_weight"][:32].equal(layer.attention.self.query.weight)


def test_a_look_made_in_inference_mode_is_not_kept_for_training(device: torch.device) -> None:
    _, fused = pair(device)
    layer = fused.encoder.layer[0]
    with torch.inference_mode():
        before = look_at(layer)
    assert look_at(layer) is not before
    assert not look_at(layer).attention["qkv_weight"].is_inference()


def test_copies_look_for_themselves() -> None:
    _, fused = pair()
    layer = fused.encoder.layer[0]
    look_at(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert look_at(other) is not look_at(layer)
        assert look_at(other).attention["weight"] is other.attention.output.dense.weight


def test_a_saved_look_is_none(device: torch.device) -> None:
    _, fused = pair(device)
    fused(ids(device=device))
    look_at(fused.encoder.layer[0])
    assert pickle.loads(pickle.dumps(fused.encoder.layer[0])).__dict__["_look"] is None

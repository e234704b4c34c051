"""Devices: GPUs that run no kernel, models on several, and tensors without memory."""

import contextlib
import copy
import sys
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from models import ids, mask_of, pair, tiny_config
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import fastbert
from fastbert.graphs.recording import why_not_here
from fastbert_kernels import backend, uses_triton
from fastbert_kernels.backend import why_no_kernels


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, the first older than any that kernels are compiled for; nobody has asked for them yet."""
    monkeypatch.setattr(sys.modules[why_no_kernels.__module__], "_kernelless", {})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(7, 5), (8, 0)][index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["Tesla T4", "A100"][index])


def on_gpu(index: int) -> Any:
    return Mock(is_cuda=True, get_device=lambda: index, device=torch.device("cuda", index), dtype=torch.float32)


T4 = "Tesla T4 has compute capability 7.5, and kernels need 8.0 or more"


@pytest.mark.usefixtures("gpus")
def test_an_old_gpu_runs_plain_pytorch_and_this_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with backend("auto"):
        assert [uses_triton(on_gpu(index)) for index in (0, 1, 0)] == [False, True, False]
    assert [record.message for record in caplog.records] == [f"fastbert: plain PyTorch runs on cuda:0: {T4}"]


@pytest.mark.usefixtures("gpus")
def test_kernels_on_an_old_gpu_are_an_error() -> None:
    with backend("triton"):
        assert uses_triton(on_gpu(1))
        with pytest.raises(RuntimeError, match=rf"FASTBERT_BACKEND=triton cannot run on cuda:0: {T4}; use"):
            uses_triton(on_gpu(0))


@pytest.mark.usefixtures("gpus")
def test_an_old_gpu_replays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with backend("auto"):
        assert why_not_here(torch.device("cuda", 0)) == f"plain PyTorch makes the GPU wait: {T4}"
        assert why_not_here(torch.device("cuda", 1)) is None


@pytest.mark.usefixtures("gpus")
def test_an_amd_gpu_has_capabilities_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with backend("auto"):
        assert uses_triton(on_gpu(0))


@pytest.mark.usefixtures("gpus")
def test_a_compiled_graph_asks_which_gpus_run_kernels_while_it_is_traced() -> None:
    def on_the_first(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if why_no_kernels(0) else x

    compiled = torch.compile(on_the_first, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))


class Devices(TorchFunctionMode):
    """Pretends that tensors are on several GPUs: each says on which, and no function takes tensors of two."""

    def __init__(self) -> None:
        super().__init__()
        self.current = [0]  # where modules run, the innermost last

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__:
            return torch.device("cuda", getattr(args[0], "place", self.current[-1]))
        asked = kwargs.get("device", args[1] if func is torch.Tensor.to else None)
        if isinstance(asked, int | torch.device):
            place = asked if isinstance(asked, int) else asked.index
            if func is torch.Tensor.to:
                return args[0] if args[0].place == place else placed(args[0].clone(), place)
            return placed(func(*args, **kwargs | {"device": "cpu"}), place)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim() > 0]
        places = {x.place for x in tensors if hasattr(x, "place")}
        assert len(places) <= 1, f"{func.__name__} has tensors on {places}"
        result = func(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and not hasattr(x, "place"):
                placed(x, *(places or self.current[-1:]))
        return result


def placed(x: torch.Tensor, place: int) -> torch.Tensor:
    x.place = place  # type: ignore[attr-defined]
    return x


class OnDevice(AlignDevicesHook):
    """accelerate's hook, which moves what enters a module, on a device that is pretended."""

    def __init__(self, place: int, devices: Devices, **kwargs: Any) -> None:
        super().__init__(execution_device=place, **kwargs)
        self.place, self.devices = place, devices

    def init_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        for x in (*module.parameters(), *module.buffers()):
            placed(x, self.place)
        return module

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.devices.current.append(self.place)
        return super().pre_forward(module, *args, **kwargs)

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        self.devices.current.pop()
        return super().post_forward(module, output)


def spread(model: torch.nn.Module, bert: Any, devices: Devices) -> None:
    """Put the embeddings and the first layer on one device, all else on another, as a device_map does."""
    add_hook_to_module(model, OnDevice(0, devices, io_same_device=True))
    head = [module for module in model.children() if module is not bert]
    for module in (*head, bert.encoder.layer[1], bert.pooler):
        if module is not None:
            add_hook_to_module(module, OnDevice(1, devices))
    for module in (bert.embeddings, bert.encoder.layer[0]):
        add_hook_to_module(module, OnDevice(0, devices))


RAGGED = mask_of([11, 3, 7], 11)
CALLS: dict[str, dict[str, Any]] = {
    "no mask": {},
    "padding at the end": {"attention_mask": RAGGED},
    "padding at the start": {"attention_mask": RAGGED.flip(1)},
    "4-D mask": {"attention_mask": RAGGED[:, None, None, :].expand(3, 1, 11, 11).bool()},
    "head mask": {"attention_mask": RAGGED, "head_mask": torch.tensor([[1.0, 0.5, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0]])},
    "first rows": {"attention_mask": RAGGED, "read_rows": "first"},
}


@pytest.mark.parametrize("packing", [True, False, "auto"])
@pytest.mark.parametrize("call", CALLS)
def test_a_model_on_two_devices_gives_what_it_gives_on_one(call: str, packing: bool | str) -> None:
    _, model = pair(packing=packing)
    x, arguments = ids(), CALLS[call]
    for flags in ({}, {"output_attentions": True, "output_hidden_states": True}):
        want = model(x, **arguments, **flags)
        devices, apart = Devices(), copy.deepcopy(model)
        spread(apart, apart, devices)
        there = {name: placed(v.clone(), 0) if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
        with backend("torch"), devices:
            got = apart(placed(x.clone(), 0), **there, **flags)
        assert got.last_hidden_state.place == 0
        assert all(part.fused for part in fastbert.explain(apart).parts)
        for a, b in zip(tree_leaves(tuple(got.values())), tree_leaves(tuple(want.values())), strict=True):
            torch.testing.assert_close(a, b)
        got.last_hidden_state.sum().backward()
        assert apart.embeddings.word_embeddings.weight.grad is not None


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertForMaskedLM", "BertForQuestionAnswering"])
def test_a_head_on_another_device_than_the_embeddings(head: str) -> None:
    model = getattr(fastbert, head)(tiny_config(tie_word_embeddings=False)).eval()
    want = model(x := ids(), RAGGED)
    devices = Devices()
    spread(model, model.bert, devices)
    with backend("torch"), devices:
        got = model(placed(x, 0), attention_mask=placed(RAGGED.clone(), 0))
    torch.testing.assert_close(got[0], want[0])


def test_a_prefix_on_two_devices() -> None:
    _, model = pair()
    x, layers = ids(), torch.randn(2, 2, 3, 4, 5, 8)
    mask = torch.cat([torch.ones(3, 5, dtype=torch.long), RAGGED], 1)

    def cache(made: transformers.DynamicCache) -> transformers.DynamicCache:
        for layer, (key, value) in enumerate(layers):
            made.update(placed(key.clone(), 0), placed(value.clone(), 0), layer)
        return made

    want = model(x, mask, cache=cache(transformers.DynamicCache())).last_hidden_state
    devices = Devices()
    spread(model, model, devices)
    with backend("torch"), devices:
        got = model(placed(x, 0), placed(mask, 0), cache=cache(transformers.DynamicCache())).last_hidden_state
    torch.testing.assert_close(got, want)


def test_the_pretended_devices_are_seen() -> None:
    with Devices(), pytest.raises(AssertionError, match="add has tensors on"):
        torch.add(placed(torch.ones(2), 0), placed(torch.ones(2), 1))


HEADS = ["BertModel", "BertForMaskedLM", "BertForSequenceClassification", "BertForQuestionAnswering"]
MASKS = {"no mask": None, "2-D": (3, 11), "4-D": (3, 1, 11, 11)}


@pytest.mark.parametrize("kind", ["meta", "fake inputs", "fake model"])
@pytest.mark.parametrize("backend_name", ["auto", "torch", "triton"])
@pytest.mark.parametrize("head", HEADS)
def test_without_memory_shapes_are_eagers_and_gradients_flow(head: str, backend_name: str, kind: str) -> None:
    fake = contextlib.nullcontext() if kind == "meta" else FakeTensorMode(allow_non_fake_inputs=True)
    made_in = {"meta": torch.device("meta"), "fake inputs": contextlib.nullcontext(), "fake model": fake}[kind]
    plain = getattr(transformers, head)(tiny_config()).train()
    with made_in:
        fused = getattr(fastbert, head)(tiny_config()).train()
    flags = {"output_attentions": True, "output_hidden_states": True}
    for shape in MASKS.values():
        mask = None if shape is None else torch.ones(shape, dtype=torch.bool)
        for asked in ({}, flags):
            want = plain(ids(), mask, **asked)
            with fake, backend(backend_name):
                place = "meta" if kind == "meta" else "cpu"
                x = torch.ones(3, 11, dtype=torch.long, device=place)
                got = fused(x, None if mask is None else torch.ones(shape, dtype=torch.bool, device=place), **asked)
                got[0].sum().backward()
            shapes = [[t.shape for t in tree_leaves(tuple(out.values()))] for out in (got, want)]
            assert shapes[0] == shapes[1]

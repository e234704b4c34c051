"""Layers that are one step of autograd, or two, against Hugging Face's and against the same ops one by one."""

import contextlib
import functools
import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import assert_close, ids, mask_of, pair
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fastbert
from fastbert.batch import batch as batches
from fastbert.batch.layout import packed_layout
from fastbert.distill import capture
from fastbert.modules import layer
from fastbert_kernels import FeedForwardArguments, backend, block_passes, feed_forward_block

#: The attention block, and the feed-forward block. A layer that is one step is both.
BLOCKS = ("attention_block", "feed_forward_block")
Gradients = dict[str, torch.Tensor | None]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each block runs."""
    seen: Counter[str] = Counter()

    def count(name: str, *blocks: str) -> None:
        block = getattr(layer, name)

        def counted(*args: Any) -> Any:
            seen.update(blocks)
            return block(*args)

        monkeypatch.setattr(layer, name, counted)

    for name in BLOCKS:
        count(name, name)
    count("layer_block", *BLOCKS)
    return seen


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of autograd for each half of a layer."""
    monkeypatch.setattr(layer.FusedAttention, "block_arguments", lambda self: None)


@pytest.fixture(params=["cublas", "fused", pytest.param("halves", marks=pytest.mark.slow)])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the feed-forward block's first product has the activation inside."""
    if request.param == "halves":
        request.getfixturevalue("halves")
    monkeypatch.setattr(layer, "feed_forward_is_fused", lambda x, weight, activation: request.param == "fused")
    return request.param == "fused"


@contextlib.contextmanager
def one_by_one() -> Iterator[None]:
    """Run the ops of blocks one by one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "runs_as_block", lambda x: False)
        yield


def run(
    model: Any, device: torch.device, name: str, maps: bool = False, **inputs: Any
) -> tuple[torch.Tensor, Gradients]:
    """The last hidden state of a ragged batch, and the gradients of a fixed projection of it, and of the maps."""
    torch.manual_seed(3)
    x, mask = ids(3, 11, device), mask_of([11, 4, 7], 11, device)
    with backend(name):
        output = model(x, mask, output_attentions=maps, **inputs)
        real = mask.bool()
        read = [output.last_hidden_state[real]]
        if maps:
            read += [probs.transpose(1, 2)[real] for probs in output.attentions]
        loss = sum((part * torch.randn(part.shape, dtype=torch.float64).to(part)).sum() for part in read)
        parameters = {k: p for k, p in model.encoder.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return read[0].detach(), dict(zip(parameters, grads, strict=True))


def assert_equal_gradients(ours: Gradients, theirs: Gradients, atol: float = 2e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        want = theirs[name]
        if want is None:
            assert gradient is None, name
        else:
            assert gradient is not None, name
            assert gradient.abs().max() > 0, name
            assert_close(gradient, want, atol=atol * max(1.0, want.abs().max().item()))


@pytest.mark.parametrize("maps", [False, True])
def test_equals_hugging_face(device: torch.device, calls: Counter[str], products: bool, maps: bool) -> None:
    plain, fused = pair(device)
    (theirs, their_grads), (ours, our_grads) = (
        run(plain, device, "torch", maps),
        run(fused, device, "triton", maps),
    )
    assert calls == dict.fromkeys(BLOCKS, 2)
    assert_close(ours, theirs)
    assert_equal_gradients(our_grads, their_grads)


def test_biases_of_many_short_sequences(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gradients are summed in a pass of their own, which shows no more than in its rounding."""
    _, fused = pair(device)
    summed: list[bool] = []
    attend_backward = block_passes.attend_op_backward
    monkeypatch.setattr(
        block_passes, "attend_op_backward", lambda *args: summed.append(args[-1]) or attend_backward(*args)
    )
    _, few = run(fused, device, "triton")
    monkeypatch.setattr(block_passes, "FEW_TOKENS", 0)
    _, many = run(fused, device, "triton")
    assert summed == [True, True, False, False]
    assert_equal_gradients(many, few)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_errs_no_more_than_hugging_face_in_half_precision(
    device: torch.device, dtype: torch.dtype, calls: Counter[str], products: bool
) -> None:
    plain, fused = pair(device)
    exact, exact_grads = run(plain.double(), device, "torch")
    theirs, their_grads = run(plain.to(dtype), device, "torch")
    ours, our_grads = run(fused.to(dtype), device, "triton")
    assert calls
    assert (ours - exact).abs().max() < 2 * (theirs - exact).abs().max() + 1e-5
    for name, gradient in our_grads.items():
        if name.endswith("key.bias"):  # zero but for rounding
            continue
        error, bound = ((g.double() - exact_grads[name]).norm() for g in (gradient, their_grads[name]))
        assert error < 2 * bound + 1e-5, name


def test_dropout_is_that_of_the_ops(device: torch.device, calls: Counter[str], products: bool) -> None:
    _, fused = pair(device, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)
    fused.train()
    head_mask = torch.rand(2, 4, device=device)
    got, grads = run(fused, device, "triton", maps=True, head_mask=head_mask)
    with one_by_one():
        want, want_grads = run(fused, device, "triton", maps=True, head_mask=head_mask)
    assert calls == dict.fromkeys(BLOCKS, 2)
    assert_close(got, want)
    assert_equal_gradients(grads, want_grads)


@pytest.mark.parametrize(
    "how", ["in blocks", *[pytest.param(way, marks=pytest.mark.slow) for way in ("one by one", "checkpointed")]]
)
def test_the_longest_sequences_start_first_and_nothing_changes(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    _, fused = pair(device, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)
    fused.train()
    if how == "checkpointed":
        fused.gradient_checkpointing_enable({"use_reentrant": False})
    kernels: Any = importlib.import_module("fastbert_kernels.attention")
    arguments, orders = kernels._common_arguments, []

    def seen(*args: Any) -> dict[str, Any]:
        given = arguments(*args)
        orders.append(given["order_ptr"].tolist() if given["HAS_ORDER"] else None)
        return given

    monkeypatch.setattr(kernels, "_common_arguments", seen)
    with one_by_one() if how == "one by one" else contextlib.nullcontext():
        got, grads = run(fused, device, "triton", maps=True)
        launches = 6 if how == "checkpointed" else 4
        assert orders == [[0, 2, 1]] * launches
        monkeypatch.setattr(batches, "pack_unless", lambda mask, read: replace(packed_layout(mask), order=None))
        want, want_grads = run(fused, device, "triton", maps=True)
    assert orders[launches:] == [None] * launches
    assert torch.equal(got, want)
    assert all(torch.equal(gradient, want_grads[name]) for name, gradient in grads.items())


def test_without_gradients(device: torch.device, calls: Counter[str], products: bool) -> None:
    plain, fused = pair(device)
    x, mask = ids(device=device), mask_of([11, 4, 7], 11, device)
    with torch.no_grad(), backend("triton"):
        got = fused(x, mask).last_hidden_state
    assert calls == dict.fromkeys(BLOCKS, 2)
    assert not got.requires_grad
    assert_close(got, plain(x, mask).last_hidden_state, where=mask.bool())


@pytest.mark.parametrize("inside", ["forward", "both"])
def test_autocast(device: torch.device, calls: Counter[str], products: bool, inside: str) -> None:
    _, fused = pair(device)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16)
    with autocast, one_by_one():
        want, want_grads = run(fused, device, "triton")
    if inside == "forward":
        fused.forward = autocast(fused.forward)
        ours, our_grads = run(fused, device, "triton")
    else:
        with autocast:
            ours, our_grads = run(fused, device, "triton")
    assert calls == dict.fromkeys(BLOCKS, 2)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, want, atol=0.1 if products else 0.0, rtol=0.0)
    for name, gradient in our_grads.items():
        assert gradient.dtype == torch.float32
        if not name.endswith("key.bias"):
            error = (gradient - want_grads[name]).norm() / want_grads[name].norm()
            assert error < (0.1 if products else 0.01), name


@pytest.mark.parametrize(
    "frozen",
    [
        *("attention.self.query", "attention.self", "attention.output.dense", "intermediate", "output.dense.weight"),
        *("bias", "attention", "output"),
    ],
)
def test_frozen_parameters(device: torch.device, calls: Counter[str], frozen: str) -> None:
    plain, fused = pair(device)
    for model in (plain, fused):
        for name, p in model.named_parameters():
            p.requires_grad_(frozen not in name)
    grads, want = run(fused, device, "triton")[1], run(plain, device, "torch")[1]
    assert calls == dict.fromkeys(BLOCKS, 2)
    assert_equal_gradients(grads, want)


def test_gradients_of_hidden_states_are_whole(device: torch.device, calls: Counter[str]) -> None:
    def gradients(model: Any, name: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        with backend(name):
            output = model(ids(device=device), output_hidden_states=True)
            last = output.last_hidden_state
            return list(torch.autograd.grad(last, output.hidden_states[:-1], torch.randn(last.shape).to(last)))

    plain, fused = pair(device)
    for ours, theirs in zip(gradients(fused, "triton"), gradients(plain, "torch"), strict=True):
        assert_close(ours, theirs, atol=2e-5 * max(1.0, theirs.abs().max().item()))
    assert calls == dict.fromkeys(BLOCKS, 2)


@pytest.mark.parametrize("steps", [1, 2])
def test_gradients_of_maps_alone(
    request: pytest.FixtureRequest, device: torch.device, calls: Counter[str], steps: int
) -> None:
    if steps == 2:
        request.getfixturevalue("halves")
    plain, fused = pair(device)
    x, cotangent = ids(device=device), torch.randn(3, 4, 11, 11, device=device)

    def gradients(model: Any, name: str) -> Gradients:
        with backend(name):
            maps = model(x, output_attentions=True).attentions
            parameters = dict(model.encoder.named_parameters())
            found = torch.autograd.grad(maps[-1], list(parameters.values()), cotangent, allow_unused=True)
        return {k: g for k, g in zip(parameters, found, strict=True) if "key.bias" not in k}

    assert_equal_gradients(gradients(fused, "triton"), gradients(plain, "torch"))
    assert calls == dict.fromkeys(BLOCKS, 2)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(
    ("trained", "flows"),
    [
        ("attention.output.dense.weight", False),
        ("attention.output.LayerNorm.bias", False),
        ("output.dense.weight", False),
        ("intermediate.dense.weight", False),
        ("attention.self.query.weight", True),
        ("attention.self.key.bias", True),
    ],
)
def test_maps_need_a_gradient_where_what_they_are_made_of_does(
    request: pytest.FixtureRequest, device: torch.device, trained: str, flows: bool, steps: int
) -> None:
    if steps == 2:
        request.getfixturevalue("halves")
    for model, name in zip(pair(device), ("torch", "triton"), strict=True):
        for k, p in model.named_parameters():
            p.requires_grad_(k == f"encoder.layer.0.{trained}")
        with backend(name):
            output = model(ids(device=device), output_attentions=True)
        assert [probs.requires_grad for probs in output.attentions] == [flows, True]
        assert output.last_hidden_state.requires_grad


def test_a_head_mask_has_a_gradient(device: torch.device, calls: Counter[str]) -> None:
    _, fused = pair(device)
    head_mask = torch.rand(2, 4, device=device, requires_grad=True)

    def gradient() -> torch.Tensor:
        torch.manual_seed(0)
        with backend("triton"):
            last = fused(ids(device=device), head_mask=head_mask).last_hidden_state
            return torch.autograd.grad(last, head_mask, torch.randn(last.shape).to(last))[0]

    got = gradient()
    assert calls == dict.fromkeys(BLOCKS, 2)
    with one_by_one():
        assert_close(got, gradient(), atol=1e-4)
    assert got.abs().min() > 0


def test_a_graph_that_is_kept_gives_the_same_again(device: torch.device, calls: Counter[str], products: bool) -> None:
    _, fused = pair(device)
    with backend("triton"):
        last = fused(ids(device=device)).last_hidden_state
        parameters, cotangent = list(fused.encoder.parameters()), torch.randn_like(last)
        before = cotangent.clone()
        first = torch.autograd.grad(last, parameters, cotangent, retain_graph=True)
        second = torch.autograd.grad(last, parameters, cotangent)
    assert torch.equal(cotangent, before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert calls


def test_second_derivative_is_refused(device: torch.device, calls: Counter[str], products: bool) -> None:
    _, fused = pair(device)
    with backend("triton"):
        last = fused(ids(device=device)).last_hidden_state
        found = torch.autograd.grad(last.square().sum(), list(fused.encoder.parameters()), create_graph=True)
        with pytest.raises(NotImplementedError, match="has no second derivative"):
            sum(gradient.square().sum() for gradient in found).backward()
    assert calls


def test_selective_checkpointing_keeps_products(device: torch.device, calls: Counter[str], products: bool) -> None:
    _, fused = pair(device)
    layer, hidden = fused.encoder.layer[0], torch.randn(3, 11, 32, device=device)
    kept = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])

    def gradients(run: Callable[..., torch.Tensor], **kwargs: Any) -> list[torch.Tensor]:
        with backend("triton"):
            y = run(layer, hidden, **kwargs)
            return list(torch.autograd.grad(y, list(layer.parameters()), torch.linspace(-1, 1, 32).to(y).expand_as(y)))

    got = gradients(checkpoint, use_reentrant=False, context_fn=kept)
    want = gradients(lambda layer, hidden: layer(hidden))
    assert calls == dict.fromkeys(BLOCKS, 3)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_activation_is_not_kept(device: torch.device) -> None:
    _, fused = pair(device)
    x = ids(device=device)

    def kept() -> int:
        storages: dict[int, int] = {}

        def pack(saved: torch.Tensor) -> torch.Tensor:
            storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved

        with backend("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            last = fused(x).last_hidden_state  # alive, or memory is used again
        assert last.requires_grad
        return sum(storages.values())

    blocks = kept()
    with one_by_one():
        assert kept() - blocks >= 2 * x.numel() * fused.config.intermediate_size * 4


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("layer", {"LayerBackward"}),
        ("halves", {"AttentionBlockBackward", "FeedForwardBlockBackward"}),
        ("one by one", {"AttentionBackward", "AddLayerNormBackward", "BiasActivationBackward"}),
    ],
)
def test_a_profile_calls_steps_by_what_is_fused(
    request: pytest.FixtureRequest, device: torch.device, how: str, named: set[str]
) -> None:
    if how == "halves":
        request.getfixturevalue("halves")
    _, fused = pair(device)
    with backend("triton"), one_by_one() if how == "one by one" else contextlib.nullcontext():
        last = fused(ids(device=device)).last_hidden_state
        with torch.profiler.profile() as profile:
            last.sum().backward()
    seen = {event.key for event in profile.key_averages()}
    assert named <= seen
    assert not [name for name in seen if name.startswith("_") and name.endswith("Backward")]


def test_plain_pytorch_keeps_its_path(calls: Counter[str]) -> None:
    run(pair()[1], torch.device("cpu"), "torch")
    assert not calls


# Parts that have to be called


class Linear(nn.Linear):
    """Somebody's own."""


def _own_linear(module: Any, name: str) -> None:
    getattr(module, name).__class__ = Linear


def _own_part(layer: Any, name: str) -> None:
    part = layer.get_submodule(name)
    part.__class__ = type("Part", (type(part),), {})


def _called(calls: Counter[str]) -> tuple[int, ...]:
    return tuple(calls[name] for name in BLOCKS)


@pytest.mark.filterwarnings("ignore:fastbert")
@pytest.mark.parametrize(
    ("change", "ran"),
    [
        (lambda layer: _own_linear(layer.output, "dense"), (2, 1)),
        (lambda layer: _own_linear(layer.intermediate, "dense"), (2, 1)),
        (lambda layer: _own_linear(layer.attention.output, "dense"), (1, 2)),
        (lambda layer: _own_linear(layer.attention.self, "key"), (1, 2)),
        (lambda layer: _own_part(layer, "attention.self"), (1, 2)),
        (lambda layer: _own_part(layer, "attention.output"), (1, 2)),
        (lambda layer: _own_part(layer, "intermediate"), (2, 1)),
        (lambda layer: _own_part(layer, "output"), (2, 1)),
    ],
)
def test_parts_that_are_not_plain_are_called(
    device: torch.device, calls: Counter[str], change: Callable[[Any], None], ran: tuple[int, int]
) -> None:
    plain, fused = pair(device)
    change(fused.encoder.layer[0])
    (ours, our_grads), (theirs, their_grads) = run(fused, device, "triton"), run(plain, device, "torch")
    assert _called(calls) == ran
    assert_close(ours, theirs)
    assert_equal_gradients(our_grads, their_grads)


@pytest.mark.filterwarnings("ignore:fastbert")
@pytest.mark.parametrize(
    ("part", "name", "ran"),
    [("output", "dense", (2, 1)), ("intermediate", "dense", (2, 1)), ("attention.self", "value", (1, 2))],
)
def test_functions_in_the_place_of_modules_are_called(
    device: torch.device, calls: Counter[str], part: str, name: str, ran: tuple[int, int]
) -> None:
    plain, fused = pair(device)
    module = fused.encoder.layer[0].get_submodule(part)
    linear = getattr(module, name)
    delattr(module, name)
    setattr(module, name, linear.forward)
    ours, theirs = run(fused, device, "triton")[0], run(plain, device, "torch")[0]
    assert _called(calls) == ran
    assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:fastbert")
def test_an_unknown_activation_is_called(device: torch.device, calls: Counter[str]) -> None:
    plain, fused = pair(device)
    for model in (plain, fused):
        model.encoder.layer[0].intermediate.intermediate_act_fn = nn.Tanh()
    ours, theirs = run(fused, device, "triton")[0], run(plain, device, "torch")[0]
    assert _called(calls) == (2, 1)
    assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("attention.self", 0),
        ("attention.self.query", 0),
        ("attention.output", 0),
        ("attention.output.dense", 0),
        ("attention.output.LayerNorm", 0),
        ("attention.output.dropout", 0),
        ("intermediate", 1),
        ("intermediate.dense", 1),
        ("intermediate.intermediate_act_fn", 1),
        ("output", 1),
        ("output.dense", 1),
        ("output.LayerNorm", 1),
    ],
)
@pytest.mark.filterwarnings("ignore:fastbert")
def test_hooks_fire(device: torch.device, calls: Counter[str], name: str, block: int) -> None:
    _, fused = pair(device)
    fired = []
    module = fused.encoder.layer[0].get_submodule(name)
    module.register_forward_hook(lambda module, *_: fired.append(module))
    run(fused, device, "triton")
    assert module in fired
    assert _called(calls) == ((1, 2), (2, 1))[block]


def test_a_linear_layer_without_bias(device: torch.device, calls: Counter[str], products: bool) -> None:
    plain, fused = pair(device)
    for model in (plain, fused):
        layer = model.encoder.layer[0]
        for linear in (layer.intermediate.dense, layer.output.dense, layer.attention.output.dense):
            linear.bias = None
        for linear in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
            linear.bias = None
    (ours, our_grads), (theirs, their_grads) = run(fused, device, "triton"), run(plain, device, "torch")
    assert _called(calls) == (2, 2)
    assert_close(ours, theirs)
    assert_equal_gradients(our_grads, their_grads)


def test_someone_who_looks_on_sees_the_attention(device: torch.device, calls: Counter[str]) -> None:
    _, fused = pair(device)
    with backend("triton"), capture(fused, [0]) as seen:
        fused(ids(device=device))
    assert seen
    assert _called(calls) == (1, 2)


def test_chunks_are_called(device: torch.device, calls: Counter[str]) -> None:
    _, fused = pair(device, chunk_size_feed_forward=11)
    with backend("triton"), torch.no_grad():
        fused(ids(device=device))
    assert _called(calls) == (2, 0)


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("whose", ["layer", "class"])
def test_a_replaced_feed_forward_chunk_is_called(
    device: torch.device, calls: Counter[str], whose: str, name: str
) -> None:
    plain, fused = pair(device)
    for model in (plain, fused):
        layer = model.encoder.layer[0]

        def doubled(self: Any, attended: torch.Tensor) -> torch.Tensor:
            return 2.0 * self.output(self.intermediate(attended), attended)

        if whose == "layer":
            layer.feed_forward_chunk = functools.partial(doubled, layer)
        else:
            layer.__class__ = type("Layer", (type(layer),), {"feed_forward_chunk": doubled})
    ours, theirs = run(fused, device, name)[0], run(plain, device, "torch")[0]
    assert _called(calls) == ((2, 1) if name == "triton" else (0, 0))
    assert_close(ours, theirs)


def test_products_of_two_dtypes_are_refused(device: torch.device) -> None:
    _, fused = pair(device)
    fused.encoder.half()
    with backend("triton"), pytest.raises(RuntimeError, match="dtype"):
        fused(ids(device=device))


def test_explain_counts_the_parts_as_fused(device: torch.device) -> None:
    assert fastbert.explain(pair(device)[1]).fused


# What parameters may be


@pytest.mark.parametrize("name", ["attention.output", "output"])
def test_parameters_in_other_layouts(device: torch.device, calls: Counter[str], name: str) -> None:
    plain, fused = pair(device)
    part = fused.encoder.layer[0].get_submodule(name)
    for module, kind in ((part.dense, "bias"), (part.LayerNorm, "weight"), (part.LayerNorm, "bias")):
        column = getattr(module, kind).detach()[:, None].repeat(1, 2)[:, 0]
        assert not column.is_contiguous()
        setattr(module, kind, nn.Parameter(column))
    part.dense.weight = nn.Parameter(part.dense.weight.detach().T.contiguous().T)
    (ours, our_grads), (theirs, their_grads) = run(fused, device, "triton"), run(plain, device, "torch")
    assert _called(calls) == (2, 2)
    assert_close(ours, theirs)
    assert_equal_gradients(our_grads, their_grads)


@pytest.mark.parametrize("in_blocks", [True, False])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_projection_that_changes_before_the_backward_pass_is_an_error(
    device: torch.device, name: str, in_blocks: bool
) -> None:
    _, fused = pair(device)
    with backend("triton"), contextlib.nullcontext() if in_blocks else one_by_one():
        last = fused(ids(device=device)).last_hidden_state
    with torch.no_grad():
        getattr(fused.encoder.layer[1].attention.self, name).weight.mul_(2.0)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        last.sum().backward()


@pytest.mark.filterwarnings("ignore:fastbert")
def test_parameters_that_are_plain_attributes(device: torch.device, calls: Counter[str]) -> None:
    """As in the replicas of nn.DataParallel."""
    plain, fused = pair(device)
    for module in fused.encoder.layer[0].modules():
        for name, p in list(module._parameters.items()):
            delattr(module, name)
            setattr(module, name, p.detach())
    ours, theirs = run(fused, device, "triton")[0], run(plain, device, "torch")[0]
    assert _called(calls) == (1, 1)
    assert_close(ours, theirs)


@pytest.mark.parametrize("trained", ["attention.self.query.weight", "output.dense.bias"])
def test_second_derivative_is_refused_whatever_is_trained(device: torch.device, trained: str) -> None:
    _, fused = pair(device)
    for name, p in fused.named_parameters():
        p.requires_grad_(name.endswith(f"layer.0.{trained}"))
    parameter = fused.encoder.layer[0].get_parameter(trained)
    with backend("triton"):
        last = fused(ids(device=device)).last_hidden_state
        (gradient,) = torch.autograd.grad(last.square().sum(), parameter, create_graph=True)
        with pytest.raises(NotImplementedError, match="has no second derivative"):
            gradient.square().sum().backward()


@pytest.mark.usefixtures("halves")
def test_a_layer_that_is_there_twice_drops_anew(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused = pair(device, hidden_dropout_prob=0.5)
    fused.encoder.layer[1] = fused.encoder.layer[0]
    seeds = []

    def noted(hidden: torch.Tensor, feed_forward: FeedForwardArguments) -> torch.Tensor:
        seeds.append(feed_forward.seed.item())
        return feed_forward_block(hidden, feed_forward)

    monkeypatch.setattr(layer, "feed_forward_block", noted)
    with backend("triton"), torch.no_grad():
        fused.train()(ids(device=device))
    assert len(set(seeds)) == 2

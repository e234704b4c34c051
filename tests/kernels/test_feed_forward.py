"""The feed-forward block with the activation inside its products: the kernels against their definition."""

import functools
import itertools
import re
from collections.abc import Iterator

import pytest
import torch
from two_references import DTYPES, two_references

from fastbert_kernels import ACTIVATIONS, backend, feed_forward, feed_forward_is_fused, reference, tiles
from fastbert_kernels.catalogue import Launch, Product
from fastbert_kernels.feed_forward_kernels import _tile
from fastbert_kernels.tuned import in_force


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles so small, in groups so low, that short inputs need several of everything. Compiled kernels keep theirs."""
    shrunk = tiles._product(16, 16, 16, 4, 1, descriptors=True) | {"BLOCK_GROUP": 2}
    monkeypatch.setattr(tiles, "_FEED_FORWARD_INTERPRETED", shrunk)
    tiles.feed_forward_table.cache_clear()
    yield
    tiles.feed_forward_table.cache_clear()


def compare(inputs: dict[str, torch.Tensor], activation: str = "gelu") -> None:
    def kernel(x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        with backend("triton"):
            return feed_forward(x, w1, b1, w2, activation, fused=True)

    def definition(x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        return reference.feed_forward(x, w1, b1, w2, activation)

    rows = inputs["x"][..., 0].numel()
    two_references(kernel, definition, inputs, summed_rows=dict.fromkeys(("w1", "b1", "w2"), rows))


def random_inputs(
    rows: tuple[int, ...], hidden: int, intermediate: int, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Weights that keep the pre-activation's deviation near 2."""
    inputs = {
        "x": torch.randn(*rows, hidden),
        "w1": torch.randn(intermediate, hidden) * 2 / hidden**0.5,
        "b1": torch.randn(intermediate),
        "w2": torch.randn(hidden, intermediate) / intermediate**0.5,
    }
    return {name: x.to(device, dtype) for name, x in inputs.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 136), (37, 50), (100, 65), (8, 256), (1, 1)])
def test_widths(device: torch.device, dtype: torch.dtype, hidden: int, intermediate: int) -> None:
    compare(random_inputs((9,), hidden, intermediate, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(device: torch.device, dtype: torch.dtype, activation: str) -> None:
    compare(random_inputs((9,), 16, 24, dtype, device), activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_tokens(device: torch.device, dtype: torch.dtype, tokens: int) -> None:
    compare(random_inputs((tokens,), 32, 72, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "intermediate"), [(40, 72), (37, 50)])
@pytest.mark.parametrize("tokens", [16, 65, 79])
def test_many_tiles_to_a_program(
    device: torch.device, dtype: torch.dtype, tokens: int, hidden: int, intermediate: int, small_tiles: None
) -> None:
    compare(random_inputs((tokens,), hidden, intermediate, dtype, device))


@pytest.mark.parametrize("rows", [(), (0,), (2, 0), (2, 3, 4)])
def test_any_leading_shape(device: torch.device, rows: tuple[int, ...]) -> None:
    compare(random_inputs(rows, 16, 24, torch.float32, device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_expanded_and_unaligned_inputs(device: torch.device, dtype: torch.dtype) -> None:
    inputs = random_inputs((9,), 32, 48, dtype, device)
    compare(inputs | {name: inputs[name].T.contiguous().T for name in ("x", "w1", "w2")})
    compare({name: torch.stack((x, -x), -1)[..., 0] for name, x in inputs.items()})
    compare(inputs | {"x": inputs["x"][:1].expand(9, -1)})
    # An element behind where rows of 16 bytes could start.
    compare({name: torch.cat((x.new_ones(1), x.reshape(-1)))[1:].view(x.shape) for name, x in inputs.items()})


@pytest.mark.parametrize("dtype", DTYPES)
def test_far_from_zero(device: torch.device, dtype: torch.dtype) -> None:
    inputs = random_inputs((9,), 32, 48, dtype, device)
    compare(inputs | {"b1": torch.linspace(-300, 300, 48).to(device, dtype)})


@pytest.mark.parametrize("dtype", DTYPES)
def test_inference_and_training_agree(device: torch.device, dtype: torch.dtype) -> None:
    inputs = random_inputs((65,), 32, 72, dtype, device)
    with backend("triton"):
        inferred = feed_forward(*inputs.values(), fused=True)
        trained = feed_forward(*(x.requires_grad_() for x in inputs.values()), fused=True)
        with torch.no_grad():
            unwatched = feed_forward(*inputs.values(), fused=True)
    assert trained.requires_grad
    assert not unwatched.requires_grad
    assert torch.equal(inferred, trained)
    assert torch.equal(inferred, unwatched)


def test_only_the_pre_activation_is_kept(device: torch.device) -> None:
    inputs = random_inputs((9,), 16, 24, torch.float16, device)
    kept = []
    with backend("triton"), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        feed_forward(*(x.requires_grad_() for x in inputs.values()), fused=True)
    assert [tuple(x.shape) for x in kept if x.shape[0] == 9] == [(9, 16), (9, 24)]


@pytest.mark.parametrize("frozen", [{"x"}, {"w1", "b1"}, {"w1", "w2", "b1"}, {"x", "w1", "b1"}])
def test_frozen_inputs(device: torch.device, frozen: set[str]) -> None:
    inputs = random_inputs((9,), 16, 24, torch.float32, device)
    trained = [x.requires_grad_() for name, x in inputs.items() if name not in frozen]
    dy = torch.randn(9, 16, device=device)
    with backend("triton"):
        got = torch.autograd.grad(feed_forward(*inputs.values(), fused=True), trained, dy)
    want = torch.autograd.grad(reference.feed_forward(*inputs.values(), "gelu"), trained, dy)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("low", DTYPES[1:])
@pytest.mark.parametrize("fused", [False, True])
def test_autocast(device: torch.device, low: torch.dtype, fused: bool) -> None:
    inputs = {name: x.requires_grad_() for name, x in random_inputs((9,), 16, 24, torch.float32, device).items()}
    want = reference.feed_forward(*(x.double() for x in inputs.values()), "gelu")
    dy = torch.randn(9, 16, device=device).to(low)
    with backend("triton"):
        with torch.autocast(device.type, dtype=low):
            y = feed_forward(*inputs.values(), fused=fused)
        got = torch.autograd.grad(y, list(inputs.values()), dy)
    assert y.dtype == low
    exact = torch.autograd.grad(want, list(inputs.values()), dy.double())
    step = torch.finfo(low).eps
    for ours, theirs in ((y, want), *zip(got, exact, strict=True)):
        assert (ours - theirs).abs().max() < 4 * step * theirs.abs().max()
    assert {x.dtype for x in got} == {torch.float32}


def test_a_bias_of_higher_precision(device: torch.device) -> None:
    inputs = random_inputs((9,), 16, 24, torch.bfloat16, device)
    inputs["b1"] = torch.randn(24, device=device)
    x, w1, b1, w2 = (x.requires_grad_() for x in inputs.values())
    with backend("triton"):
        y = feed_forward(x, w1, b1, w2, fused=True)
    assert y.dtype == torch.bfloat16
    assert torch.autograd.grad(y.sum(), b1)[0].dtype == torch.float32


def test_inputs_are_left_alone(device: torch.device) -> None:
    inputs = [x.requires_grad_() for x in random_inputs((9,), 16, 24, torch.float32, device).values()]
    before = [x.detach().clone() for x in inputs]
    with backend("triton"):
        y = feed_forward(*inputs, fused=True)
    dy = torch.randn_like(y)
    given = dy.clone()
    torch.autograd.grad(y, inputs, dy)
    for now, then in zip((*inputs, dy), (*before, given), strict=True):
        assert torch.equal(now, then)


def test_definition_has_the_right_gradients(device: torch.device) -> None:
    inputs = random_inputs((3,), 4, 7, torch.float64, device)
    leaves = tuple(x.requires_grad_() for x in inputs.values())
    assert torch.autograd.gradcheck(lambda *args: reference.feed_forward(*args, "gelu"), leaves)


# Which way


@pytest.mark.parametrize(("row_blocks", "col_blocks", "height"), [(1, 1, 8), (5, 3, 2), (8, 2, 8), (19, 4, 8)])
def test_every_tile_has_one_number(row_blocks: int, col_blocks: int, height: int) -> None:
    if not hasattr(_tile, "fn"):
        pytest.skip("a compiled device function cannot be called")
    numbers = range(row_blocks * col_blocks)
    found = [tuple(map(int, _tile.fn(number, row_blocks, col_blocks, height))) for number in numbers]
    assert sorted(found) == list(itertools.product(range(row_blocks), range(col_blocks)))
    assert {row for row, _ in found[: min(height, row_blocks) * col_blocks]} == set(range(min(height, row_blocks)))


def test_where_products_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fused(
        target: str = "sm_90",
        dtype: torch.dtype = torch.bfloat16,
        tokens: int = 8192,
        inner: int = 384,
        activation: str = "gelu",
    ) -> bool:
        monkeypatch.setattr(tiles, "arch", lambda device: target)
        return tiles.feed_forward_fits(torch.device("cuda"), dtype, tokens, inner, 4 * inner, activation)

    assert fused()
    assert not fused(tokens=8191)
    assert not fused(dtype=torch.float32)
    assert not fused(activation="gelu_tanh")
    assert not fused(inner=768)
    assert not fused(inner=300)
    assert fused("sm_80")
    assert not fused("sm_80", inner=512)
    assert fused("sm_86", inner=312)
    assert not fused("sm_86")
    assert fused("sm_89", inner=512)
    assert fused("sm_120")
    assert not any(fused(target) for target in ("sm_100", "gfx942", "interpreter"))


def test_the_tables_choice_is_taken(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs((65,), 32, 48, torch.bfloat16, device)
    x, w1 = inputs["x"], inputs["w1"]
    with backend("torch"):
        assert not feed_forward_is_fused(x, w1, "gelu")
    with backend("triton"):
        ways = {fused: feed_forward(*inputs.values(), fused=fused) for fused in (False, True)}
        assert not torch.equal(ways[False], ways[True])
        assert torch.equal(feed_forward(*inputs.values()), ways[False])
        monkeypatch.setattr(tiles, "_FEED_FORWARD_FUSED", {tiles.arch(device): 32})
        monkeypatch.setattr(tiles, "_FEED_FORWARD_TOKENS", 65)
        assert feed_forward_is_fused(x, w1, "gelu")
        assert torch.equal(feed_forward(*inputs.values()), ways[True])
        assert not feed_forward_is_fused(x.float(), w1.float(), "gelu")
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert feed_forward_is_fused(x.float(), w1.float(), "gelu")


def test_a_measured_start_goes_before_the_tables(device: torch.device) -> None:
    def fused(tokens: int, dtype: torch.dtype = torch.bfloat16, activation: str = "gelu") -> bool:
        x, w1 = torch.empty(tokens, 16, dtype=dtype, device=device), torch.empty(24, 16, dtype=dtype, device=device)
        with backend("triton"):
            return feed_forward_is_fused(x, w1, activation)

    activations = ("gelu", "gelu_tanh")
    starts = {Product(dtype, 16, activation): 65 for dtype in DTYPES[:2] for activation in activations}
    low = DTYPES[1]
    with in_force(device, starts):
        assert fused(65, low)
        assert not fused(64, low)
        assert not fused(65, DTYPES[2])
        assert not fused(65, low, "relu")
        assert not fused(65, low, "gelu_tanh")
        assert not fused(65, torch.float32)


def test_a_measured_never_goes_before_the_tables(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_FEED_FORWARD_FUSED", {tiles.arch(device): 32})
    fits = functools.partial(tiles.feed_forward_fits, device, torch.bfloat16, 8192, 32, 128, "gelu")
    assert fits()
    with in_force(device, {Product(torch.bfloat16, 32, "gelu"): None}):
        assert not fits()


def test_measured_tiles_are_for_aligned_rows(device: torch.device) -> None:
    measured = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 2, "num_stages": 1}
    x, wide = torch.empty(9, 16, device=device), torch.empty(48, 16, device=device)
    shipped = tiles.feed_forward_tiles("forward", x, wide)
    with in_force(device, {Launch("feed_forward_forward", torch.float32, 16): measured}):
        assert tiles.feed_forward_tiles("forward", x, wide) == shipped | measured
        assert tiles.feed_forward_tiles("backward", x, wide) == shipped
        odd = torch.empty(16, 49, device=device)
        unaligned = tiles.feed_forward_tiles("forward", x, odd)
    assert unaligned == tiles.feed_forward_tiles("forward", x, odd)


# The op as torch sees it


@pytest.mark.parametrize("keep", [False, True])
def test_opcheck(device: torch.device, keep: bool) -> None:
    x, w1, b1, w2 = random_inputs((9,), 16, 24, torch.float32, device).values()
    torch.library.opcheck(torch.ops.fastbert.feed_forward, (x, w1, b1, "gelu", keep))
    pre = torch.randn(9, 24, device=device)
    torch.library.opcheck(torch.ops.fastbert.feed_forward_backward, (x, w2, pre, "gelu"))


def test_second_derivative_is_refused(device: torch.device) -> None:
    inputs = [x.requires_grad_() for x in random_inputs((3,), 16, 24, torch.float32, device).values()]
    with backend("triton"):
        y = feed_forward(*inputs, fused=True)
    (gradient,) = torch.autograd.grad(y.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="fastbert's feed_forward kernel has no second derivative"):
        gradient.sum().backward()


# Bad input


def test_bad_input(device: torch.device) -> None:
    x, w1, b1, w2 = random_inputs((3,), 16, 24, torch.float32, device).values()
    with pytest.raises(ValueError, match="unknown activation 'tanh': the kernels have gelu, gelu_tanh, relu, silu"):
        feed_forward(x, w1, b1, w2, "tanh")
    with pytest.raises(
        ValueError, match=re.escape("weight1 must have shape (24, 16) for x of 16 features, got (24, 1")
    ):
        feed_forward(x, w1[:, 1:], b1, w2)
    with pytest.raises(ValueError, match=re.escape("bias1 must have shape (24,) for x of 16 features, got (23,)")):
        feed_forward(x, w1, b1[1:], w2)
    with pytest.raises(
        ValueError, match=re.escape("weight2 must have shape (16, 24) for x of 16 features, got (24, 1")
    ):
        feed_forward(x, w1, b1, w1)
    with pytest.raises(ValueError, match=rf"one device, got x on {device}.*bias1 on meta"):
        feed_forward(x, w1, torch.zeros(24, device="meta"), w2)
    with backend("triton"):
        with pytest.raises(TypeError, match=r"no fastbert kernel has dtype torch\.float64"):
            feed_forward(x.double(), w1, b1, w2)
        with pytest.raises(TypeError, match=r"must have one dtype, got torch\.float16, torch\.float32 and torch\.flo"):
            feed_forward(x.half(), w1, b1, w2, fused=True)

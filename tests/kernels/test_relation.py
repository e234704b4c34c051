"""The relation loss: the kernels and the row blocks against their definition, over lengths, dims, dtypes and kinds."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from two_references import DTYPES, Outputs, two_references

import fastbert_kernels.relation as relation_module
from fastbert_kernels import backend, reference, relation_loss
from fastbert_kernels.backend import INTERPRETED
from fastbert_kernels.relation_blocks import BLOCK_ROWS

KINDS = ("kl", "mse")
NAMES = ("student_a", "student_b", "teacher_a", "teacher_b")

Tile = Callable[[int, int], None]


@pytest.fixture
def tile(monkeypatch: pytest.MonkeyPatch) -> Tile:
    """Set the tile of the interpreter: `tile(BLOCK_M, BLOCK_N)`. Compiled kernels keep theirs."""

    def choose(block_m: int, block_n: int) -> None:
        if INTERPRETED:
            chosen = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 1, "PRECISION": "ieee"}
            monkeypatch.setattr(relation_module, "relation_tiles", lambda *args: chosen)

    return choose


def offsets(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def operands(
    tokens: int, heads: int, dims: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], device: torch.device
) -> dict[str, torch.Tensor]:
    """Random operands by name: the student's dim and dtype, and the teacher's."""
    models = {"student": (dims[0], dtypes[0]), "teacher": (dims[1], dtypes[1])}
    return {name: torch.randn(tokens, heads, models[name[:7]][0]).to(device, models[name[:7]][1]) for name in NAMES}


def plain(
    student_a: torch.Tensor, student_b: torch.Tensor, teacher_a: torch.Tensor, teacher_b: torch.Tensor,
    lengths: list[int], kind: str, student_scale: float, teacher_scale: float,
) -> torch.Tensor:  # fmt: skip
    """The definition written out in the operands' dtype, softmax in float32: what is run without a fused loss."""
    losses = []
    for a, b, c, d in zip(*(x.split(lengths) for x in (student_a, student_b, teacher_a, teacher_b)), strict=True):
        s = a.transpose(0, 1) @ b.permute(1, 2, 0) * student_scale
        t = c.transpose(0, 1) @ d.permute(1, 2, 0) * teacher_scale
        if kind == "mse":
            losses.append((s.float() - t.float()).square().sum(-1))
        else:
            log_s, p_t = F.log_softmax(s.float(), -1), F.softmax(t.float(), -1)
            losses.append(F.kl_div(log_s, p_t, reduction="none").sum(-1))
    return torch.cat(losses, dim=1)


def compare(
    device: torch.device,
    kind: str,
    lengths: list[int],
    *,
    dtype: torch.dtype = torch.float32,
    heads: int = 2,
    dims: tuple[int, int] = (16, 24),
    scales: tuple[float, float] = (0.25, 0.2),
    given: dict[str, torch.Tensor] | None = None,
    packed: bool = True,
    backend_name: str = "triton",
) -> None:
    """The two-reference test of one configuration."""
    given = operands(sum(lengths), heads, dims, (dtype, dtype), device) if given is None else given
    student = {name: x for name, x in given.items() if name.startswith("student")}
    teacher = [x for name, x in given.items() if name.startswith("teacher")]

    def kernel(student_a: torch.Tensor, student_b: torch.Tensor) -> Outputs:
        with backend(backend_name):
            return relation_loss(
                student_a,
                student_b,
                *teacher,
                offsets(lengths, device) if packed else None,
                max(lengths),
                kind=kind,
                student_scale=scales[0],
                teacher_scale=scales[1],
            )

    def definition(student_a: torch.Tensor, student_b: torch.Tensor) -> Outputs:
        wide = [x.double() if student_a.dtype == torch.float64 else x for x in teacher]
        return reference.relation_loss(student_a, student_b, *wide, lengths, kind, *scales)

    def in_dtype(student_a: torch.Tensor, student_b: torch.Tensor) -> Outputs:
        return plain(student_a, student_b, *teacher, lengths, kind, *scales)

    half = student["student_a"].dtype != torch.float32
    two_references(kernel, definition, student, plain=in_dtype if half else None)


# The definition


def test_definition_in_float64(device: torch.device) -> None:
    a, b, c, d = operands(7, 2, (4, 3), (torch.float64, torch.float64), device).values()
    kl = reference.relation_loss(a, b, c, d, [4, 3], "kl", 0.5, 0.7)
    mse = reference.relation_loss(a, b, c, d, [4, 3], "mse", 0.5, 0.7)
    for start, end in ((0, 4), (4, 7)):
        for h in range(2):
            s = 0.5 * a[start:end, h] @ b[start:end, h].T
            t = 0.7 * c[start:end, h] @ d[start:end, h].T
            p_s, p_t = (x.exp() / x.exp().sum(1, keepdim=True) for x in (s, t))
            torch.testing.assert_close(kl[h, start:end], (p_t * (p_t / p_s).log()).sum(1), rtol=0, atol=1e-12)
            torch.testing.assert_close(mse[h, start:end], ((s - t) ** 2).sum(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_blocks", [False, True])
def test_gradients_in_float64(
    device: torch.device, kind: str, by_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastbert_kernels.relation_blocks.BLOCK_ROWS", 2)
    lengths = [3, 0, 2]
    a, b, c, d = operands(5, 2, (3, 4), (torch.float64, torch.float64), device).values()

    def op(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if by_blocks:
            with backend("torch"):
                return relation_loss(
                    a, b, c, d, offsets(lengths, device), 3, kind=kind, student_scale=0.5, teacher_scale=0.7
                )
        return reference.relation_loss(a, b, c, d, lengths, kind, 0.5, 0.7)

    assert torch.autograd.gradcheck(op, (a.requires_grad_(), b.requires_grad_()))


# Shapes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend_name", ["triton", "torch"])
@pytest.mark.parametrize("lengths", [[1], [64, 63], [65, 0, 1]])
def test_lengths_around_a_tile(
    device: torch.device, kind: str, dtype: torch.dtype, backend_name: str, lengths: list[int]
) -> None:
    compare(device, kind, lengths, dtype=dtype, backend_name=backend_name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 16), (32, 16), (16, 32)])
def test_many_tiles(device: torch.device, kind: str, dtype: torch.dtype, shape: tuple[int, int], tile: Tile) -> None:
    tile(*shape)
    compare(device, kind, [36, 0, 17], dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [(8, 128), (128, 1), (32, 32), (32, 64), (37, 64), (96, 80)])
def test_dims(device: torch.device, kind: str, dims: tuple[int, int], tile: Tile) -> None:
    tile(16, 32)
    compare(device, kind, [19], dims=dims, scales=(dims[0] ** -0.5, dims[1] ** -0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_row_blocks_of_a_long_sequence(device: torch.device, kind: str) -> None:
    compare(device, kind, [2 * BLOCK_ROWS + 1, BLOCK_ROWS], heads=1, backend_name="torch")


@pytest.mark.parametrize("backend_name", ["triton", "torch"])
def test_equal_lengths_need_no_cu_seqlens(device: torch.device, backend_name: str, tile: Tile) -> None:
    tile(16, 16)
    compare(device, "kl", [18, 18], packed=False, backend_name=backend_name)


def test_max_seqlen_may_exceed_the_longest_sequence(device: torch.device, tile: Tile) -> None:
    tile(16, 16)
    given = operands(25, 2, (16, 16), (torch.float32, torch.float32), device).values()
    with backend("triton"):
        first, second = (relation_loss(*given, offsets([5, 20], device), longest) for longest in (20, 50))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend_name", ["triton", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_at_all(device: torch.device, backend_name: str, kind: str) -> None:
    a, b, c, d = operands(0, 2, (16, 16), (torch.float32, torch.float32), device).values()
    a.requires_grad_()
    with backend(backend_name):
        loss = relation_loss(a, b, c, d, offsets([0, 0], device), 4, kind=kind)
    assert loss.shape == (2, 0)
    assert torch.autograd.grad(loss.sum(), a)[0].shape == a.shape


@pytest.mark.parametrize("backend_name", ["triton", "torch"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_models_may_differ_in_dtype(
    device: torch.device, backend_name: str, dtypes: tuple[torch.dtype, torch.dtype], tile: Tile
) -> None:
    tile(16, 16)
    given = operands(19, 2, (16, 8), dtypes, device)
    compare(device, "kl", [19], given=given, backend_name=backend_name)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 4.0), (torch.float16, 12.0), (torch.bfloat16, 12.0)])
def test_scores_of_large_magnitude(device: torch.device, dtype: torch.dtype, factor: float, tile: Tile) -> None:
    """Scores far over what exp can hold."""
    tile(16, 16)
    given = {name: x * factor for name, x in operands(37, 2, (16, 16), (dtype, dtype), device).items()}
    compare(device, "kl", [37], given=given)


@pytest.mark.parametrize("shift", [-60.0, 60.0])
def test_rows_of_scores_far_from_zero(device: torch.device, shift: float, tile: Tile) -> None:
    """Where every score of a row is so low that exp(-lse) is infinite, or so high.

    In bfloat16: in float32 an lse of 200 takes digits of a probability that subtracting the maximum leaves.
    """
    tile(16, 16)
    given = operands(37, 2, (16, 16), (torch.bfloat16, torch.bfloat16), device)
    for model in ("student", "teacher"):
        given[f"{model}_a"][:, :, 0], given[f"{model}_b"][:, :, 0] = 10.0, shift
    compare(device, "kl", [37], dtype=torch.bfloat16, given=given)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_have_no_loss_and_no_gradient(device: torch.device, kind: str) -> None:
    a, b, *_ = operands(20, 2, (16, 16), (torch.float32, torch.float32), device).values()
    a, b = a.requires_grad_(), b.requires_grad_()
    with backend("triton"):
        loss = relation_loss(a, b, a, b, None, 20, kind=kind)
    for x in (loss, *torch.autograd.grad(loss.sum(), (a, b))):
        assert x.abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["stacked", "sliced", "expanded", "transposed"])
def test_strided_operands(device: torch.device, kind: str, layout: str) -> None:
    def operand(dim: int) -> torch.Tensor:
        if layout == "stacked":  # one of the three projections of a layer
            return torch.randn(21, 3, 2, dim, device=device)[:, 1]
        if layout == "sliced":
            return torch.randn(42, 2, dim + 4, device=device)[::2, :, 2 : dim + 2]
        if layout == "expanded":
            return torch.randn(21, 1, dim, device=device).expand(-1, 2, -1)
        return torch.randn(dim, 2, 21, device=device).permute(2, 1, 0)

    given = {name: operand(16 if name.startswith("student") else 24) for name in NAMES}
    for backend_name in ("triton", "torch"):
        compare(device, kind, [13, 8], given=given, backend_name=backend_name)


@pytest.mark.parametrize("backend_name", ["triton", "torch"])
def test_one_tensor_as_rows_and_columns(device: torch.device, backend_name: str) -> None:
    v, _, t, _ = operands(19, 2, (16, 24), (torch.float32, torch.float32), device).values()
    v.requires_grad_()
    with backend(backend_name):
        got = relation_loss(v, v, t, t, offsets([12, 7], device), 12)
    want = reference.relation_loss(v, v, t, t, [12, 7], "kl", 0.25, 24**-0.5)
    dloss = torch.randn_like(want)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    ours, theirs = (torch.autograd.grad(x, v, dloss)[0] for x in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_rows_may_be_smaller_than_a_product_can_hold(device: torch.device, kind: str, tile: Tile) -> None:
    """float16 knows nothing between 0 and 6e-8, and the row of a mean over 2**16 rows has a gradient of 1.5e-5."""
    tile(16, 16)
    a, b, c, d = operands(37, 2, (16, 16), (torch.float16, torch.float16), device).values()
    a, b = a.requires_grad_(), b.requires_grad_()
    with backend("triton"):
        loss = relation_loss(a, b, c, d, None, 37, kind=kind)
    dloss = torch.full_like(loss, 2.0**-24)
    dloss[0, 0] = 2.0**-20
    small = torch.autograd.grad(loss, (a, b), dloss, retain_graph=True)
    whole = torch.autograd.grad(loss, (a, b), dloss * 2.0**20)
    for x, y in zip(small, whole, strict=True):
        step = 2.0**-24  # of the smallest float16 numbers, in which the small gradients themselves are given
        torch.testing.assert_close(x.double(), y.double() * 2.0**-20, rtol=2.0**-10, atol=step)


def test_strided_gradient_of_the_loss(device: torch.device) -> None:
    a, b, c, d = operands(9, 2, (16, 16), (torch.float32, torch.float32), device).values()
    a, b = a.requires_grad_(), b.requires_grad_()
    with backend("triton"):
        loss = relation_loss(a, b, c, d, None, 9)
    dloss = torch.randn(9, 2, device=device).T
    ours = torch.autograd.grad(loss, (a, b), dloss, retain_graph=True)
    theirs = torch.autograd.grad(loss, (a, b), dloss.contiguous())
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x, y)


def test_teacher_is_constant(device: torch.device) -> None:
    for backend_name in ("triton", "torch"):
        given = [x.requires_grad_() for x in operands(9, 2, (16, 16), (torch.float32,) * 2, device).values()]
        with backend(backend_name):
            relation_loss(*given, None, 9).sum().backward()
        assert [x.grad is not None for x in given] == [True, True, False, False]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any),
    heads=st.integers(1, 3),
    dims=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    shape=st.tuples(st.sampled_from([16, 32]), st.sampled_from([16, 32])),
    backend_name=st.sampled_from(["triton", "torch"]),
)
def test_anything(
    device: torch.device,
    tile: Tile,
    kind: str,
    lengths: list[int],
    heads: int,
    dims: tuple[int, int],
    shape: tuple[int, int],
    backend_name: str,
) -> None:
    tile(*shape)
    scales = dims[0] ** -0.5, dims[1] ** -0.5
    compare(device, kind, lengths, heads=heads, dims=dims, scales=scales, backend_name=backend_name)


# What torch sees


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(device: torch.device, kind: str, packed: bool) -> None:
    a, b, c, d = operands(18, 2, (16, 8), (torch.float32, torch.float32), device).values()
    rest = (c, d, offsets([9, 9], device) if packed else None, 9, kind, 0.25, 0.3)
    loss, lse = torch.ops.fastbert.relation_loss(a, b, *rest)
    torch.library.opcheck(torch.ops.fastbert.relation_loss_backward, (torch.randn_like(loss), lse, a, b, *rest))
    torch.library.opcheck(torch.ops.fastbert.relation_loss, (a.requires_grad_(), b.requires_grad_(), *rest))


@pytest.mark.parametrize("backend_name", ["triton", "torch"])
def test_second_derivative_is_refused(device: torch.device, backend_name: str) -> None:
    a, b, c, d = operands(9, 2, (16, 16), (torch.float32, torch.float32), device).values()
    a.requires_grad_()
    with backend(backend_name):
        loss = relation_loss(a, b, c, d, None, 9)
    (gradient,) = torch.autograd.grad(loss.sum(), a, create_graph=True)
    with pytest.raises(
        NotImplementedError, match=r"second derivative: .* take fastbert_kernels.reference.relation_loss"
    ):
        gradient.sum().backward()


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "cosine"}, "unknown kind 'cosine' of relation loss: it is one of kl, mse"),
        ({"student_a": torch.zeros(14, 32)}, "student_a and student_b of one shape (tokens, heads, dim)"),
        ({"student_b": torch.zeros(14, 2, 8)}, "torch.float32 (14, 2, 16) and torch.float32 (14, 2, 8)"),
        ({"teacher_b": torch.zeros(14, 2, 24).half()}, "teacher_a and teacher_b of one shape"),
        ({"student_a": torch.zeros(14, 2, 136), "student_b": torch.zeros(14, 2, 136)}, "128, got 136 of the student"),
        ({"teacher_a": torch.zeros(14, 2, 0), "teacher_b": torch.zeros(14, 2, 0)}, "128, got 0 of the teacher"),
        (
            {"teacher_a": torch.zeros(13, 3, 24), "teacher_b": torch.zeros(13, 3, 24)},
            "(tokens, heads) = (14, 2) of the student and (13, 3) of the teacher",
        ),
        ({"max_seqlen": 0}, "max_seqlen must be at least 1, got 0"),
        ({"cu_seqlens": None}, "max_seqlen=9 tokens, but student_a has 14 tokens"),
        ({"cu_seqlens": torch.tensor([0, 9, 14])}, "must be int32 of shape (batch + 1,), got torch.int64 (3,)"),
    ],
)
def test_bad_input(device: torch.device, change: dict, message: str) -> None:
    arguments = {"cu_seqlens": offsets([9, 5], device), "max_seqlen": 9} | change
    arguments = operands(14, 2, (16, 24), (torch.float32, torch.float32), device) | arguments
    on_device = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    for backend_name in ("triton", "torch"):
        with backend(backend_name), pytest.raises(ValueError, match=re.escape(message)):
            relation_loss(**on_device)


def test_mixed_devices(device: torch.device) -> None:
    a, b, c, d = operands(9, 2, (16, 16), (torch.float32, torch.float32), device).values()
    with pytest.raises(ValueError, match=rf"one device, got student_a on {device}.*teacher_b on meta"):
        relation_loss(a, b, c, d.to("meta"), None, 9)


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_dtype_without_a_kernel(device: torch.device, model: str) -> None:
    dtypes = (torch.float64, torch.float32) if model == "student" else (torch.float32, torch.float64)
    with backend("triton"), pytest.raises(TypeError, match=r"no fastbert kernel has dtype torch.float64"):
        relation_loss(*operands(9, 2, (16, 16), dtypes, device).values(), None, 9)

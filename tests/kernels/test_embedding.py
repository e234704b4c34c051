"""Three gathers + LayerNorm + dropout: the kernel against its definition."""

import re

import pytest
import torch
from two_references import DTYPES, two_references

from fastbert_kernels import backend, embed, reference

EPS = 1e-12
SEED, STREAM = 2**63 - 1, 11
VOCABULARY, POSITIONS, TYPES = 50, 12, 2


def random_ids(count: int, device: torch.device) -> dict[str, torch.Tensor]:
    ids = {
        "words": torch.randint(0, VOCABULARY, (count,)),
        "positions": torch.randint(0, POSITIONS, (count,)),
        "token_types": torch.randint(0, TYPES, (count,)),
    }
    if count > 1:
        ids["words"][:2] = torch.tensor([0, VOCABULARY - 1])
    return {name: x.to(device) for name, x in ids.items()}


def random_tables(features: int, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    tables = {
        "word_table": torch.randn(VOCABULARY, features),
        "position_table": torch.randn(POSITIONS, features),
        "token_type_table": torch.randn(TYPES, features),
        "weight": torch.randn(features),
        "norm_bias": torch.randn(features),
    }
    return {name: x.to(device, dtype) for name, x in tables.items()}


def compare(
    ids: dict[str, torch.Tensor],
    tables: dict[str, torch.Tensor],
    *,
    padding_idx: int | None = None,
    position_padding_idx: int | None = None,
    dropout_p: float = 0.0,
) -> None:
    """`tables` holds "word_table", or instead the vectors as "words"; each entry is checked for its gradient."""
    device, features = tables["weight"].device, tables["weight"].shape[0]
    count = ids["positions"].shape[0]
    keep = None
    if dropout_p > 0.0:
        keep = reference.dropout_keep(SEED, STREAM, count, features, dropout_p).to(device)

    def arguments(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | int | None]:
        common = {"word_table": None, "token_type_table": None, "eps": EPS, "dropout_p": dropout_p}
        return ids | common | {"padding_idx": padding_idx, "position_padding_idx": position_padding_idx} | given

    def kernel(**given: torch.Tensor) -> torch.Tensor:
        seed = torch.tensor(SEED, device=device) if dropout_p > 0.0 else None
        with backend("triton"):
            return embed(**arguments(given), seed=seed, stream=STREAM)

    def definition(**given: torch.Tensor) -> torch.Tensor:
        return reference.embed(**arguments(given), keep=keep)

    two_references(kernel, definition, tables, summed_rows={name: count for name in tables if name != "words"})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [1, 37, 100, 768, 1023])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_widths(device: torch.device, dtype: torch.dtype, features: int, dropout_p: float) -> None:
    compare(random_ids(9, device), random_tables(features, dtype, device), padding_idx=0, dropout_p=dropout_p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 16, 17, 100])
def test_many_tokens_to_a_program(device: torch.device, dtype: torch.dtype, count: int, few_partial_sums: int) -> None:
    compare(random_ids(count, device), random_tables(37, dtype, device), dropout_p=0.2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_vectors_instead_of_ids(device: torch.device, dtype: torch.dtype, dropout_p: float) -> None:
    tables = random_tables(37, dtype, device)
    del tables["word_table"]
    tables["words"] = torch.randn(20, 37).to(device, dtype)
    compare(random_ids(20, device), tables, dropout_p=dropout_p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_other_numbers_of_token_types(
    device: torch.device, dtype: torch.dtype, rows: int, few_partial_sums: int
) -> None:
    """Gradients of one or two are sums that the kernel makes; those of more are scattered."""
    ids, tables = random_ids(100, device), random_tables(37, dtype, device)
    ids["token_types"] = torch.randint(0, rows, (100,), device=device)
    tables["token_type_table"] = torch.randn(rows, 37).to(device, dtype)
    compare(ids, tables, dropout_p=0.2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_ids", [False, True])
def test_without_token_types(device: torch.device, dtype: torch.dtype, with_ids: bool) -> None:
    ids, tables = random_ids(20, device), random_tables(37, dtype, device)
    del tables["token_type_table"]
    if not with_ids:
        tables["words"] = tables.pop("word_table")[:20]
    compare(ids | {"token_types": None}, tables, dropout_p=0.2)


def test_token_types_without_their_table(device: torch.device) -> None:
    with pytest.raises(ValueError, match="give both, or neither"):
        embed(**random_ids(3, device), **random_tables(37, torch.float32, device) | {"token_type_table": None}, eps=EPS)


def test_padding_row_of_positions_gets_no_gradient(device: torch.device) -> None:
    ids, tables = random_ids(20, device), random_tables(37, torch.float32, device)
    ids["positions"][3:9] = 1
    compare(ids, tables, position_padding_idx=1)
    leaves = {name: x.requires_grad_() for name, x in tables.items()}
    with backend("triton"):
        embed(**ids, **leaves, eps=EPS, position_padding_idx=1).square().sum().backward()
    gradient = leaves["position_table"].grad
    assert not gradient[1].any()
    assert gradient[ids["positions"][ids["positions"] != 1]].any(1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_mean(device: torch.device, dtype: torch.dtype) -> None:
    tables = random_tables(768, dtype, device)
    tables["word_table"] = (tables["word_table"] * 0.5 - 20.0).to(dtype)
    compare(random_ids(9, device), tables)


def test_no_tokens(device: torch.device) -> None:
    compare(random_ids(0, device), random_tables(37, torch.float32, device))


def test_dropout_of_everything(device: torch.device) -> None:
    compare(random_ids(5, device), random_tables(37, torch.float32, device), dropout_p=1.0)


def test_strided_and_expanded_inputs(device: torch.device) -> None:
    ids = {name: torch.stack((x, x * 0), dim=1)[:, 0] for name, x in random_ids(20, device).items()}
    ids["token_types"] = torch.ones(1, dtype=torch.long, device=device).expand(20)
    tables = {
        "word_table": torch.randn(37, VOCABULARY, device=device).T,
        "position_table": torch.randn(POSITIONS, 40, device=device)[:, 3:],
        "token_type_table": torch.randn(1, 37, device=device).expand(TYPES, -1),
        "weight": torch.tensor(0.7, device=device).expand(37),
        "norm_bias": torch.randn(37, 2, device=device)[:, 1],
    }
    compare(ids, tables, dropout_p=0.2)
    del tables["word_table"]
    compare(ids, tables | {"words": torch.randn(37, 20, device=device).T})


def test_strided_gradient_of_the_result(device: torch.device) -> None:
    tables = {name: x.requires_grad_() for name, x in random_tables(37, torch.float32, device).items()}
    with backend("triton"):
        y = embed(**random_ids(9, device), **tables, eps=EPS)
    dy = torch.randn(37, 9, device=device).T
    for a, b in zip(
        torch.autograd.grad(y, list(tables.values()), dy, retain_graph=True),
        torch.autograd.grad(y, list(tables.values()), dy.contiguous()),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_int32_ids(device: torch.device) -> None:
    ids = {name: x.int() for name, x in random_ids(20, device).items()}
    compare(ids, random_tables(37, torch.float32, device), padding_idx=0)


@pytest.mark.parametrize("padding_idx", [0, 7])
def test_padding_row_gets_no_gradient(device: torch.device, padding_idx: int) -> None:
    ids, tables = random_ids(20, device), random_tables(37, torch.float32, device)
    ids["words"][3:9] = padding_idx
    leaves = {name: x.requires_grad_() for name, x in tables.items()}
    with backend("triton"):
        y = embed(**ids, **leaves, eps=EPS, padding_idx=padding_idx)
    y.square().sum().backward()
    gradient = leaves["word_table"].grad
    others = torch.ones(VOCABULARY, dtype=torch.bool, device=device)
    others[padding_idx] = False
    seen = torch.zeros_like(others)
    seen[ids["words"]] = True
    assert not gradient[padding_idx].any()
    assert bool(gradient[others & seen].any(dim=1).all())
    assert not gradient[~seen].any()
    compare(ids, tables, padding_idx=padding_idx)


@pytest.mark.parametrize("low", DTYPES[1:])
@pytest.mark.parametrize("part", ["norm in float32", "tables in float32"])
def test_mixed_dtypes(device: torch.device, low: torch.dtype, part: str) -> None:
    tables = random_tables(37, low, device)
    if part == "norm in float32":
        names = ["weight", "norm_bias"]
    else:
        names = ["position_table", "token_type_table", "weight", "norm_bias"]
        del tables["word_table"]
        tables["words"] = torch.randn(100, 37).to(device, low)
    tables |= {name: torch.randn_like(tables[name], dtype=torch.float32) for name in names}
    compare(random_ids(100, device), tables, dropout_p=0.2)


def test_only_some_inputs_need_gradients(device: torch.device) -> None:
    ids, tables = random_ids(9, device), random_tables(37, torch.float32, device)
    tables["position_table"].requires_grad_()
    with backend("triton"):
        y = embed(**ids, **tables, eps=EPS)
    (alone,) = torch.autograd.grad(y, tables["position_table"], torch.ones_like(y) * tables["norm_bias"])
    everything = {name: x.detach().requires_grad_() for name, x in tables.items()}
    with backend("triton"):
        y = embed(**ids, **everything, eps=EPS)
    (among_others,) = torch.autograd.grad(y, everything["position_table"], torch.ones_like(y) * tables["norm_bias"])
    assert torch.equal(alone, among_others)


def test_definition_has_the_right_gradients(device: torch.device) -> None:
    ids, tables = random_ids(5, device), random_tables(6, torch.float64, device)
    keep = reference.dropout_keep(SEED, STREAM, 5, 6, 0.3).to(device)
    tables["word_table"] = tables["word_table"][:8].clone()
    ids["words"] %= 8

    def op(*given: torch.Tensor) -> torch.Tensor:
        return reference.embed(*ids.values(), *given, EPS, None, 0.3, keep)

    assert torch.autograd.gradcheck(op, [x.requires_grad_() for x in tables.values()])


def test_definition_in_float64(device: torch.device) -> None:
    ids, tables = random_ids(9, device), random_tables(6, torch.float64, device)
    z = torch.stack(
        [
            tables["word_table"][w] + tables["position_table"][p] + tables["token_type_table"][t]
            for w, p, t in zip(*ids.values(), strict=True)
        ]
    )
    centered = z - z.mean(1, keepdim=True)
    want = centered / (centered.square().mean(1, keepdim=True) + 1e-3).sqrt() * tables["weight"] + tables["norm_bias"]
    torch.testing.assert_close(reference.embed(**ids, **tables, eps=1e-3), want, rtol=0, atol=1e-12)


# The op as torch sees it


def op_arguments(device: torch.device, with_ids: bool, requires_grad: bool) -> tuple:
    ids, tables = random_ids(9, device), random_tables(37, torch.float32, device)
    if not with_ids:
        ids["words"] = torch.randn(9, 37, device=device).requires_grad_(requires_grad)
    tensors = [
        None if name == "word_table" and not with_ids else x.requires_grad_(requires_grad) for name, x in tables.items()
    ]
    dropout = (0.2, torch.tensor(SEED, device=device), STREAM) if with_ids else (0.0, None, 0)
    return *ids.values(), *tensors, EPS, 0 if with_ids else -1, *dropout, True


@pytest.mark.parametrize("with_ids", [False, True])
def test_opcheck_forward(device: torch.device, with_ids: bool) -> None:
    torch.library.opcheck(torch.ops.fastbert.embed, op_arguments(device, with_ids, requires_grad=True))


@pytest.mark.parametrize("with_ids", [False, True])
def test_opcheck_backward(device: torch.device, with_ids: bool) -> None:
    arguments = op_arguments(device, with_ids, requires_grad=False)
    y, kept, rstd = torch.ops.fastbert.embed(*arguments)
    words, positions, token_types = arguments[:3]
    rows = VOCABULARY, POSITIONS, 0, -1
    for ids in ((words if with_ids else None, positions, token_types), (None, positions, None)):
        given = torch.randn_like(y), kept, arguments[6], rstd, *ids, *rows, *arguments[10:13]
        torch.library.opcheck(torch.ops.fastbert.embed_backward, given)


def test_second_derivative_is_refused(device: torch.device) -> None:
    tables = {name: x.requires_grad_() for name, x in random_tables(37, torch.float32, device).items()}
    with backend("triton"):
        y = embed(**random_ids(9, device), **tables, eps=EPS)
    names = {"word_table": "embed", "weight": "weight gradient"}
    grads = torch.autograd.grad(y.square().sum(), [tables[name] for name in names], create_graph=True)
    for kernel, gradient in zip(names.values(), grads, strict=True):
        with pytest.raises(NotImplementedError, match=f"fastbert's {kernel} kernel has no second derivative"):
            gradient.sum().backward(retain_graph=True)


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": torch.zeros(9, 36)}, "words must be (tokens,) ids or (tokens, 37) vectors, got (9, 36)"),
        ({"words": torch.zeros(9, 36), "word_table": None}, "(tokens, 37) vectors, got (9, 36)"),
        ({"words": torch.zeros(9, dtype=torch.long), "word_table": None}, "(tokens, 37) vectors, got (9,)"),
        ({"positions": torch.zeros(8, dtype=torch.long)}, "positions must have shape (tokens,) = (9,), got (8,)"),
        ({"token_types": torch.zeros(1, 9)}, "token_types must have shape (tokens,) = (9,), got (1, 9)"),
        ({"weight": torch.zeros(36)}, "weight must have shape (features,) = (37,), got (36,)"),
        ({"norm_bias": torch.zeros(38)}, "norm_bias must have shape (features,) = (37,), got (38,)"),
        ({"word_table": torch.zeros(5, 36)}, "word_table must be (rows, 37) like the position table, got (5, 36)"),
        ({"token_type_table": torch.zeros(2, 1)}, "token_type_table must be (rows, 37)"),
        ({"dropout_p": 2.0}, "dropout_p must lie in [0, 1], got 2.0"),
        ({"dropout_p": 0.1}, "embed with dropout_p=0.1 needs a seed"),
    ],
)
def test_bad_input(device: torch.device, change: dict, message: str) -> None:
    arguments = random_ids(9, device) | random_tables(37, torch.float32, device) | change
    arguments = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with backend("triton"), pytest.raises(ValueError, match=re.escape(message)):
        embed(**arguments, eps=EPS)


@pytest.mark.parametrize(
    ("name", "wrong", "rows"), [("words", 50, 50), ("words", -1, 50), ("positions", 12, 12), ("token_types", 2, 2)]
)
def test_id_outside_its_table(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, name: str, wrong: int, rows: int
) -> None:
    monkeypatch.setenv("FASTBERT_CHECK", "1")  # on a GPU the values are looked at only then
    ids = random_ids(9, device)
    ids[name][4] = wrong
    for backend_name in ("triton", "torch"):
        with backend(backend_name), pytest.raises(IndexError, match=f"{name} holds {wrong}, outside the {rows} rows"):
            embed(**ids, **random_tables(37, torch.float32, device), eps=EPS)


def test_row_too_wide(device: torch.device) -> None:
    with backend("triton"), pytest.raises(ValueError, match="rows up to 4096, got 4097"):
        embed(**random_ids(1, device), **random_tables(4097, torch.float32, device), eps=EPS)


@pytest.mark.parametrize("name", ["position_table", "norm_bias"])
def test_mixed_devices(device: torch.device, name: str) -> None:
    tables = random_tables(37, torch.float32, device)
    tables[name] = tables[name].to("meta")
    with pytest.raises(ValueError, match=rf"one device, got words on {device}.*{name} on meta"):
        embed(**random_ids(9, device), **tables, eps=EPS)


def test_dtype_without_a_kernel(device: torch.device) -> None:
    with backend("triton"), pytest.raises(TypeError, match=r"no fastbert kernel has dtype torch\.float64"):
        embed(**random_ids(9, device), **random_tables(37, torch.float64, device), eps=EPS)


@pytest.mark.parametrize("padding_idx", [-1, 0])
def test_an_unchecked_id_outside_its_table_reads_zero_and_gets_no_gradient(
    device: torch.device, padding_idx: int
) -> None:
    ids, tables = random_ids(6, device), random_tables(37, torch.float32, device)
    leaves = {name: table.clone().requires_grad_() for name, table in tables.items()}
    outside = {name: x.clone() for name, x in ids.items()}
    outside["words"][2], outside["positions"][4], outside["token_types"][1] = VOCABULARY + 7, -3, TYPES
    cotangent = torch.randn(6, 37, device=device)
    y, kept, rstd = torch.ops.fastbert.embed(*outside.values(), *leaves.values(), EPS, padding_idx, 0.0, None, 0, True)
    y.backward(cotangent)
    given = cotangent, kept, tables["weight"], rstd, *outside.values(), VOCABULARY, POSITIONS, padding_idx, -2
    *_, words, positions = torch.ops.fastbert.embed_backward(*given, 0.0, None, 0)
    assert words.tolist() == [*ids["words"][:2].tolist(), padding_idx, *ids["words"][3:].tolist()]
    assert positions.tolist() == [*ids["positions"][:4].tolist(), -2, *ids["positions"][5:].tolist()]

    tables["token_type_table"].requires_grad_()
    z = tables["word_table"][ids["words"]] + tables["token_type_table"][ids["token_types"]]
    z[2] -= tables["word_table"][ids["words"][2]]
    z[1] -= tables["token_type_table"][ids["token_types"][1]]
    z += tables["position_table"][ids["positions"]]
    z[4] -= tables["position_table"][ids["positions"][4]]
    wanted = torch.nn.functional.layer_norm(z, (37,), tables["weight"], tables["norm_bias"], EPS)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    wanted.backward(cotangent)
    torch.testing.assert_close(leaves["token_type_table"].grad, tables["token_type_table"].grad, rtol=1e-4, atol=1e-4)
    expected_words = set(ids["words"][[0, 1, 3, 4, 5]].tolist()) - {padding_idx}
    touched = leaves["word_table"].grad.abs().sum(1).nonzero().flatten().tolist()
    assert set(touched) == expected_words
    expected_positions = set(ids["positions"][[0, 1, 2, 3, 5]].tolist())
    assert set(leaves["position_table"].grad.abs().sum(1).nonzero().flatten().tolist()) == expected_positions

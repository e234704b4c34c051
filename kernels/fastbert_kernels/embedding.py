"""dropout(LayerNorm(word + token type + position)): three gathers, norm and dropout in one pass.

The normalized sum is kept for the backward pass, and not gathered again: the tables may have changed meanwhile, by
`.data`, as in adversarial training, which nobody would notice. The scatter into the tables of words and positions is
PyTorch's own embedding backward, which is deterministic and knows `padding_idx`. The gradients of token types are sums
that the kernel makes on the way, unless there are more than two.
"""

from typing import Any

import torch

from . import reference
from .backend import check_mode, check_same_device, has_values, uses_triton
from .catalogue import Tiles
from .column_sums import column_sums, empty_partials
from .embedding_kernels import embed_backward, embed_forward
from .gradients import needed_gradients
from .launch import cdiv, dropout_arguments, register_op, row_multiple, wrap_triton
from .layer_norm import MAX_FEATURES
from .tiles import row_tiles
from .tuned import tuned_tiles

#: Token types whose gradients are sums that the backward kernel makes. Tables with more are scattered into.
SUMMED_TYPES = 2


def _empty_output(words: torch.Tensor, word_table: torch.Tensor | None, position_table: torch.Tensor) -> torch.Tensor:
    """(tokens, features) in the dtype that adding the embeddings gives."""
    vectors = words if word_table is None else word_table
    dtype = torch.promote_types(vectors.dtype, position_table.dtype)
    return position_table.new_empty(words.shape[0], position_table.shape[1], dtype=dtype)


def _forward_fake(
    words: torch.Tensor,
    positions: torch.Tensor,
    token_types: torch.Tensor | None,
    word_table: torch.Tensor | None,
    position_table: torch.Tensor,
    token_type_table: torch.Tensor | None,
    weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    padding_idx: int,
    dropout_p: float,
    seed: torch.Tensor | None,
    stream: int,
    keep: bool,
    position_padding_idx: int = -1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = _empty_output(words, word_table, position_table)
    return y, _empty_kept(y, keep), y.new_empty(words.shape[0], dtype=torch.float32)


def _empty_kept(y: torch.Tensor, keep: bool) -> torch.Tensor:
    """Memory for the norm without weight and bias, not rounded: gradients that are sums over tokens would feel it."""
    return y.new_empty(y.shape if keep else 0, dtype=torch.float32)


@register_op("embed", _forward_fake)
def _forward(
    words: torch.Tensor,
    positions: torch.Tensor,
    token_types: torch.Tensor | None,
    word_table: torch.Tensor | None,
    position_table: torch.Tensor,
    token_type_table: torch.Tensor | None,
    weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    padding_idx: int,
    dropout_p: float,
    seed: torch.Tensor | None,
    stream: int,
    keep: bool,
    position_padding_idx: int = -1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = _empty_output(words, word_table, position_table)
    count, features = y.shape
    kept, rstd = _empty_kept(y, keep), y.new_empty(count, dtype=torch.float32)
    shipped = row_tiles("embed_forward", features, y.element_size())
    tiles = tuned_tiles("embed_forward", y, features, shipped)
    if count > 0:
        wrap_triton(embed_forward)[(cdiv(count, tiles["BLOCK_M"]),)](
            words_ptr=words,
            positions_ptr=positions,
            token_types_ptr=positions if token_types is None else token_types,
            word_table_ptr=position_table if word_table is None else word_table,
            position_table_ptr=position_table,
            token_type_table_ptr=position_table if token_type_table is None else token_type_table,
            weight_ptr=weight,
            norm_bias_ptr=norm_bias,
            y_ptr=y,
            kept_ptr=kept,
            rstd_ptr=rstd,
            count=count,
            vocab_rows=0 if word_table is None else word_table.shape[0],
            position_rows=position_table.shape[0],
            token_type_rows=0 if token_type_table is None else token_type_table.shape[0],
            features=features,
            ROW_MULTIPLE=row_multiple(features),
            eps=eps,
            HAS_WORD_TABLE=word_table is not None,
            HAS_TOKEN_TYPES=token_type_table is not None,
            HAS_NORMED=keep,
            **dropout_arguments(y, dropout_p, seed, stream),
            **tiles,
        )
    return y, kept, rstd


def _backward_plan(dy: torch.Tensor) -> tuple[Tiles, torch.Tensor]:
    """Tiles of the backward pass, and the memory of its partial sums."""
    features = int(dy.shape[-1])  # of a graph's symbol, the number
    shipped = row_tiles("embed_backward", features, dy.element_size())
    tiles = tuned_tiles("embed_backward", dy, features, shipped)
    return tiles, empty_partials(dy, dy.shape[0], tiles["BLOCK_M"], 2 * features)


def _backward_fake(
    dy: torch.Tensor,
    kept: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    words: torch.Tensor | None,
    positions: torch.Tensor,
    token_types: torch.Tensor | None,
    vocab_rows: int,
    position_rows: int,
    padding_idx: int,
    position_padding_idx: int,
    dropout_p: float,
    seed: torch.Tensor | None,
    stream: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _, partials = _backward_plan(dy)
    return torch.empty_like(dy), partials, *_empty_backward(partials, words, positions, token_types)


def _empty_backward(
    partials: torch.Tensor, words: torch.Tensor | None, positions: torch.Tensor, token_types: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory of the token types' partial sums, and of the words and positions that are found."""
    type_partials = partials.new_empty(0) if token_types is None else torch.empty_like(partials)
    found_positions = torch.empty_like(positions, dtype=torch.int64)
    found_words = positions.new_empty(0, dtype=torch.int64) if words is None else torch.empty_like(found_positions)
    return type_partials, found_words, found_positions


@register_op("embed_backward", _backward_fake)
def _backward(
    dy: torch.Tensor,
    kept: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    words: torch.Tensor | None,
    positions: torch.Tensor,
    token_types: torch.Tensor | None,
    vocab_rows: int,
    position_rows: int,
    padding_idx: int,
    position_padding_idx: int,
    dropout_p: float,
    seed: torch.Tensor | None,
    stream: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the sum of the embeddings (count, features); rows of partial sums of dweight and dnorm_bias, and of
    the gradients of token types 0 and 1, if given; and of words, if given, and positions the rows of their tables that
    get a gradient, int64 (count,): `padding_idx` for an id outside."""
    dy = dy.contiguous()
    dz = torch.empty_like(dy)
    tiles, partials = _backward_plan(dy)
    type_partials, found_words, found_positions = _empty_backward(partials, words, positions, token_types)
    wrap_triton(embed_backward)[(partials.shape[0],)](
        dy_ptr=dy,
        kept_ptr=kept,
        weight_ptr=weight,
        rstd_ptr=rstd,
        words_ptr=positions if words is None else words,
        positions_ptr=positions,
        token_types_ptr=positions if token_types is None else token_types,
        dz_ptr=dz,
        partials_ptr=partials,
        type_partials_ptr=type_partials,
        found_words_ptr=found_words,
        found_positions_ptr=found_positions,
        count=dy.shape[0],
        vocab_rows=vocab_rows,
        position_rows=position_rows,
        padding_idx=padding_idx,
        position_padding_idx=position_padding_idx,
        features=dy.shape[1],
        HAS_WORD_TABLE=words is not None,
        HAS_TOKEN_TYPES=token_types is not None,
        ROW_MULTIPLE=row_multiple(dy.shape[1]),
        **dropout_arguments(dy, dropout_p, seed, stream),
        **tiles,
    )
    return dz, partials, type_partials, found_words, found_positions


_backward.forbid_double_backward("embed")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    (
        words, positions, token_types, word_table, position_table, token_type_table, weight, _, _, padding_idx,
        dropout_p, seed, stream, keep, position_padding_idx,
    ) = inputs  # fmt: skip
    if not keep:
        raise RuntimeError("embed has a gradient with keep=True only")
    _, kept, rstd = output
    ctx.save_for_backward(words, positions, token_types, weight, kept, rstd, seed)
    tables = word_table, position_table, token_type_table
    ctx.tables = [None if table is None else (table.shape[0], table.dtype) for table in tables]
    ctx.constants = padding_idx, position_padding_idx, dropout_p, stream
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(kept, rstd)


def _autograd(ctx: Any, dy: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if dy is None:
        return (None,) * 15
    words, positions, token_types, weight, kept, rstd, seed = ctx.saved_tensors
    padding_idx, position_padding_idx, dropout_p, stream = ctx.constants
    needs = needed_gradients(ctx)
    needs_words, (needs_word_table, needs_position_table, needs_token_type_table) = needs[0], needs[3:6]
    word_table, position_table, token_type_table = ctx.tables
    type_dtype = None
    if needs_token_type_table and token_type_table[0] <= SUMMED_TYPES:
        type_dtype = token_type_table[1]
    dz, partials, type_partials, found_words, found_positions = _backward(
        dy, kept, weight, rstd, words if needs_word_table else None, positions,
        None if type_dtype is None else token_types, word_table[0] if needs_word_table else 0, position_table[0],
        padding_idx, position_padding_idx, dropout_p, seed, stream,
    )  # fmt: skip
    dweight, dnorm_bias, of_types = column_sums((partials, (weight.dtype,) * 2), (type_partials, (type_dtype,)))

    def scatter(ids: torch.Tensor, table: tuple[int, torch.dtype], padding_idx: int) -> torch.Tensor:
        rows, dtype = table
        return torch.ops.aten.embedding_dense_backward(dz, ids, rows, padding_idx, False).to(dtype)

    dwords = dz.to(words.dtype) if word_table is None and needs_words else None
    dword_table = scatter(found_words, word_table, padding_idx) if needs_word_table else None
    dposition_table = scatter(found_positions, position_table, position_padding_idx) if needs_position_table else None
    dtoken_type_table = None
    if of_types is not None:
        dtoken_type_table = of_types.view(SUMMED_TYPES, -1)[: token_type_table[0]]
    elif needs_token_type_table:
        rows = token_type_table[0]
        found = torch.where((token_types >= 0) & (token_types < rows), token_types, -1)
        dtoken_type_table = scatter(found, token_type_table, -1)
    dtables = dword_table, dposition_table, dtoken_type_table
    return dwords, None, None, *dtables, dweight, dnorm_bias, *[None] * 7


_forward.register_autograd(_autograd, setup_context=_setup_context)


def embed(
    words: torch.Tensor,
    positions: torch.Tensor,
    token_types: torch.Tensor | None,
    word_table: torch.Tensor | None,
    position_table: torch.Tensor,
    token_type_table: torch.Tensor | None,
    weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    *,
    padding_idx: int | None = None,
    position_padding_idx: int | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    stream: int = 0,
) -> torch.Tensor:
    """dropout(LayerNorm(word + token type + position)) of each token.

    Args:
        words: int (tokens,), rows of `word_table`; or, where that is None, the word vectors (tokens, features).
        positions, token_types: int (tokens,).
        word_table, position_table, token_type_table: (rows, features). Without token types, both are None.
        weight, norm_bias: (features,), the affine part of the norm.
        eps: added to the variance.
        padding_idx, position_padding_idx: the rows of `word_table` and `position_table` that get no gradient.
        dropout_p, seed, stream: as in `attention.attention`.

    Returns:
        (tokens, features) in the dtype that adding the embeddings gives.

    Raises:
        ValueError: for shapes that do not fit each other, over 4096 features, a missing seed, mixed devices.
        IndexError: for an id outside its table; on a GPU only with FASTBERT_CHECK=1, else its vector reads as zero.
        TypeError: for a dtype that no kernel has.
    """
    features = position_table.shape[-1]
    count = words.shape[0]
    if words.shape != ((count,) if word_table is not None else (count, features)):
        raise ValueError(f"words must be (tokens,) ids or (tokens, {features}) vectors, got {tuple(words.shape)}")
    if (token_types is None) != (token_type_table is None):
        raise ValueError("token_types and token_type_table go together: give both, or neither")
    for name, ids in (("positions", positions), ("token_types", token_types)):
        if ids is not None and ids.shape != (count,):
            raise ValueError(f"{name} must have shape (tokens,) = ({count},), got {tuple(ids.shape)}")
    for name, vector in (("weight", weight), ("norm_bias", norm_bias)):
        if vector.shape != (features,):
            raise ValueError(f"{name} must have shape (features,) = ({features},), got {tuple(vector.shape)}")
    for name, table in (("word_table", word_table), ("token_type_table", token_type_table)):
        if table is not None and table.shape[1] != features:
            raise ValueError(f"{name} must be (rows, {features}) like the position table, got {tuple(table.shape)}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1], got {dropout_p}")
    check_same_device(
        "embed", words=words, positions=positions, token_types=token_types, word_table=word_table,
        position_table=position_table, token_type_table=token_type_table, weight=weight, norm_bias=norm_bias,
        seed=seed,
    )  # fmt: skip
    tables = {"words": (words, word_table), "positions": (positions, position_table)}
    if token_types is not None:
        tables["token_types"] = (token_types, token_type_table)
    if has_values(words) and (not words.is_cuda or check_mode()):
        _check_ids(tables)
    if not uses_triton(position_table):
        return reference.embed(
            words, positions, token_types, word_table, position_table, token_type_table, weight, norm_bias, eps,
            padding_idx, dropout_p, position_padding_idx=position_padding_idx,
        )  # fmt: skip
    if features > MAX_FEATURES:
        raise ValueError(f"embed has kernels for rows up to {MAX_FEATURES}, got {features}")
    if dropout_p > 0.0 and seed is None:
        raise ValueError(f"embed with dropout_p={dropout_p} needs a seed: an int64 scalar on {words.device}")
    y, _, _ = _forward(
        words.contiguous(),
        positions.contiguous(),
        None if token_types is None else token_types.contiguous(),
        None if word_table is None else word_table.contiguous(),
        position_table.contiguous(),
        None if token_type_table is None else token_type_table.contiguous(),
        weight.contiguous(),
        norm_bias.contiguous(),
        eps,
        -1 if padding_idx is None else padding_idx,
        dropout_p,
        seed,
        stream,
        torch.is_grad_enabled(),
        -1 if position_padding_idx is None else position_padding_idx,
    )
    return y


def _check_ids(tables: dict[str, tuple[torch.Tensor, torch.Tensor | None]]) -> None:
    """Raise IndexError naming the first id outside its table."""
    for name, (ids, table) in tables.items():
        if table is None or ids.numel() == 0:
            continue
        low, high = (int(x) for x in torch.aminmax(ids))
        if low < 0 or high >= table.shape[0]:
            wrong = low if low < 0 else high
            raise IndexError(f"{name} holds {wrong}, outside the {table.shape[0]} rows of its embedding table")

"""Device code of the embeddings: three gathers, norm and dropout in one pass, and the way back."""

from .language import tl, triton
from .layer_norm_kernels import normalize, normalize_backward
from .numerics import dropout_keep, known_multiple, load_rows, load_vector, store_rows
from .tiles import LOAD_STAGES


@triton.jit
def _gather(table_ptr, ids_ptr, rows, cols, count, table_rows, features):
    """Rows of a table as float32, zero for an id outside it: [BLOCK_M, BLOCK_N]."""
    ids = tl.load(ids_ptr + rows, mask=rows < count, other=0).to(tl.int64)
    found = (rows < count) & (ids >= 0) & (ids < table_rows)
    mask = found[:, None] & (cols[None, :] < features)
    return tl.load(table_ptr + ids[:, None] * features + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _found(ids, table_rows, padding_idx):
    """Ids, and in the place of those outside their table the row that gets no gradient."""
    return tl.where((ids >= 0) & (ids < table_rows), ids, padding_idx)


@triton.jit
def _embedding_sum(
    words_ptr, positions_ptr, token_types_ptr, word_table_ptr, position_table_ptr, token_type_table_ptr,
    rows, cols, count, vocab_rows, position_rows, token_type_rows, features, HAS_WORD_TABLE: tl.constexpr,
    HAS_TOKEN_TYPES: tl.constexpr,
):  # fmt: skip
    """word + token type + position of a block of tokens, float32 [BLOCK_M, BLOCK_N]."""
    if HAS_WORD_TABLE:
        z = _gather(word_table_ptr, words_ptr, rows, cols, count, vocab_rows, features)
    else:
        z = load_rows(words_ptr, rows, cols, count, features)
    if HAS_TOKEN_TYPES:
        z += _gather(token_type_table_ptr, token_types_ptr, rows, cols, count, token_type_rows, features)
    z += _gather(position_table_ptr, positions_ptr, rows, cols, count, position_rows, features)
    return z


@triton.jit(do_not_specialize=["count", "site", "keep_threshold"])
def embed_forward(
    words_ptr,  # (count,) int ids, or without HAS_WORD_TABLE the vectors (count, features)
    positions_ptr,  # (count,) int
    token_types_ptr,  # (count,) int; as its table unused without HAS_TOKEN_TYPES
    word_table_ptr,  # (vocab_rows, features); unused without HAS_WORD_TABLE
    position_table_ptr,  # (position_rows, features)
    token_type_table_ptr,  # (token_type_rows, features)
    weight_ptr,  # (features,)
    norm_bias_ptr,  # (features,)
    seed_ptr,  # int64 scalar; unused without HAS_DROPOUT
    y_ptr,  # (count, features)
    kept_ptr,  # (count, features) float32, the norm without weight and bias; unused without HAS_NORMED
    rstd_ptr,  # (count,) float32; unused without HAS_NORMED
    count,
    vocab_rows,
    position_rows,
    token_type_rows,
    features,
    eps,
    site,
    keep_threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_MULTIPLE: tl.constexpr,  # see launch.row_multiple
    HAS_WORD_TABLE: tl.constexpr,
    HAS_TOKEN_TYPES: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_NORMED: tl.constexpr,
):
    """One program: BLOCK_M tokens."""
    features = known_multiple(features, ROW_MULTIPLE)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    z = _embedding_sum(
        words_ptr, positions_ptr, token_types_ptr, word_table_ptr, position_table_ptr, token_type_table_ptr,
        rows, cols, count, vocab_rows, position_rows, token_type_rows, features, HAS_WORD_TABLE,
        HAS_TOKEN_TYPES,
    )  # fmt: skip
    normed, _, rstd = normalize(z, cols, features, eps)
    y = normed * load_vector(weight_ptr, cols, features) + load_vector(norm_bias_ptr, cols, features)
    if HAS_DROPOUT:
        keep = dropout_keep(seed_ptr, site, rows, keep_threshold, BLOCK_N)
        y = tl.where(keep, y * keep_scale, 0.0)
    store_rows(y_ptr, y, rows, cols, count, features)
    if HAS_NORMED:
        store_rows(kept_ptr, normed, rows, cols, count, features)
        tl.store(rstd_ptr + rows, rstd, mask=rows < count)


@triton.jit(do_not_specialize=["count", "padding_idx", "position_padding_idx", "site", "keep_threshold"])
def embed_backward(
    dy_ptr,  # (count, features)
    kept_ptr,  # (count, features) float32, as in embed_forward
    weight_ptr,  # (features,)
    seed_ptr,  # int64 scalar; unused without HAS_DROPOUT
    rstd_ptr,  # (count,) float32
    words_ptr,  # (count,) int; unused without HAS_WORD_TABLE
    positions_ptr,  # (count,) int
    token_types_ptr,  # (count,) int; unused without HAS_TOKEN_TYPES
    dz_ptr,  # (count, features), gradient of the sum of the three embeddings
    partials_ptr,  # (programs, 2, features) float32: sums of dweight, dnorm_bias
    type_partials_ptr,  # (programs, 2, features) float32: sums of dz of token types 0 and 1; unused as their ids
    found_words_ptr,  # (count,) int64, words, but padding_idx for those outside their table; unused as words
    found_positions_ptr,  # (count,) int64, the same of positions
    count,
    vocab_rows,
    position_rows,
    padding_idx,
    position_padding_idx,
    features,
    site,
    keep_threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WORD_TABLE: tl.constexpr,
    HAS_TOKEN_TYPES: tl.constexpr,
    ROW_MULTIPLE: tl.constexpr,  # see launch.row_multiple
    HAS_DROPOUT: tl.constexpr,
):
    """One program: every num_programs-th block of BLOCK_M tokens, and the column sums over them."""
    features = known_multiple(features, ROW_MULTIPLE)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    cols = tl.arange(0, BLOCK_N)
    weight = load_vector(weight_ptr, cols, features)
    dweight = tl.zeros([BLOCK_N], dtype=tl.float32)
    dnorm_bias = tl.zeros([BLOCK_N], dtype=tl.float32)
    dfirst_type = tl.zeros([BLOCK_N], dtype=tl.float32)
    dsecond_type = tl.zeros([BLOCK_N], dtype=tl.float32)
    for row_start in tl.range(program * BLOCK_M, count, programs * BLOCK_M, num_stages=LOAD_STAGES):
        rows = row_start + tl.arange(0, BLOCK_M)
        rstd = tl.load(rstd_ptr + rows, mask=rows < count, other=0.0)
        dy = load_rows(dy_ptr, rows, cols, count, features)
        if HAS_DROPOUT:
            keep = dropout_keep(seed_ptr, site, rows, keep_threshold, BLOCK_N)
            dy = tl.where(keep, dy * keep_scale, 0.0)
        normed = load_rows(kept_ptr, rows, cols, count, features)
        dz = normalize_backward(dy * weight, normed, rstd, cols, features)
        store_rows(dz_ptr, dz, rows, cols, count, features)
        dweight += tl.sum(dy * normed, axis=0)
        dnorm_bias += tl.sum(dy, axis=0)
        if HAS_WORD_TABLE:
            words = tl.load(words_ptr + rows, mask=rows < count, other=0).to(tl.int64)
            tl.store(found_words_ptr + rows, _found(words, vocab_rows, padding_idx), mask=rows < count)
        positions = tl.load(positions_ptr + rows, mask=rows < count, other=0).to(tl.int64)
        tl.store(found_positions_ptr + rows, _found(positions, position_rows, position_padding_idx), mask=rows < count)
        if HAS_TOKEN_TYPES:
            types = tl.load(token_types_ptr + rows, mask=rows < count, other=0)
            dfirst_type += tl.sum(tl.where((types == 0)[:, None], dz, 0.0), axis=0)
            dsecond_type += tl.sum(tl.where((types == 1)[:, None], dz, 0.0), axis=0)
    partial = program.to(tl.int64) * 2 * features + cols
    tl.store(partials_ptr + partial, dweight, mask=cols < features)
    tl.store(partials_ptr + partial + features, dnorm_bias, mask=cols < features)
    if HAS_TOKEN_TYPES:
        tl.store(type_partials_ptr + partial, dfirst_type, mask=cols < features)
        tl.store(type_partials_ptr + partial + features, dsecond_type, mask=cols < features)

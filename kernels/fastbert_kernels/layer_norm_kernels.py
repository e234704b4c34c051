"""Device code of the norm: dropout, residual and LayerNorm in one pass, and the way back."""

from .language import tl, triton
from .numerics import dropout_keep, known_multiple, load_rows, load_vector, store_rows, store_vector
from .tiles import LOAD_STAGES


@triton.jit
def normalize(z, cols, features, eps):
    """(z - mean) * rstd by rows, mean and rstd: two passes over registers, so that a large mean costs no digits."""
    mean = tl.sum(z, axis=1) / features
    centered = tl.where(cols[None, :] < features, z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, axis=1) / features + eps)
    return centered * rstd[:, None], mean, rstd


@triton.jit
def normalize_backward(dnormed, normed, rstd, cols, features):
    """Gradient of the input of `normalize`: rstd * (g - mean(g) - normed * mean(g * normed)).

    Rows past the end have dnormed = 0 and so contribute nothing. A row of one value has no gradient at all; what a
    fused multiply-add of dnormed leaves of it, rstd would magnify.
    """
    mean_grad = tl.sum(dnormed, axis=1) / features
    mean_grad_normed = tl.sum(dnormed * normed, axis=1) / features
    dz = (dnormed - mean_grad[:, None] - normed * mean_grad_normed[:, None]) * rstd[:, None]
    return tl.where((cols[None, :] < features) & (features > 1), dz, 0.0)


@triton.jit(do_not_specialize=["count", "site", "keep_threshold"])
def add_layer_norm_forward(
    x_ptr,  # (count, features)
    bias_ptr,  # (features,); unused without HAS_BIAS
    residual_ptr,  # (count, features); unused without HAS_RESIDUAL
    weight_ptr,  # (features,)
    norm_bias_ptr,  # (features,)
    seed_ptr,  # int64 scalar; unused without HAS_DROPOUT
    y_ptr,  # (count, features)
    normed_ptr,  # (count, features), the norm without weight and bias; may be x_ptr; unused without HAS_NORMED
    stats_ptr,  # (2 * features + count,) float32: weight, norm_bias, then 1 / deviation; unused without HAS_NORMED
    count,
    features,
    eps,
    site,
    keep_threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_MULTIPLE: tl.constexpr,  # see launch.row_multiple
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_NORMED: tl.constexpr,
):
    """One program: BLOCK_M whole rows."""
    features = known_multiple(features, ROW_MULTIPLE)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    z = load_rows(x_ptr, rows, cols, count, features)
    if HAS_BIAS:
        z += load_vector(bias_ptr, cols, features)
    if HAS_DROPOUT:
        keep = dropout_keep(seed_ptr, site, rows, keep_threshold, BLOCK_N)
        z = tl.where(keep, z * keep_scale, 0.0)
    if HAS_RESIDUAL:
        z += load_rows(residual_ptr, rows, cols, count, features)
    normed, _, rstd = normalize(z, cols, features, eps)
    y = normed * load_vector(weight_ptr, cols, features) + load_vector(norm_bias_ptr, cols, features)
    store_rows(y_ptr, y, rows, cols, count, features)
    if HAS_NORMED:
        store_rows(normed_ptr, normed, rows, cols, count, features)
        tl.store(stats_ptr + 2 * features + rows, rstd, mask=rows < count)
        if tl.program_id(0) == 0:  # loaded again: kept since y, they would take registers
            store_vector(stats_ptr, load_vector(weight_ptr, cols, features), cols, features)
            store_vector(stats_ptr + features, load_vector(norm_bias_ptr, cols, features), cols, features)


@triton.jit(do_not_specialize=["count", "site", "keep_threshold"])
def add_layer_norm_backward(
    dy_ptr,  # (count, features)
    normed_ptr,  # (count, features)
    weight_ptr,  # (features,)
    seed_ptr,  # int64 scalar; unused without HAS_DROPOUT
    stats_ptr,  # (2 * features + count,) float32, as in add_layer_norm_forward
    dz_ptr,  # (count, features), gradient of the sum: of the residual, and of x where nothing was dropped
    dx_ptr,  # (count, features), gradient of x; unused without HAS_DROPOUT
    y_ptr,  # (count, features), the forward pass's result again; unused without HAS_Y
    partials_ptr,  # (programs, 2 or with HAS_BIAS 3, features) float32: sums of dweight, dnorm_bias, dbias
    count,
    features,
    site,
    keep_threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_MULTIPLE: tl.constexpr,  # see launch.row_multiple
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_Y: tl.constexpr,
):
    """One program: every num_programs-th block of BLOCK_M rows, and the column sums over them."""
    features = known_multiple(features, ROW_MULTIPLE)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    cols = tl.arange(0, BLOCK_N)
    weight = load_vector(weight_ptr, cols, features)
    if HAS_Y:  # with what weight and bias were then: `.data` changes them unseen
        then_weight = load_vector(stats_ptr, cols, features)
        then_norm_bias = load_vector(stats_ptr + features, cols, features)
    dweight = tl.zeros([BLOCK_N], dtype=tl.float32)
    dnorm_bias = tl.zeros([BLOCK_N], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_N], dtype=tl.float32)
    for row_start in tl.range(program * BLOCK_M, count, programs * BLOCK_M, num_stages=LOAD_STAGES):
        rows = row_start + tl.arange(0, BLOCK_M)
        rstd = tl.load(stats_ptr + 2 * features + rows, mask=rows < count, other=0.0)
        dy = load_rows(dy_ptr, rows, cols, count, features)
        normed = load_rows(normed_ptr, rows, cols, count, features)
        if HAS_Y:
            store_rows(y_ptr, normed * then_weight + then_norm_bias, rows, cols, count, features)
        dz = normalize_backward(dy * weight, normed, rstd, cols, features)
        store_rows(dz_ptr, dz, rows, cols, count, features)
        dweight += tl.sum(dy * normed, axis=0)
        dnorm_bias += tl.sum(dy, axis=0)
        dx = dz
        if HAS_DROPOUT:
            keep = dropout_keep(seed_ptr, site, rows, keep_threshold, BLOCK_N)
            dx = tl.where(keep, dz * keep_scale, 0.0)
            store_rows(dx_ptr, dx, rows, cols, count, features)
        if HAS_BIAS:
            dbias += tl.sum(dx, axis=0)
    partials_ptr += program.to(tl.int64) * (3 if HAS_BIAS else 2) * features + cols
    tl.store(partials_ptr, dweight, mask=cols < features)
    tl.store(partials_ptr + features, dnorm_bias, mask=cols < features)
    if HAS_BIAS:
        tl.store(partials_ptr + 2 * features, dbias, mask=cols < features)

"""Every op in plain PyTorch: its definition, its CPU path and the oracle of its kernel's tests.

Pure functions: nothing is mutated, autograd gives the gradients, and float64 inputs stay float64. Half-precision
inputs are computed in float32 and rounded once, as the kernels do.

Dropout comes from torch's generator, or from an explicit `keep` mask (True where an element survives), which is how
the tests hand the kernels' own mask to the definition.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .backend import has_values
from .torch_attention import fused_attention

#: Additive score of a masked key. Finite, so that a row with no visible key is uniform; so low that float32 absorbs
#: any real score added to it.
MASKED = -1.0e30

PHILOX_ROUNDS = 7


def upcast(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype arithmetic is done in: float64 stays, everything else is float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def in_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x.to(dtype), which takes its time even where nothing is to be done."""
    return x if x.dtype == dtype else x.to(dtype)


def dropout(x: torch.Tensor, p: float, keep: torch.Tensor | None = None) -> torch.Tensor:
    """Inverted dropout: each element is zero with probability p, else scaled by 1 / (1 - p)."""
    if p == 0.0:
        return x
    if keep is None:
        return F.dropout(x, p, training=True)
    return torch.where(keep, x / (1.0 - p), 0.0) if p < 1.0 else x * 0.0


@functools.cache
def dropout_threshold(p: float) -> int:
    """The 16-bit draw below which an element is dropped, for dropout probability p, kept in steps of 2**-16."""
    return min(round(p * 2**16), 2**16 - 1)


def _kept_halves(
    seed: int, stream: int, planes: int, rows: torch.Tensor, groups: torch.Tensor, p: float
) -> torch.Tensor:
    """What dropout keeps by the halves of Philox-4x32, low before high: bool (planes, rows, groups, 4 words, 2 halves).

    Seven rounds, key = seed, counter = (group, row, plane, stream). Salmon et al., "Parallel random numbers: as easy as
    1, 2, 3", SC 2011.
    """
    low = 0xFFFFFFFF
    c2 = torch.arange(planes)[:, None, None]
    c0, c1, c2, c3 = torch.broadcast_tensors(groups, rows[:, None], c2, torch.tensor(stream))
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(PHILOX_ROUNDS):
        # int64 products wrap, which leaves both 32-bit halves of the unsigned product right.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & low) ^ c1 ^ k0, b & low, (a >> 32 & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    words = torch.stack((c0, c1, c2, c3), dim=-1)
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1) >= dropout_threshold(p)


def dropout_keep(seed: int, stream: int, rows: int, columns: int, p: float) -> torch.Tensor:
    """The mask the row kernels draw, bit for bit: bool (rows, columns), True where an element is kept.

    The eight draws of a Philox call serve eight neighbouring columns.
    """
    kept = _kept_halves(seed, stream, 1, torch.arange(rows), torch.arange(-(-columns // 8)), p)
    return kept[0].flatten(1)[:, :columns]


def dropout_keep_map(seed: int, stream: int, planes: int, rows: int, columns: int, p: float) -> torch.Tensor:
    """The mask the attention kernels draw, bit for bit: bool (planes, rows, columns), True where an element is kept.

    The four words of a Philox call serve rows and columns 8 apart, a word's two halves neighbouring columns.
    """
    row_blocks, column_blocks = -(-rows // 16), -(-columns // 16)
    kept = _kept_halves(seed, stream, planes, torch.arange(8 * row_blocks), torch.arange(4 * column_blocks), p)
    # Rows by (16, 1), columns by (16, 2), words by the columns' 8 and the rows' 8, halves by the columns' 1.
    kept = kept.view(planes, row_blocks, 8, column_blocks, 4, 2, 2, 2).permute(0, 1, 6, 2, 3, 5, 4, 7)
    return kept.reshape(planes, 16 * row_blocks, 16 * column_blocks)[:, :rows, :columns]


def masked_below(dtype: torch.dtype) -> float:
    """The additive score at and under which a key is masked: what `finfo.min`, half of it, and -inf all are."""
    return max(torch.finfo(dtype).min / 2, MASKED)


def additive(bias: torch.Tensor) -> torch.Tensor:
    """An additive mask as float32 (or float64), with every masked entry at `MASKED`.

    Masked are the entries at or under `masked_below`. A bool mask is True where a key is visible.
    """
    if bias.dtype == torch.bool:
        return torch.zeros(bias.shape, dtype=torch.float32, device=bias.device).masked_fill(~bias, MASKED)
    return upcast(bias).masked_fill(bias <= masked_below(bias.dtype), MASKED)


def attention(
    qkv: torch.Tensor,
    lengths: list[int] | int,
    *,
    bias: torch.Tensor | None = None,
    head_mask: torch.Tensor | None = None,
    scale: float,
    dropout_p: float = 0.0,
    keep: torch.Tensor | None = None,
    probs_seq: int | None = None,
    columns: torch.Tensor | None = None,
    hand_out: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Multi-head attention over packed sequences. The op's contract stands in `attention.attention`.

    Args:
        qkv: (tokens, 3, heads, head_dim).
        lengths: tokens of each sequence; or one number, the tokens of every sequence.
        keep: bool (batch, heads, >= longest, >= longest), indexed by position in the sequence.
        probs_seq: side of the probabilities to return; None for none.
        columns: int (tokens,), each token's column in `probs`; None: its position in its sequence.

    Returns:
        The context (tokens, heads, head_dim), and the probabilities (batch, heads, probs_seq, probs_seq) or None. The
        context is made of the probabilities that are returned, in half precision the rounded ones, as in eager
        attention.
    """
    heads = qkv.shape[2]
    if isinstance(lengths, list) and len(set(lengths)) == 1 and lengths[0] > 0:
        lengths = lengths[0]
    batch = len(lengths) if isinstance(lengths, list) else qkv.shape[0] // lengths
    if bias is not None:
        bias = additive(bias).expand(batch, heads, -1, -1)
    trained = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    explicit = probs_seq is not None or head_mask is not None or keep is not None or trained or _hides_rows(bias)

    def probabilities(part: torch.Tensor, sequences: slice, length: int) -> torch.Tensor:
        """Of sequences of one length, the part of qkv that holds their tokens: (batch, heads, length, length)."""
        q, k, _ = _by_head(part, length)
        scores = upcast(q) @ upcast(k).transpose(2, 3) * scale
        if bias is not None:
            scores = scores + bias[sequences, :, :length, :length]
        probs = torch.softmax(scores, dim=-1)
        probs = dropout(probs, dropout_p, None if keep is None else keep[sequences, :, :length, :length])
        return probs if head_mask is None else probs * head_mask[:, None, None]

    def context_of(probs: torch.Tensor, part: torch.Tensor, length: int) -> torch.Tensor:
        value = _by_head(part, length)[2]
        return as_rows((upcast(probs) @ upcast(value)).transpose(1, 2)).to(qkv.dtype)

    def attend(part: torch.Tensor, sequences: slice, length: int) -> torch.Tensor:
        """The context alone."""
        if explicit:
            return context_of(probabilities(part, sequences, length), part, length)
        q, k, v = _by_head(part, length)
        added = None if bias is None else bias[sequences, :, :length, :length]
        return as_rows(_fused(q, k, v, added, scale, dropout_p).transpose(1, 2))

    if isinstance(lengths, list):
        parts = qkv.split(lengths)  # not slices, each of which would have a gradient as large as qkv
        places = [None] * batch if columns is None else columns.split(lengths)
        filled = [(b, slice(b, b + 1), length) for b, length in enumerate(lengths) if length > 0]
    else:
        parts, places, filled = (qkv,), [columns], [(0, slice(None), lengths)]
    if probs_seq is None:
        return _joined([attend(parts[i], which, length) for i, which, length in filled], qkv[:, 2]), None
    maps = [qkv.new_zeros(1, heads, probs_seq, probs_seq)] * batch if isinstance(lengths, list) else [qkv]
    for i, which, length in filled:
        maps[i] = _place(probabilities(parts[i], which, length), probs_seq, places[i]).to(qkv.dtype)
    probs = _joined(maps, qkv.new_zeros(0, heads, probs_seq, probs_seq))
    handed, inner = (probs, probs) if hand_out is None else hand_out(probs)
    taken = inner.split(1) if isinstance(lengths, list) else (inner,)
    contexts = [context_of(_take(taken[i], length, places[i]), parts[i], length) for i, _, length in filled]
    return _joined(contexts, qkv[:, 2]), handed


def _joined(parts: list[torch.Tensor], empty: torch.Tensor) -> torch.Tensor:
    """Rows of all sequences; `empty`, without any, which for the context is of qkv: no token at all has a gradient."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts or [empty])


def _by_head(part: torch.Tensor, length: int) -> torch.Tensor:
    """Query, key and value of sequences of one length, from (tokens, 3, heads, head_dim): each (batch, heads, length,
    head_dim)."""
    return part.unflatten(0, (-1, length)).permute(2, 0, 3, 1, 4)


def _hides_rows(bias: torch.Tensor | None) -> bool:
    """Whether a row's keys may all be so far down that the log-sum-exp torch's fused attention saves for its backward
    pass loses the sum."""
    if bias is None or not torch.is_grad_enabled():
        return False
    return not has_values(bias) or bool((bias.amax(-1) < -1e3).any())


def as_rows(x: torch.Tensor, inner: int = 2) -> torch.Tensor:
    """(..., *inner) to (rows, *inner), by way of one dimension.

    torch.export cannot prove that rows merged from (batch, seq) directly, both of them symbols, are contiguous.
    """
    return x.reshape(-1).view(-1, *x.shape[x.dim() - inner :])


def _place(probs: torch.Tensor, seq: int, columns: torch.Tensor | None) -> torch.Tensor:
    """(batch, heads, length, length) inside zeros (batch, heads, seq, seq), at the columns and rows given for
    each of the (batch * length) tokens."""
    batch, heads, length, _ = probs.shape
    if columns is None:
        if length == seq:
            return probs
        return F.pad(probs, (0, seq - length, 0, seq - length))
    places = columns.long().view(batch, 1, length, 1)
    rows = probs.new_zeros(batch, heads, length, seq).scatter(3, places.transpose(2, 3).expand_as(probs), probs)
    return rows.new_zeros(batch, heads, seq, seq).scatter(2, places.expand_as(rows), rows)


def _take(maps: torch.Tensor, length: int, columns: torch.Tensor | None) -> torch.Tensor:
    """What `_place` has put inside (batch, heads, seq, seq): (batch, heads, length, length)."""
    batch, heads, seq, _ = maps.shape
    if columns is None:
        return maps if length == seq else maps[:, :, :length, :length]
    places = columns.long().view(batch, 1, length, 1)
    rows = maps.gather(2, places.expand(batch, heads, length, seq))
    return rows.gather(3, places.transpose(2, 3).expand(batch, heads, length, length))


def _fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float, dropout_p: float
) -> torch.Tensor:
    """The context alone, by torch's own fused attention: all (batch, heads, length, head_dim)."""
    if dropout_p > 0.0 and q.is_cpu:  # which has no fused attention with dropout: rounded where eager attention rounds
        scores = q @ k.transpose(2, 3) * scale
        probs = torch.softmax(scores if bias is None else scores + bias, dim=-1, dtype=upcast(q).dtype)
        return dropout(probs, dropout_p).to(q.dtype) @ v
    if bias is not None and bias.dtype != q.dtype:  # a masked entry is under the range of a half-precision dtype
        dtype, wide = q.dtype, torch.promote_types(q.dtype, bias.dtype)
        return _fused(q.to(wide), k.to(wide), v.to(wide), bias.to(wide), scale, dropout_p).to(dtype)
    return fused_attention(q, k, v, bias, scale, dropout_p)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


#: The activations that there are, by name. "gelu" is the erf form.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
}


def check_activation(name: str) -> None:
    """Raise ValueError for an unknown activation."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: the kernels have {', '.join(ACTIVATIONS)}")


def bias_activation(x: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """f(x + bias), in x's dtype: x (..., features), bias (features,) or None, f one of `ACTIVATIONS`.

    Raises:
        ValueError: for an unknown activation.
    """
    check_activation(activation)
    # On half precision torch's own activations, too, compute in float32 and round once.
    z = x if bias is None else upcast(x) + bias
    return in_dtype(ACTIVATIONS[activation](z), x.dtype)


def feed_forward(
    x: torch.Tensor, weight1: torch.Tensor, bias1: torch.Tensor, weight2: torch.Tensor, activation: str
) -> torch.Tensor:
    """f(x @ weight1^T + bias1) @ weight2^T, in x's dtype: x (..., hidden), weight1 (intermediate, hidden), bias1
    (intermediate,), weight2 (hidden, intermediate)."""
    return F.linear(bias_activation(F.linear(x, weight1, bias1), None, activation), weight2)


def add_layer_norm(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    dropout_p: float = 0.0,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """LayerNorm(dropout(x + bias) + residual), in the residual's dtype: x and residual (..., features)."""
    z = upcast(x)
    if bias is not None:
        z = z + upcast(bias)
    z = dropout(z, dropout_p, keep)
    if residual is not None:
        z = z + upcast(residual)  # torch is slow at adding tensors of different dtypes
    dtype = z.dtype
    normed = F.layer_norm(z, z.shape[-1:], in_dtype(weight, dtype), in_dtype(norm_bias, dtype), eps)
    return in_dtype(normed, x.dtype if residual is None else residual.dtype)


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
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    keep: torch.Tensor | None = None,
    position_padding_idx: int | None = None,
) -> torch.Tensor:
    """dropout(LayerNorm(word + token type + position)), (tokens, features).

    Args:
        words: int (tokens,), rows of `word_table`; or, with no table, the word vectors (tokens, features) themselves.
        positions, token_types: int (tokens,). Without token types, both they and their table are None.
        padding_idx, position_padding_idx: the rows of `word_table` and `position_table` that get no gradient.
    """
    vectors = words if word_table is None else F.embedding(words, word_table, padding_idx)
    z = upcast(vectors)
    if token_types is not None and token_type_table is not None:
        z = z + upcast(F.embedding(token_types, token_type_table))
    z = z + upcast(F.embedding(positions, position_table, position_padding_idx))
    normed = F.layer_norm(z, z.shape[-1:], weight.to(z.dtype), norm_bias.to(z.dtype), eps)
    return dropout(normed, dropout_p, keep).to(torch.promote_types(vectors.dtype, position_table.dtype))


def relation_loss(
    student_a: torch.Tensor,
    student_b: torch.Tensor,
    teacher_a: torch.Tensor,
    teacher_b: torch.Tensor,
    lengths: list[int],
    kind: str,
    student_scale: float,
    teacher_scale: float,
) -> torch.Tensor:
    """How far the student's relations are from the teacher's, a number for each row: (heads, tokens), float32 or wider.

    A relation is the matrix of scores S = scale * A B^T of one head in one sequence.

    Args:
        student_a, student_b, teacher_a, teacher_b: (tokens, heads, dim), dim the same within a pair.
        lengths: tokens of each sequence.
        kind: "kl", the divergence KL(softmax(S_t) || softmax(S_s)) of the row in nats; or "mse", the row's sum of
            (S_s - S_t)^2.
    """
    losses = [upcast(student_a)[:0, :, 0].T]  # of student_a, so that no token at all still has a gradient
    parts = (upcast(x).split(lengths) for x in (student_a, student_b, teacher_a, teacher_b))
    for a, b, teacher_part_a, teacher_part_b in zip(*parts, strict=True):
        s = a.transpose(0, 1) @ b.permute(1, 2, 0) * student_scale  # (heads, length, length)
        t = teacher_part_a.transpose(0, 1) @ teacher_part_b.permute(1, 2, 0) * teacher_scale
        if kind == "mse":
            losses.append((s - t).square().sum(-1))
        else:
            log_s, log_t = F.log_softmax(s, dim=-1), F.log_softmax(t, dim=-1)
            losses.append((log_t.exp() * (log_t - log_s)).sum(-1))
    return torch.cat(losses, dim=1)

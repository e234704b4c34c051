"""An encoder layer, or one of its two blocks, on a CPU: oneDNN's products around torch's own attention and norms.

Gradients are those of the parts, each of which torch can differentiate any number of times.
"""

import itertools

import torch
import torch.nn.functional as F

from . import reference
from .attention import attention
from .block_records import AttentionArguments, FeedForwardArguments
from .onednn import linear, product_dtype
from .stacked import ContextUse, stacked
from .torch_attention import fused_attention

#: Rows for each thread that go from the attention's result to the layer's at once, and through the attention of short
#: sequences in float32: what lies between stays in the caches, in memory that is used again, and the products have few
#: shapes, for each of which oneDNN compiles code.
ROWS = 256

#: Scores for each thread that attention by products computes at once, and of half precision so few that torch's own is
#: faster.
SCORES = 2**19
FEW_SCORES = 2**15

#: Tokens of a sequence up to which attention in float32 is faster by products too, forward and backward.
FLOAT_LENGTH = 160


def _norm(
    x: torch.Tensor, residual: torch.Tensor, arguments: AttentionArguments | FeedForwardArguments
) -> torch.Tensor:
    """LayerNorm(dropout(x @ weight^T + bias) + residual): x (rows, in), residual (rows, hidden)."""
    if arguments.hidden_dropout_p > 0.0:
        z = F.dropout(linear(x, arguments.weight, arguments.bias), arguments.hidden_dropout_p) + residual
    else:
        z = linear(x, arguments.weight, arguments.bias, residual=residual)
    if arguments.norm_weight.dtype != z.dtype:
        return reference.add_layer_norm(z, None, None, arguments.norm_weight, arguments.norm_bias, arguments.eps)
    return F.layer_norm(z, z.shape[-1:], arguments.norm_weight, arguments.norm_bias, arguments.eps)


def _feed_forward(x: torch.Tensor, arguments: FeedForwardArguments) -> torch.Tensor:
    """The feed-forward block on rows (rows, hidden)."""
    return _norm(linear(x, arguments.up_weight, arguments.up_bias, arguments.activation), x, arguments)


def _attend_run(qkv: torch.Tensor, length: int, scale: float, keys: int) -> torch.Tensor:
    """The context (tokens, heads, head_dim) of sequences of one length, which see their first keys."""
    of_sequence = qkv.shape[2] * length * keys  # scores
    threads = torch.get_num_threads()
    at_once = SCORES * threads // of_sequence  # sequences
    if qkv.dtype == torch.float32:
        by_products = length <= FLOAT_LENGTH
        at_once = min(at_once, ROWS * threads // length)
    else:
        few = qkv.shape[0] // length * of_sequence < FEW_SCORES and not qkv.requires_grad
        by_products = product_dtype(qkv.dtype) == qkv.dtype and not few
    if by_products:
        tokens = length * max(1, at_once)
        contexts = [_attend_in_parts(part, length, scale, keys) for part in qkv.split(tokens)]
        return contexts[0] if len(contexts) == 1 else torch.cat(contexts)
    q, k, v = qkv.unflatten(0, (-1, length)).permute(2, 0, 3, 1, 4)  # each (batch, heads, length, head_dim)
    k, v = k[:, :, :keys], v[:, :, :keys]
    return reference.as_rows(fused_attention(q, k, v, None, scale).transpose(1, 2))


def _attend_in_parts(qkv: torch.Tensor, length: int, scale: float, keys: int) -> torch.Tensor:
    """`_attend_run` in products, faster in half precision and for short sequences than torch's fused attention: its
    backward pass, too, which reads probabilities that are kept."""
    _, _, heads, head_dim = qkv.shape
    q, k, v = qkv.unflatten(0, (-1, length)).permute(2, 0, 3, 1, 4).reshape(3, -1, length, head_dim)
    k, v = k[:, :keys], v[:, :keys]
    scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0.0, alpha=scale)
    context = torch.bmm(torch.softmax(scores, dim=-1), v)
    return reference.as_rows(context.view(-1, heads, length, head_dim).transpose(1, 2))


def _key_ends(arguments: AttentionArguments) -> list[int] | None:
    """How many keys each sequence sees, where it sees the first ones, and there is one."""
    if arguments.key_spans is None:
        return None
    spans = arguments.key_spans.tolist()
    return [end for _, end in spans] if all(first == 0 < end for first, end in spans) else None


def _attend(hidden: torch.Tensor, arguments: AttentionArguments) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The context of rows (tokens, hidden), like them, and the maps if asked for."""
    views = (arguments.qkv_weight,) if arguments.qkv_bias is None else (arguments.qkv_weight, arguments.qkv_bias)
    use = None if arguments.probs_seq is None else ContextUse()
    parameters = tuple([parameter for parameter in arguments.qkv_parameters if parameter is not None])
    weight, *bias = stacked(views, parameters, use)
    qkv = linear(hidden, weight, bias[0] if bias else None)
    qkv = qkv.view(-1, 3, arguments.heads, qkv.shape[-1] // (3 * arguments.heads))
    probs, packed, ends = None, arguments.cu_seqlens, _key_ends(arguments)
    if (
        (arguments.mask is not None and ends is None)
        or arguments.head_mask is not None
        or arguments.probs_seq is not None
        or arguments.dropout_p > 0.0
    ):
        context, probs = attention(
            qkv,
            packed,
            arguments.max_seqlen,
            bias=arguments.mask,
            head_mask=arguments.head_mask,
            scale=arguments.scale,
            dropout_p=arguments.dropout_p,
            probs_seq=arguments.probs_seq,
            columns=arguments.columns,
            order=arguments.order,
            key_spans=arguments.key_spans,
        )
        if use is not None:
            use.watch(context)
    elif packed is None and ends is None:
        context = _attend_run(qkv, arguments.max_seqlen, arguments.scale, arguments.max_seqlen)
    else:
        if packed is None:
            sizes = [(arguments.max_seqlen, end) for end in ends or []]
        else:
            sizes = [(length, length) for length in packed.diff().tolist() if length > 0]
        # Neighbours of one size together.
        runs = [(size, len([*run])) for size, run in itertools.groupby(sizes)]
        parts = qkv.split([length * count for (length, _), count in runs])
        contexts = [
            _attend_run(part, length, arguments.scale, keys)
            for part, ((length, keys), _) in zip(parts, runs, strict=True)
        ]
        context = torch.cat(contexts or [qkv[:, 2]])
    return context.flatten(1), probs


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def feed_forward_block(hidden: torch.Tensor, arguments: FeedForwardArguments) -> torch.Tensor:
    """`blocks.feed_forward_block` on a CPU."""
    return _feed_forward(_rows(hidden), arguments).view(hidden.shape)


def layer_block(
    hidden: torch.Tensor, first: AttentionArguments, second: FeedForwardArguments | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`blocks.layer_block` on a CPU."""
    x = _rows(hidden)
    context, probs = _attend(x, first)
    if second is None:
        return _norm(context, x, first).view(hidden.shape), probs
    rows = ROWS * torch.get_num_threads()
    # Not where what lies between is kept for the backward pass anyway; nor with dropout, which draws for parts what it
    # does not draw for the whole: reentrant checkpointing runs this without gradients first, and then with them.
    whole = torch.is_grad_enabled() or first.hidden_dropout_p > 0.0 or second.hidden_dropout_p > 0.0
    if whole or x.shape[0] <= rows:
        return _feed_forward(_norm(context, x, first), second).view(hidden.shape), probs
    pairs = zip(context.split(rows), x.split(rows), strict=True)
    y = torch.cat([_feed_forward(_norm(part, residual, first), second) for part, residual in pairs])
    return y.view(hidden.shape), probs

"""The forward and backward passes of a layer's blocks, piece by piece: products, and the ops around them.

Autograd sees none of this: `blocks` makes its steps of them.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F

from .attention import _backward as attend_op_backward
from .attention import _forward as attend_op
from .attention_arguments import op_arguments as attend_arguments
from .block_records import (
    AttentionArguments,
    AttentionSaved,
    FeedForwardArguments,
    FeedForwardParameters,
    FeedForwardSaved,
    NormSaved,
    OutputParameters,
    OutputSaved,
    ProjectionParameters,
    read,
)
from .column_sums import PartialSums, column_sums
from .feed_forward import in_product_dtype, products, products_backward
from .layer_norm import _forward as norm_forward
from .layer_norm import forward_in_place as norm_forward_in_place
from .layer_norm import gradients as norm_gradients
from .layer_norm import op_arguments as norm_arguments

#: Of a block that keeps nothing, in place of what it saves.
Nothing: TypeAlias = tuple[()]


def _add_product(dz: torch.Tensor, dx: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dz (..., out) + dx (rows, in) @ weight (in, out), in the memory of dz, which must be nobody else's."""
    rows = dz.view(-1, dz.shape[-1])
    if dx.dtype == dz.dtype:
        rows.addmm_(dx, weight)
    else:
        rows.add_(dx @ weight)
    return dz


def norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    arguments: AttentionArguments | FeedForwardArguments,
    keep: bool,
    again: bool,
) -> tuple[torch.Tensor, NormSaved | Nothing]:
    """A block's norm, of the result of its last product; and what it is to keep, with which its backward pass makes the
    result `again`, if asked."""
    op = norm_arguments(
        x, arguments.bias, residual, arguments.norm_weight, arguments.norm_bias, arguments.eps,
        arguments.hidden_dropout_p, arguments.seed, arguments.hidden_stream,
    )  # fmt: skip
    if not keep:
        return norm_forward(*op, False)[0], ()
    y, normed, rstd = norm_forward_in_place(*op)
    return y, NormSaved(normed, rstd, op.weight, op.norm_bias if again else None)


def norm_backward(
    dy: torch.Tensor,
    arguments: AttentionArguments | FeedForwardArguments,
    saved: NormSaved,
    seed: torch.Tensor | None,
    again: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PartialSums]:
    """What `layer_norm.gradients` returns, of a block's norm; `again`: its result too."""
    return norm_gradients(
        dy, saved.normed, saved.weight, saved.bias if again else None, saved.rstd,
        None if arguments.bias is None else arguments.bias.dtype, arguments.hidden_dropout_p, seed,
        arguments.hidden_stream,
    )  # fmt: skip


def attend(
    hidden: torch.Tensor, arguments: AttentionArguments, keep: bool
) -> tuple[torch.Tensor, torch.Tensor | None, AttentionSaved | Nothing]:
    """The context (tokens, heads, head_dim), the maps, and what is to be kept."""
    x, qkv_weight, qkv_bias = in_product_dtype(hidden, arguments.qkv_weight, arguments.qkv_bias)
    head_dim = qkv_weight.shape[0] // (3 * arguments.heads)
    qkv = F.linear(x, qkv_weight, qkv_bias).view(-1, 3, arguments.heads, head_dim)
    op = attend_arguments(
        qkv, arguments.cu_seqlens, arguments.max_seqlen, arguments.mask, arguments.head_mask, arguments.scale,
        arguments.dropout_p, arguments.seed, arguments.stream, arguments.probs_seq, arguments.columns, arguments.order,
        arguments.key_spans,
    )  # fmt: skip
    context, stats, probs = attend_op(*op)
    saved: AttentionSaved | Nothing = ()
    if keep:
        _, key_weight, value_weight, *_ = arguments.qkv_parameters
        copied = x.dtype != arguments.qkv_weight.dtype
        saved = AttentionSaved(
            x=x, qkv_weight=qkv_weight, qkv=op.qkv, stats=stats, cu_seqlens=op.cu_seqlens, mask=op.bias,
            head_mask=op.head_mask, columns=op.columns, order=op.order, key_spans=op.key_spans, seed=op.seed,
            key_weight=None if copied else key_weight, value_weight=None if copied else value_weight,
        )  # fmt: skip
    return context, None if arguments.probs_seq is None else probs, saved


def attend_backward(
    dcontext: torch.Tensor | None,
    dz: torch.Tensor | None,
    dprobs: torch.Tensor | None,
    context: torch.Tensor | None,
    arguments: AttentionArguments,
    saved: AttentionSaved,
    needs_hidden: bool,
    needs: ProjectionParameters[bool],
) -> tuple[torch.Tensor | None, ProjectionParameters[torch.Tensor | None]]:
    """Gradients of the hidden states and the parameters: from those of the context, of the residual and of the maps,
    each None where nobody used it. That of the maps is the whole one; without it, the context is needed."""
    of_context = torch.zeros_like(saved.qkv[:, 0]) if dcontext is None else dcontext
    dqkv, dhead_mask = attend_op_backward(
        of_context, dprobs, saved.qkv, of_context if context is None else context, saved.stats, saved.cu_seqlens,
        arguments.max_seqlen, saved.mask, saved.head_mask, arguments.scale, arguments.dropout_p, saved.seed,
        arguments.stream, saved.columns, saved.order, saved.key_spans, context is None,
    )  # fmt: skip
    dqkv, dtype = dqkv.flatten(1), arguments.qkv_weight.dtype
    dquery = dkey = dvalue = dquery_bias = dkey_bias = dvalue_bias = None
    if needs.query_weight or needs.key_weight or needs.value_weight:
        dquery, dkey, dvalue = (dqkv.t() @ saved.x.view(-1, saved.x.shape[-1])).to(dtype).chunk(3)
    if arguments.qkv_bias is not None:
        dquery_bias, dkey_bias, dvalue_bias = dqkv.sum(0, dtype=dtype).chunk(3)
    if dcontext is None:
        dvalue = dvalue_bias = None  # no map depends on a value
    dhidden = None
    if needs_hidden:
        qkv_weight = saved.qkv_weight
        dhidden = (dqkv @ qkv_weight).view(saved.x.shape) if dz is None else _add_product(dz, dqkv, qkv_weight)
    return dhidden, ProjectionParameters(
        head_mask=None if saved.head_mask is None else dhead_mask, query_weight=dquery, key_weight=dkey,
        value_weight=dvalue, query_bias=dquery_bias, key_bias=dkey_bias, value_bias=dvalue_bias,
    )  # fmt: skip


def feed_forward_forward(
    hidden: torch.Tensor, arguments: FeedForwardArguments, keep: bool, again: bool
) -> tuple[torch.Tensor, FeedForwardSaved | Nothing, NormSaved | Nothing]:
    """The feed-forward block's result, and what it is to keep: not the hidden states if they are made `again`."""
    hidden = hidden.contiguous()
    x, up_weight, weight = in_product_dtype(
        hidden.view(-1, hidden.shape[-1]), arguments.up_weight.contiguous(), arguments.weight.contiguous()
    )
    up_bias = None if arguments.up_bias is None else arguments.up_bias.contiguous()
    out, pre = products(x, up_weight, up_bias, weight, arguments.activation, arguments.fused, keep)
    y, norm_saved = norm(out.view(hidden.shape), hidden, arguments, keep, again=False)
    if pre is None:
        return y, (), ()
    return y, FeedForwardSaved(None if again else x, up_weight, up_bias, weight, pre, arguments.seed), norm_saved


def feed_forward_backward(
    dy: torch.Tensor,
    arguments: FeedForwardArguments,
    saved: FeedForwardSaved,
    norm_saved: NormSaved,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, tuple[PartialSums, PartialSums]]:
    """Gradients of the hidden states, of the first product, of the second's weight, and for `column_sums` those of the
    first product's bias, and of the norm and the second product's bias."""
    dout, dz, _, norm_sums = norm_backward(dy, arguments, norm_saved, saved.seed, again=False)
    dpre, dweight, bias_sums = products_backward(
        dout.view(-1, dout.shape[-1]), saved.weight, saved.up_bias, saved.pre, arguments.activation, arguments.fused,
        needs_weight,
    )  # fmt: skip
    dhidden = _add_product(dz, dpre, saved.up_weight) if needs_hidden else None
    return dhidden, dpre, dweight, (bias_sums, norm_sums)


def output_product(
    context: torch.Tensor, residual: torch.Tensor, arguments: AttentionArguments, keep: bool
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """What the attention block makes of the context, and what is to be kept, with which its norm's backward pass makes
    the result again."""
    x, weight = in_product_dtype(context, arguments.weight)
    out = F.linear(x.view(*residual.shape[:-1], weight.shape[1]), weight)
    y, norm_saved = norm(out, residual, arguments, keep, again=True)
    return y, (*OutputSaved(context, weight, arguments.seed), *norm_saved) if keep else ()


def second_block(
    attended: torch.Tensor, arguments: FeedForwardArguments | None, keep: bool
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """The feed-forward block, if there is one, and what is to be kept: not what it is given, which is made again."""
    if arguments is None:
        return attended, ()
    y, saved, norm_saved = feed_forward_forward(attended, arguments, keep, again=True)
    return y, (*saved, *norm_saved)


def after_context_backward(
    dy: torch.Tensor,
    attention: AttentionArguments,
    feed_forward: FeedForwardArguments | None,
    saved: tuple[torch.Tensor | None, ...],
    flags: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """Gradients of the context, of the residual, and of the parameters, in the order of the flags that say which need
    one: the feed-forward block's, if any, then those of the output product and its norm."""
    of_feed_forward: tuple[torch.Tensor | None, ...] = ()
    if feed_forward is None:
        (needs,) = read(flags, OutputParameters)
        output, norm_saved = read(saved, OutputSaved, NormSaved)
        dout, dz, _, sums = norm_backward(dy, attention, norm_saved, output.seed, again=False)
        dnorm_weight, dnorm_bias, dbias = column_sums(sums)
    else:
        needs_first, needs = read(flags, FeedForwardParameters, OutputParameters)
        output, norm_saved, second, second_norm = read(saved, OutputSaved, NormSaved, FeedForwardSaved, NormSaved)
        dattended, dpre, ddown, of_second = feed_forward_backward(
            dy, feed_forward, second, second_norm, True, needs_first.weight
        )
        assert dattended is not None
        dout, dz, attended, sums = norm_backward(
            dattended, attention, norm_saved, output.seed, again=needs_first.up_weight
        )
        dup = dpre.t() @ attended.view(-1, attended.shape[-1]) if needs_first.up_weight else None
        dup_bias, dnorm2_weight, dnorm2_bias, ddown_bias, dnorm_weight, dnorm_bias, dbias = column_sums(
            *of_second, sums
        )
        of_feed_forward = FeedForwardParameters(
            up_weight=dup, up_bias=dup_bias, weight=ddown, bias=ddown_bias, norm_weight=dnorm2_weight,
            norm_bias=dnorm2_bias,
        )  # fmt: skip
        del dpre, attended
    dout = dout.view(-1, dout.shape[-1])  # the memory of dz where nothing was dropped: dz may change last
    dweight = dout.t() @ output.context.flatten(1) if needs.weight else None
    dcontext = (dout @ output.weight).view(output.context.shape)
    return dcontext, dz, (*of_feed_forward, *OutputParameters(dweight, dbias, dnorm_weight, dnorm_bias))

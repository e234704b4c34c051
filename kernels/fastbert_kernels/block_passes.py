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
from .backend import is_watched
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
from .column_sums import PartialSums
from .feed_forward import in_product_dtype, products, products_backward
from .layer_norm import _forward as norm_forward
from .layer_norm import forward_in_place as norm_forward_in_place
from .layer_norm import gradients as norm_gradients
from .layer_norm import op_arguments as norm_arguments
from .sequences import batch_size

#: Of a block that keeps nothing, in place of what it saves.
Nothing: TypeAlias = tuple[()]

#: Tokens of a sequence, in the mean, from which on attention's backward kernels sum the gradients of the projections'
#: biases. They do so once in a program, which takes as long as reading the gradients of 60 tokens again on H200, 40 on
#: A100 and 90 on B200, by the static report's times of issue.
SUMMED_LENGTH = 64
#: With so many tokens or fewer they always do: there a launch less is worth more.
FEW_TOKENS = 4096


def _add_product(dz: torch.Tensor, dx: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dz (..., out) + dx (rows, in) @ weight (in, out), in the memory of dz, which must be nobody else's; in its own
    where a dispatch mode sees it, which may hold dz, or know addmm alone."""
    rows = dz.view(-1, dz.shape[-1])
    if dx.dtype == dz.dtype:
        if is_watched():
            return torch.addmm(rows, dx, weight).view(dz.shape)
        rows.addmm_(dx, weight)
    else:
        rows.add_(dx @ weight)
    return dz


def norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    arguments: AttentionArguments | FeedForwardArguments,
    keep: bool,
) -> tuple[torch.Tensor, NormSaved | Nothing]:
    """A block's norm, of the result of its last product; and what it is to keep."""
    op = norm_arguments(
        x, arguments.bias, residual, arguments.norm_weight, arguments.norm_bias, arguments.eps,
        arguments.hidden_dropout_p, arguments.seed, arguments.hidden_stream,
    )  # fmt: skip
    if not keep:
        return norm_forward(*op, False)[0], ()
    y, normed, stats = norm_forward_in_place(*op)
    return y, NormSaved(normed, stats, op.weight)


def norm_backward(
    dy: torch.Tensor,
    arguments: AttentionArguments | FeedForwardArguments,
    saved: NormSaved,
    seed: torch.Tensor | None,
    again: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PartialSums]:
    """What `layer_norm.gradients` returns, of a block's norm; `again`: its result too."""
    return norm_gradients(
        dy, saved.normed, saved.weight, saved.stats, again,
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


def sums_in_kernels(tokens: int, sequences: int) -> bool:
    """Whether attention's backward kernels sum the gradients of the projections' biases; else a pass over them does."""
    return tokens <= FEW_TOKENS or tokens >= SUMMED_LENGTH * sequences


def attend_backward(
    dcontext: torch.Tensor | None,
    dz: torch.Tensor | None,
    dprobs: torch.Tensor | None,
    context: torch.Tensor | None,
    arguments: AttentionArguments,
    saved: AttentionSaved,
    needs_hidden: bool,
    needs: ProjectionParameters[bool],
) -> tuple[torch.Tensor | None, ProjectionParameters[torch.Tensor | None], tuple[PartialSums, ...]]:
    """Gradients of the hidden states and the parameters, but for the projections' biases, and for `column_sums` those
    of the query's, the key's and the value's: from those of the context, of the residual and of the maps, each
    None where nobody used it. That of the maps is the whole one; without it, the context is needed."""
    of_context = torch.zeros_like(saved.qkv[:, 0]) if dcontext is None else dcontext
    dtype = arguments.qkv_weight.dtype
    bias_dtype = dtype if needs.query_bias or needs.key_bias or needs.value_bias else None
    sequences = batch_size(saved.qkv, saved.cu_seqlens, arguments.max_seqlen)
    summed = bias_dtype is not None and sums_in_kernels(saved.qkv.shape[0], sequences)
    dqkv, dhead_mask, dquery_sums, dkey_value_sums = attend_op_backward(
        of_context, dprobs, saved.qkv, of_context if context is None else context, saved.stats, saved.cu_seqlens,
        arguments.max_seqlen, saved.mask, saved.head_mask, arguments.scale, arguments.dropout_p, saved.seed,
        arguments.stream, saved.columns, saved.order, saved.key_spans, context is None, summed,
    )  # fmt: skip
    dqkv = dqkv.flatten(1)
    sums: tuple[PartialSums, ...] = (dquery_sums, (bias_dtype,)), (dkey_value_sums, (bias_dtype,) * 2)
    if bias_dtype is not None and not summed:
        sums = ((dqkv.sum(0, keepdim=True, dtype=torch.float32), (bias_dtype,) * 3),)
    dquery = dkey = dvalue = None
    if needs.query_weight or needs.key_weight or needs.value_weight:
        dquery, dkey, dvalue = (dqkv.t() @ saved.x.view(-1, saved.x.shape[-1])).to(dtype).chunk(3)
    dhidden = None
    if needs_hidden:
        qkv_weight = saved.qkv_weight
        dhidden = (dqkv @ qkv_weight).view(saved.x.shape) if dz is None else _add_product(dz, dqkv, qkv_weight)
    gradients = ProjectionParameters(
        head_mask=None if saved.head_mask is None else dhead_mask, query_weight=dquery, key_weight=dkey,
        value_weight=dvalue, query_bias=None, key_bias=None, value_bias=None,
    )  # fmt: skip
    return dhidden, gradients, sums


def feed_forward_forward(
    hidden: torch.Tensor, arguments: FeedForwardArguments, keep: bool, again: bool
) -> tuple[torch.Tensor, FeedForwardSaved | Nothing, NormSaved | Nothing]:
    """The feed-forward block's result, and what it is to keep: not the hidden states if they are made `again`."""
    hidden = hidden.contiguous()
    x, up_weight, weight = in_product_dtype(
        hidden.view(-1, hidden.shape[-1]), arguments.up_weight.contiguous(), arguments.weight.contiguous()
    )
    up_bias = None if arguments.up_bias is None else arguments.up_bias.contiguous()
    out, pre, then_bias = products(x, up_weight, up_bias, weight, arguments.activation, arguments.fused, keep)
    y, norm_saved = norm(out.view(hidden.shape), hidden, arguments, keep)
    if pre is None:
        return y, (), ()
    # Aliases: of a parameter itself, autograd would give back what its `.data` is then.
    saved = FeedForwardSaved(None if again else x, up_weight.detach(), then_bias, weight.detach(), pre, arguments.seed)
    return y, saved, norm_saved


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
        needs_weight, None if arguments.up_bias is None else arguments.up_bias.dtype,
    )  # fmt: skip
    dhidden = _add_product(dz, dpre, saved.up_weight) if needs_hidden else None
    return dhidden, dpre, dweight, (bias_sums, norm_sums)


def output_product(
    context: torch.Tensor, residual: torch.Tensor, arguments: AttentionArguments, keep: bool
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """What the attention block makes of the context, and what is to be kept."""
    x, weight = in_product_dtype(context, arguments.weight)
    out = F.linear(x.view(*residual.shape[:-1], weight.shape[1]), weight)
    y, norm_saved = norm(out, residual, arguments, keep)
    return y, (*OutputSaved(context, weight.detach(), arguments.seed), *norm_saved) if keep else ()


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
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor | None, ...], tuple[PartialSums, ...]]:
    """Gradients of the context, of the residual, and of the weights of products: the feed-forward block's two, if any,
    then the output product's; and for `column_sums` those of the vectors. `after_context_gradients` puts them in order.
    The flags say which parameter needs one, in that order."""
    of_feed_forward: tuple[torch.Tensor | None, ...] = ()
    first_sums: tuple[PartialSums, ...] = ()
    if feed_forward is None:
        (needs,) = read(flags, OutputParameters)
        output, norm_saved = read(saved, OutputSaved, NormSaved)
        dout, dz, _, sums = norm_backward(dy, attention, norm_saved, output.seed, again=False)
    else:
        needs_first, needs = read(flags, FeedForwardParameters, OutputParameters)
        output, norm_saved, second, second_norm = read(saved, OutputSaved, NormSaved, FeedForwardSaved, NormSaved)
        dattended, dpre, ddown, first_sums = feed_forward_backward(
            dy, feed_forward, second, second_norm, True, needs_first.weight
        )
        assert dattended is not None
        dout, dz, attended, sums = norm_backward(
            dattended, attention, norm_saved, output.seed, again=needs_first.up_weight
        )
        dup = dpre.t() @ attended.view(-1, attended.shape[-1]) if needs_first.up_weight else None
        of_feed_forward = dup, ddown
        del dpre, attended
    dout = dout.view(-1, dout.shape[-1])  # the memory of dz where nothing was dropped: dz may change last
    dweight = dout.t() @ output.context.flatten(1) if needs.weight else None
    dcontext = (dout @ output.weight).view(output.context.shape)
    return dcontext, dz, (*of_feed_forward, dweight), (*first_sums, sums)


def after_context_gradients(
    weights: Sequence[torch.Tensor | None], vectors: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the parameters behind the context, in their order: the feed-forward block's, if any, then those of
    the output product and its norm; from what `after_context_backward` returns, its sums as `column_sums` made them."""
    *of_feed_forward, dweight = weights
    *of_vectors, dnorm_weight, dnorm_bias, dbias = vectors
    output = OutputParameters(dweight, dbias, dnorm_weight, dnorm_bias)
    if not of_feed_forward:
        return output
    (dup, ddown), (dup_bias, dnorm2_weight, dnorm2_bias, ddown_bias) = of_feed_forward, of_vectors
    return *FeedForwardParameters(
        up_weight=dup, up_bias=dup_bias, weight=ddown, bias=ddown_bias, norm_weight=dnorm2_weight,
        norm_bias=dnorm2_bias,
    ), *output  # fmt: skip


def projection_gradients(
    gradients: ProjectionParameters[torch.Tensor | None], vectors: Sequence[torch.Tensor | None]
) -> ProjectionParameters[torch.Tensor | None]:
    """Those that `attend_backward` returns, and of the biases what `column_sums` made of its sums."""
    *others, _, _, _ = gradients
    return ProjectionParameters(*others, *vectors)

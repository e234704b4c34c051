"""What blocks of a layer take, what they keep for their backward passes, and what of it has gradients: all by name.

Autograd knows flat tuples only: of the tensors it saves, of what needs a gradient, and of the gradients. A record, or
one after the other, is such a tuple; `read` makes records of one again.
"""

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from .attention_map import HandOut

T = TypeVar("T")


class ProjectionParameters(NamedTuple, Generic[T]):
    """For each parameter of the projections and of the map one thing: the tensor, whether it needs a gradient, or its
    gradient.

    Attributes:
        head_mask: of the probabilities.
        query_weight, ..., value_bias: of the projections.
    """

    head_mask: T
    query_weight: T
    key_weight: T
    value_weight: T
    query_bias: T
    key_bias: T
    value_bias: T


class OutputParameters(NamedTuple, Generic[T]):
    """`ProjectionParameters` of what the attention block makes of the context.

    Attributes:
        weight, bias: of the output product.
        norm_weight, norm_bias: of the norm.
    """

    weight: T
    bias: T
    norm_weight: T
    norm_bias: T


class FeedForwardParameters(NamedTuple, Generic[T]):
    """`ProjectionParameters` of the feed-forward block.

    Attributes:
        up_weight, up_bias: of the first product.
        weight, bias: of the second product.
        norm_weight, norm_bias: of the norm.
    """

    up_weight: T
    up_bias: T
    weight: T
    bias: T
    norm_weight: T
    norm_bias: T


class AttentionArguments(NamedTuple):
    """What the attention block takes beside the hidden states.

    Attributes:
        qkv_weight, qkv_bias: (3 * hidden, hidden) and (3 * hidden,), detached.
        qkv_parameters: the three weights, then the three biases or three times None; those two are views of them.
        weight, bias: (hidden, hidden) and (hidden,), of the output product.
        norm_weight, norm_bias, eps: as in `layer_norm.add_layer_norm`.
        mask: the `bias` of `attention.attention`, which says what the others of these names are.
        hand_out: as there; unused without maps.
        hidden_dropout_p, hidden_stream: of the dropout before the norm; the others are the attention's.
    """

    qkv_weight: torch.Tensor
    qkv_bias: torch.Tensor | None
    qkv_parameters: tuple[torch.Tensor | None, ...]
    weight: torch.Tensor
    bias: torch.Tensor | None
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    eps: float
    heads: int
    cu_seqlens: torch.Tensor | None
    max_seqlen: int
    mask: torch.Tensor | None
    head_mask: torch.Tensor | None
    scale: float
    probs_seq: int | None
    columns: torch.Tensor | None
    order: torch.Tensor | None
    key_spans: torch.Tensor | None
    dropout_p: float
    hidden_dropout_p: float
    seed: torch.Tensor | None
    stream: int
    hidden_stream: int
    hand_out: HandOut | None = None

    def output_parameters(self) -> OutputParameters[torch.Tensor | None]:
        """What may have a gradient, from the context on."""
        return OutputParameters(self.weight, self.bias, self.norm_weight, self.norm_bias)


class FeedForwardArguments(NamedTuple):
    """What the feed-forward block takes beside the hidden states.

    Attributes:
        up_weight, up_bias: (intermediate, hidden) and (intermediate,).
        weight, bias: (hidden, intermediate) and (hidden,).
        norm_weight, norm_bias, eps: as in `layer_norm.add_layer_norm`.
        activation: as in `bias_activation.bias_activation`.
        fused: as in `feed_forward.feed_forward`; needs up_bias.
        hidden_dropout_p, seed, hidden_stream: of the dropout before the norm.
    """

    up_weight: torch.Tensor
    up_bias: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor | None
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    eps: float
    activation: str
    fused: bool
    hidden_dropout_p: float
    seed: torch.Tensor | None
    hidden_stream: int

    def parameters(self) -> FeedForwardParameters[torch.Tensor | None]:
        """What may have a gradient."""
        return FeedForwardParameters(
            self.up_weight, self.up_bias, self.weight, self.bias, self.norm_weight, self.norm_bias
        )


class NormSaved(NamedTuple):
    """What a block keeps of its norm.

    Attributes:
        normed: like the block's result, the norm without weight and bias.
        stats: what the norm op returned.
        weight: (hidden,).
    """

    normed: torch.Tensor
    stats: torch.Tensor
    weight: torch.Tensor


class AttentionSaved(NamedTuple):
    """What the attention block keeps of what lies before the context.

    Attributes:
        x: the hidden states in the products' dtype.
        qkv_weight: as in `AttentionArguments`, in the products' dtype.
        qkv: (tokens, 3, heads, head_dim).
        stats: what the attention op returned.
        cu_seqlens, mask, head_mask, columns, order, key_spans, seed: as the op took them.
        key_weight, value_weight: so that autograd tells where they have changed meanwhile: of what qkv_weight is a view
            of, it tells of the query's only. None where qkv_weight is a copy in another dtype.
    """

    x: torch.Tensor
    qkv_weight: torch.Tensor
    qkv: torch.Tensor
    stats: torch.Tensor
    cu_seqlens: torch.Tensor | None
    mask: torch.Tensor | None
    head_mask: torch.Tensor | None
    columns: torch.Tensor | None
    order: torch.Tensor | None
    key_spans: torch.Tensor | None
    seed: torch.Tensor | None
    key_weight: torch.Tensor | None
    value_weight: torch.Tensor | None


class OutputSaved(NamedTuple):
    """What the attention block keeps of its output product.

    Attributes:
        context: (tokens, heads, head_dim).
        weight: as in `AttentionArguments`, in the products' dtype.
        seed: of the dropout before the norm.
    """

    context: torch.Tensor
    weight: torch.Tensor
    seed: torch.Tensor | None


class MapSaved(NamedTuple):
    """What a step behind a map that was handed out keeps besides: of the op's arguments what dO V^T is made of."""

    qkv: torch.Tensor
    cu_seqlens: torch.Tensor | None
    columns: torch.Tensor | None


class FeedForwardSaved(NamedTuple):
    """What the feed-forward block keeps beside its norm.

    Attributes:
        x: (tokens, hidden), the hidden states in the products' dtype; None where the backward pass makes them again.
        up_weight, weight: as in `FeedForwardArguments`, in the products' dtype.
        up_bias: as it was, where the activation adds it.
        pre: (tokens, intermediate), what the activation was taken of: with up_bias where fused, else without.
        seed: of the dropout before the norm.
    """

    x: torch.Tensor | None
    up_weight: torch.Tensor
    up_bias: torch.Tensor | None
    weight: torch.Tensor
    pre: torch.Tensor
    seed: torch.Tensor | None


def read(values: Sequence[Any], *kinds: Any) -> list[Any]:
    """Records of these kinds from a flat tuple of their fields, one record after the other.

    Raises:
        ValueError: when the fields are more or fewer than the values.
    """
    records, start = [], 0
    for kind in kinds:
        end = start + len(kind._fields)
        records.append(tuple.__new__(kind, values[start:end]))  # what `_make` does, in half the time
        start = end
    if start != len(values):
        raise ValueError(f"{', '.join(kind.__name__ for kind in kinds)} have {start} fields, got {len(values)} values")
    return records

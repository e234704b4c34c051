"""A batch on its way in, checked and laid out, and on its way out, unpacked and zeroed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn import CrossEntropyLoss

from fastbert.notices import warn_once
from fastbert_kernels.attention_map import in_graph
from fastbert_kernels.backend import check_same_device, has_values

from .attend import Attend
from .first_tokens import first_tokens
from .layout import Layout, dense_layout, pack_unless
from .masks import dense_bias, layer_head_masks, token_mask
from .prefix import place_prefix, prefix_length

#: The label of what has none.
UNLABELLED: int = CrossEntropyLoss().ignore_index

#: What a caller that packs its own batches passes: Hugging Face's names.
PACKED_KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass(frozen=True)
class Inputs:
    """A call's arguments, as they came; `EncoderModel.forward` says what each may be.

    Attributes:
        packed: those of `PACKED_KEYWORDS` that are not None.
    """

    input_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    token_type_ids: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    inputs_embeds: torch.Tensor | None = None
    head_mask: torch.Tensor | None = None
    cache: Any = None
    packed: Mapping[str, Any] = field(default_factory=dict)


class Positions(Protocol):
    """Which positions tokens have that come without: a family's rule.

    Attributes:
        limit: what a model's longest sequence comes from, in a message.
    """

    limit: str

    def positions(self, words: torch.Tensor, before: int = 0) -> torch.Tensor:
        """Of words (batch, seq), ids or (batch, seq, hidden) vectors, after a prefix of length `before`: int64
        (batch | 1, seq)."""

    def packed_positions(self, words: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Of words (1, tokens) in packed sequences: int64 (1, tokens)."""

    def has_rows(self, positions: torch.Tensor) -> bool:
        """Whether a sequence over the longest is all right, for these are its positions."""


@dataclass(frozen=True)
class EncoderShape:
    """What a batch is checked against, and laid out for.

    Attributes:
        name: of the model, in messages.
        layers, heads, head_dim: of the encoder.
        longest: tokens in the longest sequence that the position table has room for.
        weight: a tensor where inputs have to be; None: unknown, as of embeddings that are sharded.
        pools: whether the first column is read by a pooler.
        rule: which positions tokens have.
    """

    name: str
    layers: int
    heads: int
    head_dim: int
    longest: int
    weight: torch.Tensor | None
    pools: bool
    rule: Positions


@dataclass(frozen=True)
class Batch:
    """A checked batch in the layout the encoder works on.

    Attributes:
        layout: how tokens lie.
        bias: additive float32 (batch | 1, heads | 1, seq | 1, seq), or None.
        zeroed: bool (batch, seq), False where the outputs are to be zero because the padding was not dropped.
        embeddings: the keyword arguments of the embeddings, in the layout.
        head_masks: one (heads,) or None a layer.
        attend: what the attention of every layer needs to know, but for the seed, `key_spans` and `by_modules`.
        visible: bool (batch, keys), the mask of keys that `bias` is made of; None where it is of more. A prefix in
            `attend` is counted in by both.
    """

    layout: Layout
    bias: torch.Tensor | None
    zeroed: torch.Tensor | None
    embeddings: dict[str, torch.Tensor | None]
    head_masks: list[torch.Tensor | None]
    attend: Attend
    visible: torch.Tensor | None

    def all_rows(self) -> torch.Tensor | None:
        """The additive mask with all its rows, as Hugging Face makes it, for somebody who may look at it."""
        if self.bias is None or self.bias.shape[2] > 1 or self.attend.prefix is not None:
            return self.bias
        return self.bias.expand(self.layout.batch, 1, self.layout.seq, self.bias.shape[3])

    def check_out(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states in the layout as (batch, seq, hidden), or (batch, 1, hidden) of the first tokens where the last
        layer computes no others; zero at padding. A batch that its caller packed stays packed."""
        first = self.attend.first
        if first is None:
            hidden = self.layout.unpack(hidden)
        elif first.absent is not None:
            hidden = hidden.masked_fill(first.absent[:, None].to(hidden.device), 0.0)
            hidden = hidden if self.layout.indices is None else hidden.transpose(0, 1)
        if self.zeroed is None:
            return hidden
        return hidden.masked_fill(~self.zeroed[:, : hidden.shape[1], None].to(hidden.device), 0.0)

    def hand_out_state(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states in the layout: checked out, and those that the next layer is given, which are made of these."""
        state = self.check_out(hidden)
        if state is hidden or not in_graph(hidden):
            return state, hidden
        if self.zeroed is None:
            return state, self.layout.pack(state)
        return state, torch.where(self.zeroed[:, :, None].to(hidden.device), state, hidden)

    def hand_out_map(self, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities (batch, heads, seq, seq), zero at padding, as their columns already are; and those that the
        context is made of, which are made of these."""
        if self.zeroed is None:
            return probs, probs
        rows = self.zeroed[:, None, :, None].to(probs.device)
        handed = probs.masked_fill(~rows, 0.0)
        return handed, torch.where(rows, handed, probs) if in_graph(probs) else probs


@dataclass(frozen=True)
class Padding:
    """What is to become of padding.

    Attributes:
        drops: whether that of a mask, bool (batch, seq), may be dropped.
        zeroes: where it is not, outputs are to be zero there all the same.
        eager: it is not where somebody could read it: where a row starts with it, which a pooler would read, or where
            `labels` are other than -100.
        labels: int (batch, seq), of rows that are read.
    """

    drops: Callable[[torch.Tensor], bool]
    zeroes: bool = False
    eager: bool = False
    labels: torch.Tensor | None = None

    def is_read(self, mask: torch.Tensor) -> torch.Tensor:
        """Whether somebody reads rows of padding, as a bool scalar on the device of the mask (batch, seq)."""
        if not self.eager:
            return mask.new_zeros(())
        read = ~mask[:, 0].all()
        if self.labels is not None and self.labels.shape == mask.shape:
            read = read | ((self.labels != UNLABELLED) & ~mask).any()
        return read


def check_in(inputs: Inputs, shape: EncoderShape, padding: Padding, reads_first: bool = False) -> Batch:
    """Check a call's arguments, choose the layout, and bring ids or vectors into it.

    Args:
        inputs: the arguments.
        shape: of the model.
        padding: what becomes of it.
        reads_first: the last layer is to compute the first token of each sequence only.

    Raises:
        ValueError: for arguments that contradict each other or the model; the message names them.
    """
    words = _exactly_one(inputs.input_ids, inputs.inputs_embeds, shape.name)
    batch, seq = words.shape[:2]
    before = prefix_length(inputs.cache, shape.layers) or 0
    check_same_device(
        shape.name, model=shape.weight, inputs=words, attention_mask=inputs.attention_mask,
        token_type_ids=inputs.token_type_ids, position_ids=inputs.position_ids, head_mask=inputs.head_mask,
        cache=inputs.cache.layers[0].keys if before else None,
    )  # fmt: skip
    embeddings = {
        "input_ids": inputs.input_ids,
        "inputs_embeds": inputs.inputs_embeds,
        "token_type_ids": _broadcast_ids("token_type_ids", inputs.token_type_ids, batch, seq),
        "position_ids": _broadcast_ids("position_ids", inputs.position_ids, batch, seq),
    }
    if inputs.position_ids is None and not inputs.packed:
        _check_length(before + seq, shape, lambda: shape.rule.positions(words, before))
    mask = inputs.attention_mask
    wide = (batch, shape.heads, seq, before + seq)
    layout = dense_layout(batch, seq)
    bias = zeroed = visible = None
    if inputs.packed:
        layout = _callers_layout(inputs.packed, words, mask, before)
    elif mask is not None and mask.dim() != 2:
        bias = dense_bias(mask, wide)
    elif mask is not None:
        visible = token_mask(mask, batch, before + seq)
        tokens = visible[:, before:]
        drops = padding.drops(tokens) and has_values(tokens) and (not before or bool(visible[:, :before].all()))
        packed = pack_unless(tokens, padding.is_read(tokens)) if drops else None
        if packed is None:
            bias, zeroed = dense_bias(visible[:, None, None, :], wide), tokens if padding.zeroes else None
        else:
            layout, visible = packed, None
    if layout.columns is not None and shape.pools:
        warn_once(
            "fastbert: padding is not at the end of every row; where it is at the start, pooler_output is made of "
            "padding: pad on the right, or set packing=False"
        )
    if inputs.position_ids is None:
        embeddings["position_ids"] = _positions(inputs.packed, words, shape, layout, before)
    if layout.indices is not None:
        embeddings = {name: value if value is None else layout.pack(value) for name, value in embeddings.items()}
    prefix = place_prefix(inputs.cache, layout, shape.heads, shape.head_dim) if before else None
    lies = layout if prefix is None else prefix.layout
    attend = Attend(
        lies.cu_seqlens, lies.max_seqlen, lies.order, lies.seq, lies.columns, prefix=prefix,
        first=first_tokens(layout, seq if inputs.packed else layout.tokens) if reads_first else None,
    )  # fmt: skip
    bias = bias if bias is None or prefix is None else prefix.widen(bias)
    head_masks = layer_head_masks(inputs.head_mask, shape.layers, shape.heads)
    return Batch(layout, bias, zeroed, embeddings, head_masks, attend, visible)


def _positions(
    packed: Mapping[str, Any], words: torch.Tensor, shape: EncoderShape, layout: Layout, before: int
) -> torch.Tensor | None:
    """Positions of a batch that came without; None where the embeddings make the same."""
    if packed:
        positions = shape.rule.packed_positions(words, packed["cu_seq_lens_q"])  # they restart with each sequence
        _check_length(layout.seq, shape, lambda: positions)
        return positions
    if before or layout.indices is not None:
        return shape.rule.positions(words, before).expand(words.shape[:2])
    return None


def _callers_layout(packed: Mapping[str, Any], words: torch.Tensor, mask: torch.Tensor | None, before: int) -> Layout:
    """The layout of a batch that its caller packed."""
    if before:
        raise ValueError("a packed batch takes no cache: pass a padded one, or leave it out")
    missing = [name for name in PACKED_KEYWORDS if name not in packed]
    if missing:
        raise ValueError(f"a packed batch needs all of {', '.join(PACKED_KEYWORDS)}: {', '.join(missing)} missing")
    cu_q, cu_k, longest, longest_k = (packed[name] for name in PACKED_KEYWORDS)
    if words.shape[0] != 1:
        raise ValueError(f"a packed batch has inputs of shape (1, tokens), got batch {words.shape[0]}")
    if mask is not None and not bool(mask.dim() == 2 and mask.to(torch.bool).all()):
        raise ValueError(f"a packed batch has no padding: leave attention_mask {tuple(mask.shape)} out")
    check_same_device("a packed batch", inputs=words, cu_seq_lens_q=cu_q, cu_seq_lens_k=cu_k)
    if int(longest) != int(longest_k) or cu_q.shape != cu_k.shape or (cu_q is not cu_k and not torch.equal(cu_q, cu_k)):
        raise ValueError("self-attention needs cu_seq_lens_q equal to cu_seq_lens_k and max_length_q to max_length_k")
    sequences = cu_q.shape[0] - 1
    return Layout(sequences, int(longest), None, cu_q.to(torch.int32), int(longest), None)


def _exactly_one(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, name: str) -> torch.Tensor:
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"{name} needs exactly one of input_ids and inputs_embeds, got {given}")
    words = inputs_embeds if input_ids is None else input_ids
    if not isinstance(words, torch.Tensor):
        raise TypeError(
            f"{name} needs tensors, got {type(words).__name__}: call it by model(**batch), with a batch of "
            'tokenizer(texts, padding=True, return_tensors="pt")'
        )
    if input_ids is not None and (words.dim() != 2 or words.is_floating_point() or words.dtype == torch.bool):
        raise ValueError(f"input_ids must be integers of shape (batch, seq), got {words.dtype} {tuple(words.shape)}")
    if input_ids is None and words.dim() != 3:
        raise ValueError(f"inputs_embeds must have shape (batch, seq, hidden), got {tuple(words.shape)}")
    if 0 in words.shape[:2]:
        raise ValueError(f"an empty batch cannot be encoded: got batch {words.shape[0]} and length {words.shape[1]}")
    return words


def _check_length(length: int, shape: EncoderShape, positions: Callable[[], torch.Tensor]) -> None:
    if length > shape.longest and not shape.rule.has_rows(positions()):
        raise ValueError(
            f"sequence length {length} is over {shape.rule.limit}: truncate the input (tokenizer(..., "
            "truncation=True)), or pass position_ids"
        )


def _broadcast_ids(name: str, ids: torch.Tensor | None, batch: int, seq: int) -> torch.Tensor | None:
    if ids is None:
        return None
    if ids.dim() > 2 or ids.shape[-1:] != (seq,) or (ids.dim() == 2 and ids.shape[0] not in (1, batch)):
        raise ValueError(f"{name} must be ({batch}, {seq}) like the input, or (1, {seq}), got {tuple(ids.shape)}")
    return ids.expand(batch, seq)

"""`BertModel` on the fused modules.

Data flows down this page: arguments are checked, the padded batch is packed once, embedded, run through the layers,
and unpacked once. Batch and sequence exist only at these two doors.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import BertConfig
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.bert import modeling_bert as hf
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from fastbert_kernels import uses_triton
from fastbert_kernels.backend import check_same_device

from .masks import dense_bias, layer_head_masks, token_mask
from .modules import FusedEmbeddings, FusedLayer, attends_fused, draw_seed, fuse_modules
from .notices import say_once, warn_once
from .packing import Layout, dense_layout, packed_layout
from .plain import foreign_hooks, is_plain_embedding
from .prefix import place_prefix, prefix_length
from .reading import ROWS, FirstRows, first_rows

#: What a caller that packs its own batches passes: Hugging Face's names.
_PACKED_KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass(frozen=True)
class _Batch:
    """A checked batch in the layout the encoder works on.

    Attributes:
        layout: how tokens lie.
        bias: additive float32 (batch | 1, heads | 1, seq | 1, seq), or None.
        zeroed: bool (batch, seq), False where the outputs are to be zero because the padding was not dropped.
        embeddings: the keyword arguments of the embeddings, in the layout.
    """

    layout: Layout
    bias: torch.Tensor | None
    zeroed: torch.Tensor | None
    embeddings: dict[str, torch.Tensor | None]

    def check_out(self, hidden: torch.Tensor, first: FirstRows | None = None) -> torch.Tensor:
        """The door out: hidden states (batch, seq, hidden), or (batch, 1, hidden) of the first rows; zero at padding.
        A batch that its caller packed stays packed."""
        if first is None:
            hidden = self.layout.unpack(hidden)
        elif first.absent is not None:
            hidden = hidden.masked_fill(first.absent[:, None], 0.0)
            hidden = hidden if self.layout.indices is None else hidden.transpose(0, 1)
        return hidden if self.zeroed is None else hidden.masked_fill(~self.zeroed[:, : hidden.shape[1], None], 0.0)

    def check_out_map(self, probs: torch.Tensor) -> torch.Tensor:
        """Probabilities (batch, heads, seq, seq), zero at padding; its columns already are."""
        return probs if self.zeroed is None else probs.masked_fill(~self.zeroed[:, None, :, None], 0.0)


class BertModel(transformers.BertModel):
    """Hugging Face's `BertModel` on fused kernels: same parameters, same call, same outputs.

    Differences, all documented in README: padding gives zeros, `head_mask` works, and attentions come from the fast
    path. `packing = False` keeps every row, padding included, equal to Hugging Face's eager attention.
    """

    #: Drop padding on the way in. Rows of padding are then zero on the way out.
    packing: bool = True
    #: Which rows of `last_hidden_state` are read: "all", or "first", that of each sequence's first position. The last
    #: layer then computes no others, and `last_hidden_state` is (batch, 1, hidden); all the same where hidden states or
    #: attentions are asked for. `fastbert.skip_unread` sets it for a head that reads the pooled output only.
    read_rows: str = "all"

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(own_config(config), add_pooling_layer=add_pooling_layer)
        fuse_modules(self)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        return eager_semantics(attn_implementation)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        head_mask: torch.Tensor | None = None,
        output_attentions: bool | int | list[int] | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple[Any, ...]:
        """Encode a batch.

        Args:
            input_ids: int (batch, seq). Exactly one of this and `inputs_embeds`.
            attention_mask: (batch, seq) with 1 at tokens (bool, int, or float 0 and 1); or (batch, seq, seq) or
                broadcasting to (batch, heads, seq, seq): bool or int with true at visible keys, or additive float.
            token_type_ids, position_ids: int (batch, seq) or (1, seq).
            inputs_embeds: (batch, seq, hidden) in place of the word embeddings.
            encoder_hidden_states, encoder_attention_mask, use_cache: of decoders, which run on Hugging Face's own path.
            past_key_values: a `DynamicCache` with keys and values (batch, heads, length, head_dim) that every sequence
                sees before its own in each layer, as prefix tuning passes. Read, never added to. Positions and columns
                of masks and attentions then start with it: `attention_mask` is (batch, length + seq).
            head_mask: (heads,) or (layers, heads), factors on the attention probabilities after dropout.
            output_attentions, output_hidden_states: True for all, or the indices wanted: the tuple keeps its length,
                with None at the others. Default: the configuration's.
            return_dict: False for a tuple. Default: the configuration's.
            cu_seq_lens_q, cu_seq_lens_k: int32 (sequences + 1,), for a batch the caller packed: inputs are then
                (1, tokens), the outputs (1, tokens, hidden), and the attentions (sequences, heads, max_length_q,
                max_length_q). Positions restart with each sequence unless `position_ids` says otherwise.
            max_length_q, max_length_k: the longest of those sequences.
            read_rows: in place of the attribute of that name, for this call.

        Returns:
            `last_hidden_state` (batch, seq, hidden), `pooler_output` (batch, hidden), and, when asked,
            `hidden_states`, layers + 1 times (batch, seq, hidden), and `attentions`, layers times (batch, heads, seq,
            seq). All zero at padding, unless `packing` is False.

        Raises:
            ValueError: for inputs that contradict each other; the message names them.
            TypeError: for a dtype that no kernel has.
        """
        graphs = kwargs.pop("graphs", None)  # `graphs.inference.Graphed`, when the call comes from one
        return_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        wants_maps = self.config.output_attentions if output_attentions is None else output_attentions
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        labelled = kwargs.pop("labelled", None)  # of a head that reads these rows only
        pools_each = kwargs.pop("pools_each", False)  # of a recorded step: pools every sequence of a packed batch
        read_rows = kwargs.pop("read_rows", self.read_rows)
        reason = self._leaves_fast_path(encoder_hidden_states, past_key_values)
        if reason is not None:
            if labelled is not None:
                raise ValueError(f"read_rows='labelled' has no effect on Hugging Face's own path ({reason}): set 'all'")
            warn_once(f"fastbert: BertModel takes Hugging Face's own path: {reason}")
            if head_mask is not None:
                raise ValueError(f"head_mask has no effect on Hugging Face's own path ({reason}): leave it out")
            return super().forward(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids,
                position_ids=position_ids, inputs_embeds=inputs_embeds, encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask, past_key_values=past_key_values, use_cache=use_cache,
                output_attentions=wants_maps, output_hidden_states=wants_states, return_dict=return_dict, **kwargs,
            )  # fmt: skip

        if torch.compiler.is_compiling():
            self._say_unfused()
        if kwargs.get("is_causal"):
            raise ValueError("is_causal=True is for decoders: pass a 4-D attention_mask, or use fastbert.unfuse(model)")
        packed = {name: kwargs.get(name) for name in _PACKED_KEYWORDS}
        before = prefix_length(past_key_values, len(self.encoder.layer)) or 0
        batch = None
        if graphs is not None and not torch.compiler.is_compiling():
            asked = {"inputs_embeds": inputs_embeds, "head_mask": head_mask, "past_key_values": past_key_values}
            asked |= {"output_attentions": wants_maps or None, "output_hidden_states": wants_states or None, **packed}
            batch, last = graphs.encode(self, input_ids, attention_mask, token_type_ids, position_ids, asked)
            if last is not None:
                last = last[:, :1] if self._reads_first(read_rows, prefixed=False) else last
                output = BaseModelOutputWithPoolingAndCrossAttentions(
                    last_hidden_state=last, pooler_output=self._pool(last)
                )
                return output if return_dict else output.to_tuple()
        batch = batch or self._check_in(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, head_mask, packed, before
        )
        seed = self._draw_seed()
        layers = len(self.encoder.layer)
        map_layers = _selected(wants_maps, layers)
        state_layers = _selected(wants_states, layers + 1)
        self._check_reentrant(map_layers, before)

        layout, bias, prefix = batch.layout, batch.bias, None
        if before:
            heads = self.config.num_attention_heads
            keys = past_key_values.layers[0].keys
            check_same_device("BertModel", input_ids=input_ids, inputs_embeds=inputs_embeds, past_key_values=keys)
            prefix = place_prefix(past_key_values, layout, heads, self.config.hidden_size // heads)
            layout, bias = prefix.layout, None if bias is None else prefix.widen(bias)
        first = None
        if self._reads_first(read_rows, prefix is not None) and not (map_layers or state_layers):
            words: Any = input_ids if inputs_embeds is None else inputs_embeds
            first = first_rows(layout, words.shape[1] if layout.indices is None else layout.indices.shape[0])
        seeded = {"seed": seed} if isinstance(self.embeddings, FusedEmbeddings) else {}
        encoded = self.encoder(
            self.embeddings(**batch.embeddings, **seeded),
            bias,
            head_masks=layer_head_masks(head_mask, layers, self.config.num_attention_heads),
            state_layers=state_layers,
            map_layers=map_layers,
            map_seq=layout.seq,
            map_columns=layout.columns,
            seed=seed,
            cu_seq_lens_q=layout.cu_seqlens,
            cu_seq_lens_k=layout.cu_seqlens,
            max_length_q=layout.max_seqlen,
            max_length_k=layout.max_seqlen,
            order=layout.order,
            prefix=prefix,
            first=first,
        )

        last = batch.check_out(encoded.last_hidden_state, first)
        states = maps = None
        if wants_states:
            *inner, final = encoded.hidden_states
            states = tuple(None if state is None else batch.check_out(state) for state in inner)
            states = (*states, None if final is None else last)
        if wants_maps:
            maps = tuple(None if probs is None else batch.check_out_map(probs) for probs in encoded.attentions)
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=last if labelled is None else last[labelled],
            pooler_output=self._pool(last, layout.cu_seqlens if pools_each else None),
            hidden_states=states,
            attentions=maps,
            cross_attentions=() if wants_maps else None,
        )
        return output if return_dict else output.to_tuple()

    def _check_in(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        head_mask: torch.Tensor | None,
        packed: dict[str, Any],
        before: int,
        packs: bool = False,
    ) -> _Batch:
        """The door in: check the arguments, choose the layout, bring ids or vectors into it. `before` is the length of
        the prefix; `packs` says that nothing inside wants the padding, as its caller knows."""
        words = _exactly_one(input_ids, inputs_embeds)
        batch, seq = words.shape[:2]
        positions = self.embeddings.position_embeddings
        check_same_device(
            "BertModel", model=positions.weight if is_plain_embedding(positions) else None, inputs=words,
            attention_mask=attention_mask, token_type_ids=token_type_ids, position_ids=position_ids,
            head_mask=head_mask,
        )  # fmt: skip
        position_ids = _broadcast_ids("position_ids", position_ids, batch, seq)
        token_type_ids = _broadcast_ids("token_type_ids", token_type_ids, batch, seq)
        embeddings = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        longest = self.config.max_position_embeddings

        if any(value is not None for value in packed.values()):
            if before:
                raise ValueError("a packed batch takes no past_key_values: pass a padded one, or leave them out")
            layout = _callers_layout(packed, words, attention_mask)
            if position_ids is None:
                _check_length(layout.seq, longest)
                cu_seqlens = packed["cu_seq_lens_q"]
                starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=seq)
                embeddings["position_ids"] = (torch.arange(seq, device=words.device) - starts)[None]
            return _Batch(layout, None, None, embeddings)

        if position_ids is None:
            _check_length(before + seq, longest)
            if before:
                embeddings["position_ids"] = self.embeddings.position_ids[:, before : before + seq].expand(batch, seq)
        layout = dense_layout(batch, seq)
        if attention_mask is None:
            return _Batch(layout, None, None, embeddings)
        wide = (batch, self.config.num_attention_heads, seq, before + seq)
        if attention_mask.dim() != 2:
            return _Batch(layout, dense_bias(attention_mask, wide), None, embeddings)

        whole_mask = token_mask(attention_mask, batch, before + seq)
        mask = whole_mask[:, before:]
        if (not packs and self._keeps_shape()) or (before and not bool(whole_mask[:, :before].all())):
            bias = dense_bias(whole_mask[:, None, None, :], wide)
            return _Batch(layout, bias, mask if self.packing else None, embeddings)
        layout = packed_layout(mask)
        if layout.columns is not None and self.pooler is not None:
            warn_once(
                "fastbert: padding is not at the end of every row; where it is at the start, pooler_output is made of "
                "padding: pad on the right, or set packing=False"
            )
        if layout.indices is not None and embeddings["position_ids"] is None:
            embeddings["position_ids"] = self.embeddings.position_ids[:, :seq].expand(batch, seq)
        return _Batch(layout, None, None, {k: None if v is None else layout.pack(v) for k, v in embeddings.items()})

    def _keeps_shape(self) -> bool:
        """Whether a padded batch keeps its shape inside: by choice, under torch.compile, whose graphs have no place
        for a number of tokens that depends on the data, and where someone's hook inside expects it."""
        if not self.packing or torch.compiler.is_compiling():
            return True
        hooked = [name for name in foreign_hooks(self) if not name.startswith("pooler")]  # outside both doors
        if hooked:
            warn_once(f"fastbert: padding is kept because of forward hooks on {', '.join(hooked[:3])}")
        unfused = [i for i, layer in enumerate(self.encoder.layer) if not attends_fused(layer)]
        if unfused:
            warn_once(f"fastbert: padding is kept because attention is not fused in layers {unfused}")
        return bool(hooked or unfused)

    def _reads_first(self, read_rows: str, prefixed: bool) -> bool:
        """Whether the last layer is to compute first rows only, and can."""
        if read_rows not in ROWS:
            raise ValueError(f"unknown read_rows {read_rows!r}: a BertModel takes one of {', '.join(ROWS)}")
        if read_rows == "all":
            return False
        reason = "it is given past_key_values" if prefixed else self._last_layer_computes_all()
        if reason is not None:
            warn_once(f"fastbert: the last layer computes every row, read or not: {reason}")
        return reason is None

    def _last_layer_computes_all(self) -> str | None:
        """Why the last layer cannot compute first rows only."""
        layer: Any = self.encoder.layer[-1]
        if not (isinstance(layer, FusedLayer) and attends_fused(layer)):
            return f"it is not fused ({type(layer).__name__})"
        if layer.attention.self.watcher is not None:
            return "distill.capture looks at it"
        inner = f"encoder.layer.{len(self.encoder.layer) - 1}"
        hooked = [name for name in foreign_hooks(self) if name == "encoder" or f"{name}.".startswith(f"{inner}.")]
        return f"forward hooks on {', '.join(hooked[:3])}" if hooked else None

    def _pool(self, last: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor | None:
        """What the pooler makes of `last` (batch, seq, hidden); or, with cu_seqlens, of each sequence packed in `last`
        (1, tokens, hidden), an empty one reading zeros as padding does: (batch, hidden)."""
        if self.pooler is None:
            return None
        if cu_seqlens is not None:
            starts = cu_seqlens[:-1].clamp(max=last.shape[1] - 1)
            last = last[0].index_select(0, starts).masked_fill((cu_seqlens.diff() == 0)[:, None], 0.0)[:, None]
        return self.pooler(last)

    def _draw_seed(self) -> torch.Tensor | None:
        """One seed for all dropout of this forward pass, or None where the kernels draw none."""
        weight = self.embeddings.position_embeddings.weight
        if not self.training or not uses_triton(weight):
            return None
        return draw_seed(weight.device)

    @torch.compiler.assume_constant_result
    def _say_unfused(self) -> None:
        """Log once which layers a graph leaves unfused, and why: traced code cannot log, this runs while tracing."""
        from .fusing import explain  # which imports this module

        explanation = explain(self)
        if any(part.reason for part in explanation.parts):
            say_once(f"fastbert: not every part of a compiled model is fused:\n{explanation}")

    def _leaves_fast_path(self, encoder_hidden_states: Any, past_key_values: Any) -> str | None:
        if self.config.is_decoder:
            return "it is a decoder (config.is_decoder)"
        if encoder_hidden_states is not None:
            return "it was given encoder_hidden_states"
        if past_key_values is None:
            return None
        if prefix_length(past_key_values, len(self.encoder.layer)) is None:
            return "it was given past_key_values that are not one prefix a layer"
        unfused = [i for i, layer in enumerate(self.encoder.layer) if not attends_fused(layer)]
        return f"it was given past_key_values, and attention is not fused in layers {unfused}" if unfused else None

    def _check_reentrant(self, map_layers: set[int], before: int) -> None:
        """Reentrant checkpointing gives a gradient to the hidden states alone."""
        if not (self.training and torch.is_grad_enabled()):
            return
        layer: Any = self.encoder.layer[0]
        if not (layer.gradient_checkpointing and layer._gradient_checkpointing_func.keywords.get("use_reentrant")):
            return
        if before:
            raise ValueError(
                "reentrant gradient checkpointing gives past_key_values no gradient: use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        if map_layers:
            warn_once(
                "fastbert: reentrant gradient checkpointing detaches attentions, so no gradient will reach the model "
                "through them: use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )


def own_config(config: BertConfig) -> BertConfig:
    """A configuration whose attention name we may set: another model may share this one and want its own."""
    return config if config._attn_implementation in (None, "eager") else copy.deepcopy(config)


def eager_semantics(requested: str | None) -> str:
    """The attention name our models carry: their semantics are eager's, and only under that name does Hugging Face
    allow attentions."""
    if requested not in (None, "eager"):
        warn_once(f"fastbert: attn_implementation={requested!r} is not used: attention runs on fastbert's own kernels")
    return "eager"


def _selected(wanted: bool | int | Iterable[int] | None, count: int) -> set[int]:
    """The indices an `output_*` argument selects among `count`; those out of range select nothing."""
    if wanted is None or wanted is False or wanted is True:
        return set(range(count)) if wanted else set()
    indices = ([wanted] if wanted else []) if isinstance(wanted, int) else wanted
    return {i % count for i in indices if -count <= i < count}


def _exactly_one(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"BertModel needs exactly one of input_ids and inputs_embeds, got {given}")
    words = inputs_embeds if input_ids is None else input_ids
    assert words is not None
    if input_ids is not None and (words.dim() != 2 or words.is_floating_point() or words.dtype == torch.bool):
        raise ValueError(f"input_ids must be integers of shape (batch, seq), got {words.dtype} {tuple(words.shape)}")
    if input_ids is None and words.dim() != 3:
        raise ValueError(f"inputs_embeds must have shape (batch, seq, hidden), got {tuple(words.shape)}")
    if 0 in words.shape[:2]:
        raise ValueError(f"an empty batch cannot be encoded: got batch {words.shape[0]} and length {words.shape[1]}")
    return words


def _check_length(length: int, longest: int) -> None:
    if length > longest:
        raise ValueError(
            f"sequence length {length} is over the model's max_position_embeddings={longest}: truncate the input "
            "(tokenizer(..., truncation=True)), or pass position_ids"
        )


def _broadcast_ids(name: str, ids: torch.Tensor | None, batch: int, seq: int) -> torch.Tensor | None:
    if ids is None:
        return None
    if ids.dim() > 2 or ids.shape[-1:] != (seq,) or (ids.dim() == 2 and ids.shape[0] not in (1, batch)):
        raise ValueError(f"{name} must be ({batch}, {seq}) like the input, or (1, {seq}), got {tuple(ids.shape)}")
    return ids.expand(batch, seq)


def _callers_layout(packed: dict[str, Any], words: torch.Tensor, mask: torch.Tensor | None) -> Layout:
    """The layout of a batch that its caller packed."""
    missing = [name for name, value in packed.items() if value is None]
    if missing:
        raise ValueError(f"a packed batch needs all of {', '.join(_PACKED_KEYWORDS)}: {', '.join(missing)} missing")
    cu_q, cu_k, longest, longest_k = (packed[name] for name in _PACKED_KEYWORDS)
    if words.shape[0] != 1:
        raise ValueError(f"a packed batch has inputs of shape (1, tokens), got batch {words.shape[0]}")
    if mask is not None and not bool(mask.dim() == 2 and mask.to(torch.bool).all()):
        raise ValueError(f"a packed batch has no padding: leave attention_mask {tuple(mask.shape)} out")
    check_same_device("a packed batch", inputs=words, cu_seq_lens_q=cu_q, cu_seq_lens_k=cu_k)
    if int(longest) != int(longest_k) or cu_q.shape != cu_k.shape or (cu_q is not cu_k and not torch.equal(cu_q, cu_k)):
        raise ValueError("self-attention needs cu_seq_lens_q equal to cu_seq_lens_k and max_length_q to max_length_k")
    sequences = cu_q.shape[0] - 1
    return Layout(sequences, int(longest), None, cu_q.to(torch.int32), int(longest), None)


# Hugging Face keeps, by class, what its own path may record; a model fused in place never passed its constructor.
_CAN_RECORD_REGISTRY.setdefault(str(BertModel), hf.BertPreTrainedModel._can_record_outputs)

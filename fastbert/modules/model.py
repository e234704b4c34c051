"""The way of a batch through a fused encoder model, on one page: in, embed, layers, out."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, ModelOutput

from fastbert.batch.batch import PACKED_KEYWORDS, EncoderShape, Inputs, Padding, check_in
from fastbert.batch.first_tokens import READ_ROWS
from fastbert.batch.prefix import CACHE, either, prefix_length
from fastbert.notices import say_once, warn_of_padding, warn_once
from fastbert_kernels import uses_triton
from fastbert_kernels.backend import has_values
from fastbert_kernels.sequences import key_spans

from .attention import attends_fused
from .call import Outputs, Plan, asked_for
from .dropout import draw_seed
from .explaining import Explanation, explain_encoder
from .layer import FusedLayer
from .look import strangers_in
from .packing import Strangers, check_packing, find_strangers, is_captured, named_layers, why_kept, why_read
from .readable import PATCHED, as_if_gathered, foreign_hooks, is_plain_embedding
from .strangers import hooked_wrapper, takes_ours, unwrapped, why_mixes, why_strange
from .swap import eager_semantics, fuse_modules, is_decoder, is_patched, own_config

#: What some families have not, and Hugging Face's models of those ignore.
NOT_EVERYWHERE = ("token_type_ids", "encoder_hidden_states", "encoder_attention_mask", "cache", "past_key_values")


class EncoderModel(nn.Module):
    """Hugging Face's encoder model on fused modules: same parameters, same call, same outputs.

    What is handed out equals eager's, rows of padding included; besides, `head_mask` works, and attentions come from
    the fast path.
    """

    config: Any
    device: Any
    embeddings: Any
    encoder: Any
    pooler: Any

    #: What its stack of layers is called, and the parts of a layer that `fastbert.explain` speaks of, by their path.
    encoder_name = "encoder"
    layer_parts: tuple[str, ...] = ("attention.self", "attention.output", "intermediate", "output")
    #: Hugging Face's class of its output, and the names in it.
    output_class: type[ModelOutput] = BaseModelOutputWithPoolingAndCrossAttentions
    output_names: frozenset[str]

    #: Whether padding is dropped on the way in: "auto", where nobody reads its rows; True, everywhere, and its rows are
    #: zero on the way out; False, nowhere.
    packing: bool | str = "auto"
    #: What of the output is read, where nobody says it for a call: one of `packing.READS`.
    reads: str = "all"
    #: Which rows of `last_hidden_state` are read: "all", or "first", that of each sequence's first position. The last
    #: layer then computes no others, and `last_hidden_state` is (batch, 1, hidden); all the same where hidden states or
    #: attentions are asked for. `fastbert.skip_unread` sets it for a head that reads the pooled output only.
    read_rows: str = "all"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.output_names = frozenset(field.name for field in dataclasses.fields(cls.output_class))

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(own_config(config), *args, **kwargs)
        fuse_modules(self)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        return eager_semantics(attn_implementation)

    def extra_repr(self) -> str:
        """What `print` says of the model beside its modules."""
        return f"fused by fastbert, packing={self.packing}"

    @property
    def layers(self) -> Any:
        """The encoder's layers."""
        return self.encoder.layer

    @property
    def longest(self) -> int:
        """Tokens in the longest sequence that it takes without `position_ids`."""
        return getattr(self.embeddings, "longest", self.config.max_position_embeddings)

    @property
    def score_bias(self) -> nn.Module | None:
        """What makes a learned bias of attention's scores from the columns of tokens, where a family has one; the mask
        that layers are given has it in it."""
        return None

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
        head_mask: torch.Tensor | None = None,
        output_attentions: bool | int | list[int] | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Encode a batch.

        Args:
            input_ids: int (batch, seq). Exactly one of this and `inputs_embeds`.
            attention_mask: (batch, seq) with 1 at tokens (bool, int, or float 0 and 1); or (batch, seq, seq) or
                broadcasting to (batch, heads, seq, seq): bool or int with true at visible keys, or additive float.
            token_type_ids, position_ids: int (batch, seq) or (1, seq).
            inputs_embeds: (batch, seq, hidden) in place of the word embeddings.
            encoder_hidden_states, encoder_attention_mask, use_cache: of decoders, which run on Hugging Face's own path.
            cache: a `DynamicCache` with keys and values (batch, heads, length, head_dim) that every sequence sees
                before its own in each layer, as prefix tuning passes. Read, never added to. Positions and columns of
                masks and attentions then start with it: `attention_mask` is (batch, length + seq).
            head_mask: (heads,) or (layers, heads), factors on the attention probabilities after dropout.
            output_attentions, output_hidden_states: True for all, or the indices wanted: the tuple keeps its length,
                with None at the others. Default: the configuration's.
            return_dict: False for a tuple. Default: the configuration's.
            past_key_values: the cache's name before transformers 5.24, which counts where `cache` is not given.
            cu_seq_lens_q, cu_seq_lens_k: int32 (sequences + 1,), for a batch the caller packed: inputs are then
                (1, tokens), the outputs (1, tokens, hidden), and the attentions (sequences, heads, max_length_q,
                max_length_q). Positions restart with each sequence unless `position_ids` says otherwise.
            max_length_q, max_length_k: the longest of those sequences.
            read_rows, packing: in place of the attributes of these names, for this call.

        Returns:
            Hugging Face's output class, or a tuple: `last_hidden_state` (batch, seq, hidden), `pooler_output` (batch,
            hidden) where there is a pooler, and, when asked,
            `hidden_states`, layers + 1 times (batch, seq, hidden), and `attentions`, layers times (batch, heads, seq,
            seq). Where padding was dropped, zero at padding.

        Raises:
            ValueError: for inputs that contradict each other; the message names them.
            TypeError: for a dtype that no kernel has.
        """
        plan = kwargs.pop("plan", None) or Plan()
        read_rows = kwargs.pop("read_rows", self.read_rows)
        packing = kwargs.pop("packing", self.packing)
        cache = either(cache, past_key_values)
        packed = {name: kwargs[name] for name in PACKED_KEYWORDS if kwargs.get(name) is not None}
        inputs = Inputs(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, head_mask, cache, packed
        )
        outputs = asked_for(self.config, len(self.layers), output_attentions, output_hidden_states, return_dict)
        reason = self._leaves_fast_path(encoder_hidden_states, cache)
        if reason is not None:
            of_decoder = {
                "encoder_hidden_states": encoder_hidden_states,
                "encoder_attention_mask": encoder_attention_mask,
                "use_cache": use_cache,
            }
            return self._forward_elsewhere(reason, plan, inputs, outputs, of_decoder, kwargs)
        if torch.compiler.is_compiling():
            self._say_unfused()
        if kwargs.get("is_causal"):
            raise ValueError("is_causal=True is for decoders: pass a 4-D attention_mask, or use fastbert.unfuse(model)")
        reads_first = self._reads_first(read_rows, cache is not None, outputs)
        if plan.replay is not None and plan.replay.takes(self, inputs, outputs):
            padding = self._padding(packing, plan, outputs, why_read)
            last = plan.replay.replay(check_in(inputs, self.encoder_shape(), padding))
            if last is not None:
                return self._made(last[:, :1] if reads_first else last, None, None, None, outputs, plan)
        look = Strangers(self)
        why = functools.partial(why_kept, strangers=look)
        batch = check_in(inputs, self.encoder_shape(), self._padding(packing, plan, outputs, why), reads_first)
        seed = self._draw_seed()
        self._check_reentrant(outputs, batch.attend.prefix is not None)
        hidden = self.embed(batch.embeddings, seed)
        compiled = torch.compiler.is_compiling()
        strangers = batch.bias is not None and (self._has_strangers() if compiled else look.first is not None)
        # Strangers may give a layer another mask.
        spans = None if batch.visible is None or strangers else key_spans(batch.visible)
        by_modules = self._is_captured_and_checkpointed()
        encoded = self.encoder(
            hidden,
            batch.all_rows() if strangers else batch.bias,
            attend=dataclasses.replace(batch.attend, seed=seed, key_spans=spans, by_modules=by_modules),
            head_masks=batch.head_masks,
            state_layers=outputs.states,
            map_layers=outputs.maps,
            hand_out_state=batch.hand_out_state,
            hand_out_map=batch.hand_out_map,
        )
        last = batch.check_out(encoded.last_hidden_state)
        states = maps = None
        if outputs.wants_states:
            *inner, final = encoded.hidden_states
            states = (*inner, None if final is None else last)
        if outputs.wants_maps:
            maps = encoded.attentions
        return self._made(last, states, maps, batch.layout.cu_seqlens, outputs, plan)

    def encoder_shape(self) -> EncoderShape:
        """What `batch.check_in` knows of this model."""
        positions = self.embeddings.position_embeddings
        return EncoderShape(
            name=type(self).__name__,
            layers=len(self.layers),
            heads=self.config.num_attention_heads,
            head_dim=self.config.hidden_size // self.config.num_attention_heads,
            longest=self.longest,
            weight=positions.weight if is_plain_embedding(positions) else None,
            pools=getattr(self, "pooler", None) is not None,
            rule=self.embeddings,
        )

    def embed(self, words: Mapping[str, torch.Tensor | None], seed: torch.Tensor | None = None) -> torch.Tensor:
        """The first hidden states, of the embeddings' arguments in a batch's layout."""
        seeded = {"seed": seed} if takes_ours(self.embeddings) else {}
        return self.embeddings(**words, **seeded)

    def named_before_layers(self) -> list[tuple[str, nn.Module]]:
        """The modules that come before the layers, by name."""
        return [("embeddings", self.embeddings)]

    @torch.compiler.assume_constant_result
    def _has_strangers(self) -> bool:
        return any(True for _ in find_strangers(self))

    def _made(
        self,
        last: torch.Tensor,
        states: tuple[torch.Tensor | None, ...] | None,
        maps: tuple[torch.Tensor | None, ...] | None,
        cu_seqlens: torch.Tensor | None,
        outputs: Outputs,
        plan: Plan,
    ) -> Any:
        """Hugging Face's output class, or a tuple."""
        more: dict[str, Any] = {}
        pooled = _first_rows(last, cu_seqlens) if plan.pools_each and cu_seqlens is not None else last
        if "pooler_output" in self.output_names:
            more["pooler_output"] = None if getattr(self, "pooler", None) is None else self.pooler(pooled)
        last = pooled if plan.reads == "pooled" else last
        if "cross_attentions" in self.output_names and outputs.wants_maps:
            more["cross_attentions"] = ()
        last = last if plan.labelled is None else last[plan.labelled.to(last.device)]
        output: Any = self.output_class(last_hidden_state=last, hidden_states=states, attentions=maps, **more)
        return output if outputs.as_dict else self.as_tuple(output)

    @staticmethod
    def as_tuple(output: Any) -> tuple[Any, ...]:
        """A family's output as Hugging Face gives it where no class is asked for."""
        return output.to_tuple()

    def _forward_elsewhere(
        self,
        reason: str,
        plan: Plan,
        inputs: Inputs,
        outputs: Outputs,
        of_decoder: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> Any:
        """Log why, and run Hugging Face's own forward; ValueError where something was asked for that only ours has."""
        if plan.labelled is not None:
            raise ValueError(f"read_rows='labelled' has no effect on Hugging Face's own path ({reason}): set 'all'")
        warn_once(f"fastbert: {type(self).__name__} takes Hugging Face's own path: {reason}")
        if inputs.packed and not is_decoder(self):
            raise ValueError(f"{reason}, and knows neither packed sequences nor head_mask: pass a padded batch")
        if inputs.head_mask is not None:
            raise ValueError(f"head_mask has no effect on Hugging Face's own path ({reason}): leave it out")
        if plan.replay is not None:
            plan.replay.refuse(reason)
        names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
        given = {name: getattr(inputs, name) for name in names} | of_decoder | {CACHE: inputs.cache}
        return super().forward(
            **{name: value for name, value in given.items() if value is not None},
            output_attentions=outputs.wants_maps,
            output_hidden_states=outputs.wants_states,
            return_dict=outputs.as_dict,
            **kwargs,
        )

    def _padding(self, packing: Any, plan: Plan, outputs: Outputs, why: Callable[..., str | None]) -> Padding:
        """What becomes of padding in a call, by `why`, one of packing's two questions."""
        check_packing(packing)
        reads = self.what_is_read(plan.reads)

        def drops(mask: torch.Tensor) -> bool:
            whole = bool(outputs.maps or outputs.states)
            reason = why(self, packing, reads, plan.labels is not None, whole)
            if reason is not None and packing is not False:
                # A GPU would have to be waited for.
                tokens = int(mask.sum()) if mask.is_cpu and has_values(mask) else None
                warn_of_padding(reason, tokens, mask.numel())
            return reason is None

        labels = plan.labels if reads == "labelled" else None
        return Padding(drops, zeroes=packing is True, eager=packing == "auto", labels=labels)

    def what_is_read(self, told: str | None = None) -> str:
        """One of `packing.READS`: as the caller told, or the attribute says, unless someone sees more."""
        reads = told or self.reads
        if reads == "all" or foreign_hooks(self):
            return "all"
        return "all" if reads == "pooled" and self._why_pooler_mixes() is not None else reads

    def _why_pooler_mixes(self) -> str | None:
        """Why the pooler may read more than each sequence's first row."""
        pooler = getattr(self, "pooler", None)
        return None if pooler is None else why_mixes(pooler)

    def _reads_first(self, read_rows: str, prefixed: bool, outputs: Outputs) -> bool:
        """Whether the last layer is to compute first rows only, and can."""
        if read_rows not in READ_ROWS:
            raise ValueError(f"unknown read_rows {read_rows!r}: a BertModel takes one of {', '.join(READ_ROWS)}")
        if read_rows == "all":
            return False
        reason = "it is given a cache" if prefixed else self.last_layer_computes_all()
        if reason is not None:
            warn_once(f"fastbert: the last layer computes every row, read or not: {reason}")
        return reason is None and not (outputs.maps or outputs.states)

    @torch.compiler.assume_constant_result
    def last_layer_computes_all(self) -> str | None:
        """Why the last layer cannot compute first rows only."""
        if len(self.layers) == 0:
            return "there is none"
        layer: Any = unwrapped(self.layers[-1])
        if not (isinstance(layer, FusedLayer) and attends_fused(layer)):
            return f"it is not fused ({type(layer).__name__})"
        pooler = self._why_pooler_mixes()
        if pooler is not None:
            return f"pooler ({pooler}) may read it"
        if is_captured(self, slice(-1, None)):
            return "distill.capture looks at it"
        where = f"{self.encoder_name}.layer.{len(self.layers) - 1}"
        found = [(f"{where}{name}", what) for name, what in strangers_in(layer)]
        found += [(where, what) for what in [hooked_wrapper(self.layers[-1])] if what is not None]
        found += [(self.encoder_name, what) for what in [why_strange(self.encoder)] if what is not None]
        for name, what in found:
            return f"forward hooks on {name}" if "hooks" in what else f"{name} ({what}) may look at it"
        return None

    def _is_captured_and_checkpointed(self) -> bool:
        """Whether layers that run again in the backward pass are captured now, and perhaps no longer then."""
        checkpointed = (
            self.training and len(self.layers) > 0 and getattr(self.layers[0], "gradient_checkpointing", False)
        )
        return checkpointed and is_captured(self)

    def _draw_seed(self) -> torch.Tensor | None:
        """One seed for all dropout of this forward pass, or None where the kernels draw none."""
        weight = self.embeddings.position_embeddings.weight
        if not self.training or not uses_triton(weight):
            return None
        return draw_seed(weight.device)

    @torch.compiler.assume_constant_result
    def _say_unfused(self) -> None:
        """Log once which layers a graph leaves unfused, and why: traced code cannot log, this runs while tracing."""
        with as_if_gathered():
            explanation = Explanation(tuple(explain_encoder(self)))
        if any(part.reason for part in explanation.parts):
            say_once(f"fastbert: not every part of a compiled model is fused:\n{explanation}")

    def _leaves_fast_path(self, encoder_hidden_states: Any, cache: Any) -> str | None:
        if is_decoder(self):
            return "it is a decoder (config.is_decoder)"
        if is_patched(self):
            return PATCHED
        if encoder_hidden_states is not None:
            return "it was given encoder_hidden_states"
        for name, module in [(self.encoder_name, self.encoder), *named_layers(self)]:
            if not takes_ours(module):
                return f"{name} ({why_strange(module)}) is not fastbert's"
        if cache is None:
            return None
        if prefix_length(cache, len(self.layers)) is None:
            return "it was given a cache that is not one prefix a layer"
        unfused = [i for i, (_, layer) in enumerate(named_layers(self)) if not attends_fused(layer)]
        return f"it was given a cache, and attention is not fused in layers {unfused}" if unfused else None

    def _check_reentrant(self, outputs: Outputs, prefixed: bool) -> None:
        """Reentrant checkpointing gives a gradient to the hidden states alone."""
        if not (self.training and torch.is_grad_enabled()) or len(self.layers) == 0:
            return
        layer: Any = self.layers[0]
        checkpointed = getattr(layer, "gradient_checkpointing", False)  # some families' layers cannot be
        if not (checkpointed and layer._gradient_checkpointing_func.keywords.get("use_reentrant")):
            return
        if prefixed:
            raise ValueError(
                "reentrant gradient checkpointing gives the cache no gradient: use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        if outputs.maps:
            warn_once(
                "fastbert: reentrant gradient checkpointing detaches attentions, so no gradient will reach the model "
                "through them: use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )


def _first_rows(last: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """The first row of each sequence packed in `last` (1, tokens, hidden), an empty one's being zeros as padding is:
    (sequences, 1, hidden)."""
    starts = cu_seqlens[:-1].clamp(max=last.shape[1] - 1)
    return last[0].index_select(0, starts).masked_fill((cu_seqlens.diff() == 0)[:, None], 0.0)[:, None]

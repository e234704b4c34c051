"""The fused modules: each subclasses one of Hugging Face's and overrides `forward` only.

They are called the Hugging Face way, with hidden states (batch, seq, hidden); or, packed, (1, tokens, hidden) with
`cu_seq_lens_q` and `max_length_q`. Each knows why it would leave the fast path (`unfused_reason`), says so once, and
then runs the forward it inherits.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bert import modeling_bert as hf

from fastbert_kernels import (
    AttentionArguments,
    FeedForwardArguments,
    add_layer_norm,
    attention,
    attention_block,
    bias_activation,
    embed,
    feed_forward_block,
    feed_forward_is_fused,
    layer_block,
    runs_as_block,
    uses_triton,
)
from fastbert_kernels.attention import MAX_HEAD_DIM

from .notices import warn_once
from .plain import (
    describe,
    is_called,
    is_plain_dropout,
    is_plain_embedding,
    is_plain_layer_norm,
    is_plain_linear,
    wants_grad_output,
)
from .prefix import Prefix
from .projection import (
    APART,
    can_be_neighbours,
    can_stack,
    in_own_storage,
    made_one,
    project,
    project_qkv,
    project_together,
    qkv_parameters,
    rehome,
    separate,
)
from .reading import FirstRows

#: Module class of an activation -> the kernels' name for its formula.
KERNEL_ACTIVATIONS: dict[type[nn.Module], str] = {
    type(ACT2FN[name]): kernel
    for kernel, names in {
        "gelu": ("gelu",),
        "gelu_tanh": ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate"),
        "relu": ("relu",),
        "silu": ("silu",),
    }.items()
    for name in names
}


def draw_seed(device: torch.device) -> torch.Tensor:
    """A seed for the kernels' dropout from torch's generator: int64 scalar on the device."""
    return torch.randint(2**62, (), dtype=torch.int64, device=device)


def _leave(module: nn.Module, reason: str) -> None:
    plain = next(base for base in type(module).__mro__ if base.__module__ == hf.__name__)
    warn_once(f"fastbert: {plain.__name__} runs unfused: {reason}; fastbert.explain(model) says in which layers")


class MapSlot:
    """Where a layer leaves its attention map. Not a container: wrappers that move or cast arguments rebuild those."""

    probs: torch.Tensor | None = None


def _leave_map(slot: MapSlot | None, probs: torch.Tensor | None) -> None:
    if slot is not None and slot.probs is None:  # a checkpointed layer comes here twice
        slot.probs = probs


def _mask_like(mask: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor | None:
    """An additive mask as Hugging Face's own attention takes it: in the dtype of the scores, finite."""
    return None if mask is None else mask.clamp(min=torch.finfo(hidden.dtype).min).to(hidden.dtype)


def _called(**modules: nn.Module) -> str | None:
    """A note on linear layers that are called as modules while the rest around them stays fused."""
    names = [f"{name} ({describe(m, nn.Linear)})" for name, m in modules.items() if not is_plain_linear(m)]
    return f"{', '.join(names)} called as a module" if names else None


def _not_plain(name: str, module: nn.Module, expected: type[nn.Module]) -> str:
    return f"{name} is not a plain nn.{expected.__name__} but {describe(module, expected)}"


def _norm_reason(norm: Any, dropout: Any) -> str | None:
    """Why a LayerNorm and the dropout beside it cannot be one kernel's."""
    if not is_plain_layer_norm(norm):
        return _not_plain("LayerNorm", norm, nn.LayerNorm)
    return None if is_plain_dropout(dropout) else _not_plain("dropout", dropout, nn.Dropout)


class FusedEmbeddings(hf.BertEmbeddings):
    """Three gathers, LayerNorm and dropout in one kernel. Word embeddings that are not plain are called instead."""

    dropout_stream = 0

    def unfused_reason(self) -> str | None:
        for name in ("position_embeddings", "token_type_embeddings"):
            if not is_plain_embedding(getattr(self, name)):
                return _not_plain(name, getattr(self, name), nn.Embedding)
        return _norm_reason(self.LayerNorm, self.dropout)

    def note(self) -> str | None:
        if is_plain_embedding(self.word_embeddings):
            return None
        return f"word_embeddings ({type(self.word_embeddings).__name__}) called as a module"

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values_length: int = 0,
        seed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed (batch, seq) ids, or (batch, seq, hidden) vectors: (batch, seq, hidden)."""
        reason = self.unfused_reason()
        if reason is not None:
            _leave(self, reason)
            return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length)
        if inputs_embeds is None and input_ids is None:
            raise ValueError("the embeddings need input_ids or inputs_embeds, got neither")
        if inputs_embeds is None and not is_plain_embedding(self.word_embeddings):
            warn_once("fastbert: word_embeddings are called as a module; the embeddings around them stay fused")
            inputs_embeds = self.word_embeddings(input_ids)
        words: Any = input_ids if inputs_embeds is None else inputs_embeds
        batch, seq = words.shape[:2]
        if position_ids is None:
            position_ids = self.position_ids[:, past_key_values_length : seq + past_key_values_length]
        if token_type_ids is None:
            token_type_ids = words.new_zeros((1, 1), dtype=torch.long)
        dropout_p = self.dropout.p if self.dropout.training else 0.0
        y = embed(
            words.reshape(batch * seq, *words.shape[2:]),
            position_ids.expand(batch, seq).reshape(-1),
            token_type_ids.expand(batch, seq).reshape(-1),
            self.word_embeddings.weight if inputs_embeds is None else None,
            self.position_embeddings.weight,
            self.token_type_embeddings.weight,
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            self.LayerNorm.eps,
            padding_idx=self.word_embeddings.padding_idx,
            dropout_p=dropout_p,
            seed=_seed(seed, dropout_p, self.position_embeddings.weight),
            stream=self.dropout_stream,
        )
        if wants_grad_output(self.word_embeddings) and torch.is_grad_enabled() and not y.requires_grad:
            y.requires_grad_()
        return y.view(batch, seq, y.shape[1])


def _seed(seed: torch.Tensor | None, dropout_p: float, like: torch.Tensor) -> torch.Tensor | None:
    """The forward pass's seed; where a module is called on its own, with dropout, one of its own."""
    return draw_seed(like.device) if seed is None and dropout_p > 0.0 and uses_triton(like) else seed


class FusedSelfAttention(hf.BertSelfAttention):
    """One product for query, key and value, then one attention kernel that reads its result in place."""

    dropout_stream = 0
    #: Given the projections (tokens, 3, heads, head_dim), cu_seqlens, max_seqlen and the mask of every forward pass,
    #: while `distill.capture` looks on. A hook would cost the batch its packing.
    watcher: Callable[[torch.Tensor, torch.Tensor | None, int, torch.Tensor | None], None] | None = None

    def unfused_reason(self) -> str | None:
        if self.is_decoder or self.is_causal:
            return "causal attention is Hugging Face's own path"
        if self.attention_head_size > MAX_HEAD_DIM:
            return f"head_dim {self.attention_head_size} is over the kernels' {MAX_HEAD_DIM}"
        return None if is_plain_dropout(self.dropout) else _not_plain("dropout", self.dropout, nn.Dropout)

    def note(self) -> str | None:
        if can_stack(self.query, self.key, self.value):
            if torch.compiler.is_compiling():  # a graph stacks copies, wherever the parameters lie
                return None
            groups = qkv_parameters(self.query, self.key, self.value)
            return None if all(parts[0].is_meta or can_be_neighbours(parts) for parts in groups) else APART
        return _called(query=self.query, key=self.key, value=self.value)

    def rehome(self) -> None:
        """Put the three projections' parameters next to each other."""
        if can_stack(self.query, self.key, self.value):
            for parts in qkv_parameters(self.query, self.key, self.value):
                rehome(parts)

    def separate(self) -> None:
        """Give the three projections' parameters storages of their own again."""
        if can_stack(self.query, self.key, self.value):
            for parts in qkv_parameters(self.query, self.key, self.value):
                separate(parts)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Every module's, but each projection in a storage of its own: what saves a model may keep one tensor a
        storage, as accelerate does, or refuse to save a part of one, as safetensors does."""
        state = super().state_dict(*args, **kwargs)
        if not kwargs.get("keep_vars"):
            for name, value in state.items():
                if name.startswith(kwargs.get("prefix", "")) and isinstance(value, torch.Tensor):
                    state[name] = in_own_storage(value)
        return state

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        *,
        head_mask: torch.Tensor | None = None,
        seed: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        max_length_q: int | None = None,
        order: torch.Tensor | None = None,
        map_slot: MapSlot | None = None,
        map_seq: int | None = None,
        map_columns: torch.Tensor | None = None,
        prefix: Prefix | None = None,
        first: FirstRows | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of each sequence with itself.

        Args:
            hidden_states: (batch, seq, hidden), or packed (1, tokens, hidden).
            attention_mask: additive or bool (batch | 1, heads | 1, seq | 1, seq); None when packed.
            head_mask: (heads,).
            cu_seq_lens_q, max_length_q: the packed sequences.
            order: int32 (sequences,), the packed sequences from the longest to the shortest, where that is known.
            map_slot: where to leave the probabilities too: nothing between here and the encoder returns them.
            map_seq: also return the probabilities, in maps of this side.
            map_columns: int32 (tokens,), each token's column in its map.
            prefix: what each sequence sees before itself. The other arguments, but for hidden_states, count it in.
            first: attend from the first token of each sequence only, without prefix or maps.

        Returns:
            The context, like hidden_states, and the probabilities (batch, heads, map_seq, map_seq) or None.
        """
        reason = self.unfused_reason()
        if reason is None and past_key_values is not None:
            reason = "past_key_values is Hugging Face's own path"
        if reason is not None:
            _leave(self, reason)
            if cu_seq_lens_q is not None or head_mask is not None:
                raise ValueError(
                    f"unfused attention ({reason}) knows neither packed sequences nor head_mask: pass a padded batch, "
                    "and leave head_mask out"
                )
            attention_mask = _mask_like(attention_mask, hidden_states)
            context, probs = super().forward(hidden_states, attention_mask, past_key_values, **kwargs)
            _leave_map(map_slot, probs)
            return context, probs
        if first is not None:
            return self._attend_first(hidden_states, attention_mask, head_mask, first), None
        batch, seq = hidden_states.shape[:2]
        if map_seq is None and kwargs.get("output_attentions"):  # called the Hugging Face way
            map_seq = seq
        qkv = project_qkv(self.query, self.key, self.value, hidden_states)
        if torch.compiler.is_compiling():
            qkv = qkv.view(-1)  # or a graph is guarded by the number of tokens
        qkv = qkv.view(batch * seq, 3, self.num_attention_heads, self.attention_head_size)
        max_seqlen = seq if max_length_q is None else max_length_q
        if self.watcher is not None:
            self.watcher(qkv, cu_seq_lens_q, max_seqlen, attention_mask)
        if prefix is not None:
            qkv = prefix.prepend(qkv, self.layer_idx)
        dropout_p = self.dropout.p if self.training else 0.0
        context, probs = attention(
            qkv,
            cu_seq_lens_q,
            max_seqlen,
            bias=attention_mask,
            head_mask=head_mask,
            scale=self.scaling,
            dropout_p=dropout_p,
            seed=_seed(seed, dropout_p, qkv),
            stream=self.dropout_stream,
            probs_seq=map_seq,
            columns=map_columns,
            order=order,
        )
        if prefix is not None:
            context = context.index_select(0, prefix.token_rows)
            probs = None if probs is None else probs[:, :, prefix.length :]
        _leave_map(map_slot, probs)
        return context.reshape(batch, seq, self.all_head_size), probs

    def block_arguments(self) -> dict[str, Any] | None:
        """What a block needs of this module; None where the module has to be called itself."""
        find = self._modules.get  # a module's attributes are looked up slowly
        query, key, value, dropout = find("query"), find("key"), find("value"), find("dropout")
        if type(self) is not FusedSelfAttention or is_called(self) or self.watcher is not None or self.scaling <= 0.0:
            return None
        if self.unfused_reason() is not None or not can_stack(query, key, value):
            return None
        weights, *biases = qkv_parameters(query, key, value)
        weight, bias = made_one(weights), made_one(biases[0]) if biases else None
        if weight is None or (biases and bias is None):
            return None
        return {
            "qkv_weight": weight,
            "qkv_bias": bias,
            "qkv_parameters": weights + biases[0] if biases else weights,
            "heads": self.num_attention_heads,
            "scale": self.scaling,
            "dropout_p": dropout.p if self.training else 0.0,
            "stream": self.dropout_stream,
        }

    def _attend_first(
        self, hidden: torch.Tensor, bias: torch.Tensor | None, head_mask: torch.Tensor | None, first: FirstRows
    ) -> torch.Tensor:
        """The context of the first tokens, as `first.take` leaves them."""
        pair = project_together((self.key, self.value), hidden)
        query = self.query(first.take(hidden))
        size = (self.num_attention_heads, self.attention_head_size)
        dropout_p = self.dropout.p if self.training else 0.0
        context = first.attend(
            query.view(first.batch, *size), pair.view(-1, 2, *size), bias, head_mask, self.scaling, dropout_p
        )
        return context.reshape(query.shape)


class _FusedAddNorm:
    """LayerNorm(dropout(dense(x)) + residual), what BertSelfOutput and BertOutput both are."""

    dense: Any
    dropout: Any
    LayerNorm: Any
    dropout_stream = 0

    def unfused_reason(self) -> str | None:
        return _norm_reason(self.LayerNorm, self.dropout)

    def note(self) -> str | None:
        return _called(dense=self.dense)

    def block_arguments(self) -> dict[str, Any] | None:
        """What a block needs of this module; None where the module has to be called itself."""
        find = self._modules.get  # type: ignore[attr-defined]
        dense, norm, dropout = find("dense"), find("LayerNorm"), find("dropout")
        if type(self) not in (FusedSelfOutput, FusedOutput) or is_called(self):  # type: ignore[arg-type]
            return None
        if not is_plain_linear(dense) or _norm_reason(norm, dropout) is not None:
            return None
        return {
            **dense._parameters,
            "norm_weight": norm._parameters["weight"],
            "norm_bias": norm._parameters["bias"],
            "eps": norm.eps,
            "hidden_dropout_p": dropout.p if dropout.training else 0.0,
            "hidden_stream": self.dropout_stream,
        }

    def forward(
        self, hidden_states: torch.Tensor, input_tensor: torch.Tensor, seed: torch.Tensor | None = None
    ) -> torch.Tensor:
        """hidden_states (batch, seq, in) and the residual input_tensor (batch, seq, hidden): like the residual."""
        reason = self.unfused_reason()
        if reason is not None:
            _leave(self, reason)  # type: ignore[arg-type]
            return super().forward(hidden_states, input_tensor)  # type: ignore[misc]
        x, bias = project(self.dense, hidden_states)
        norm, dropout = self.LayerNorm, self.dropout
        dropout_p = dropout.p if dropout.training else 0.0
        return add_layer_norm(
            x,
            bias,
            input_tensor,
            norm._parameters["weight"],
            norm._parameters["bias"],
            norm.eps,
            dropout_p=dropout_p,
            seed=_seed(seed, dropout_p, x),
            stream=self.dropout_stream,
        )


class FusedSelfOutput(_FusedAddNorm, hf.BertSelfOutput):
    """The attention block's output product, then bias, dropout, residual and LayerNorm in one kernel."""


class FusedOutput(_FusedAddNorm, hf.BertOutput):
    """The feed-forward block's output product, then bias, dropout, residual and LayerNorm in one kernel."""


class FusedIntermediate(hf.BertIntermediate):
    """The feed-forward block's first product, then bias and activation in one kernel."""

    def unfused_reason(self) -> str | None:
        activation = self.intermediate_act_fn
        if type(activation) in KERNEL_ACTIVATIONS:
            return "the activation is hooked" if is_called(activation) else None
        return f"no kernel has the activation {getattr(activation, '__name__', activation)}"

    def note(self) -> str | None:
        return _called(dense=self.dense)

    def block_arguments(self) -> dict[str, Any] | None:
        """What a block needs of this module; None where the module has to be called itself."""
        up: Any = self._modules.get("dense")
        if type(self) is not FusedIntermediate or is_called(self) or not is_plain_linear(up):
            return None
        if self.unfused_reason() is not None:
            return None
        parameters, activation = up._parameters, KERNEL_ACTIVATIONS[type(self.intermediate_act_fn)]
        return {"up_weight": parameters["weight"], "up_bias": parameters["bias"], "activation": activation}

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, seq, hidden) to (batch, seq, intermediate)."""
        reason = self.unfused_reason()
        if reason is not None:
            _leave(self, reason)
            return super().forward(hidden_states)
        x, bias = project(self.dense, hidden_states)
        return bias_activation(x, bias, KERNEL_ACTIVATIONS[type(self.intermediate_act_fn)])


def _block_arguments(*modules: Any) -> dict[str, Any] | None:
    """What the block of these modules needs of them; None where one has to be called itself."""
    arguments: dict[str, Any] = {}
    for module in modules:
        found = module.block_arguments() if hasattr(module, "block_arguments") else None
        if found is None:
            return None
        arguments |= found
    return arguments


def _attends_as_block(hidden: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a block with the attention in it may run on these hidden states, with these keywords."""
    # The keywords are the attention's; no block knows these.
    return runs_as_block(hidden) and all(kwargs.get(name) is None for name in ("past_key_values", "prefix", "first"))


def _attention_arguments(
    block: dict[str, Any],
    hidden: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    head_mask: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    order: torch.Tensor | None = None,
    map_seq: int | None = None,
    map_columns: torch.Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> AttentionArguments:
    """The attention block's arguments from its modules' and from those of `FusedSelfAttention.forward`."""
    seq = hidden.shape[1]
    return AttentionArguments(
        **block,
        cu_seqlens=cu_seq_lens_q,
        max_seqlen=seq if max_length_q is None else max_length_q,
        mask=mask,
        head_mask=head_mask,
        probs_seq=seq if map_seq is None and output_attentions else map_seq,
        columns=map_columns,
        order=order,
        seed=_seed(seed, max(block["dropout_p"], block["hidden_dropout_p"]), hidden),
    )


def _feed_forward_arguments(
    block: dict[str, Any], hidden: torch.Tensor, seed: torch.Tensor | None
) -> FeedForwardArguments:
    fused = block["up_bias"] is not None and feed_forward_is_fused(hidden, block["up_weight"], block["activation"])
    return FeedForwardArguments(**block, fused=fused, seed=_seed(seed, block["hidden_dropout_p"], hidden))


class FusedAttention(hf.BertAttention):
    """Self-attention and its output, sharing the forward pass's seed."""

    def block_arguments(self) -> dict[str, Any] | None:
        """What a block needs of this module; None where the module has to be called itself."""
        if type(self) is not FusedAttention or is_called(self) or self.is_cross_attention:
            return None
        return _block_arguments(self.self, self.output)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.is_cross_attention or args:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        if not isinstance(self.self, FusedSelfAttention):
            if kwargs.get("cu_seq_lens_q") is not None or kwargs.get("head_mask") is not None:
                raise ValueError(
                    f"{type(self.self).__name__} is not fastbert's and knows neither packed sequences nor head_mask: "
                    "pass a padded batch, and leave head_mask out"
                )
            context, probs = self.self(hidden_states, _mask_like(attention_mask, hidden_states), **kwargs)
            _leave_map(kwargs.get("map_slot"), probs)
            return self.output(context, hidden_states), probs
        if _attends_as_block(hidden_states, kwargs):
            block = _block_arguments(self.self, self.output)
            if block is not None:
                hidden, probs = attention_block(
                    hidden_states, _attention_arguments(block, hidden_states, attention_mask, **kwargs)
                )
                _leave_map(kwargs.get("map_slot"), probs)
                return hidden, probs
        context, probs = self.self(hidden_states, attention_mask, **kwargs)
        first = kwargs.get("first")
        residual = hidden_states if first is None else first.take(hidden_states)
        return self.output(context, residual, kwargs.get("seed")), probs


class FusedLayer(hf.BertLayer):
    """One encoder layer. Returns the hidden states alone, as Hugging Face's does."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        *,
        seed: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One layer on (batch, seq, hidden), or packed (1, tokens, hidden); the keywords go to the attention."""
        if self.is_decoder or past_key_values is not None:
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        replaced = getattr(self.feed_forward_chunk, "__func__", None) is not hf.BertLayer.feed_forward_chunk
        if self.chunk_size_feed_forward == 0 and not replaced and _attends_as_block(hidden_states, kwargs):
            attention, feed_forward = _block_arguments(self.attention), None
            if attention is not None:
                feed_forward = _block_arguments(self.intermediate, self.output)
            if attention is not None and feed_forward is not None:
                hidden, probs = layer_block(
                    hidden_states,
                    _attention_arguments(attention, hidden_states, attention_mask, seed=seed, **kwargs),
                    _feed_forward_arguments(feed_forward, hidden_states, seed),
                )
                _leave_map(kwargs.get("map_slot"), probs)
                return hidden
        attended, _ = self.attention(hidden_states, attention_mask, seed=seed, **kwargs)
        if self.chunk_size_feed_forward > 0:
            # Every chunk draws a seed of its own, or all would drop the same elements.
            chunks = attended.split(self.chunk_size_feed_forward, dim=self.seq_len_dim)
            return torch.cat([self.feed_forward_chunk(chunk) for chunk in chunks], dim=self.seq_len_dim)
        if replaced:
            return self.feed_forward_chunk(attended)
        block = _block_arguments(self.intermediate, self.output) if runs_as_block(attended) else None
        if block is None:
            return self.output(self.intermediate(attended), attended, seed)
        return feed_forward_block(attended, _feed_forward_arguments(block, attended, seed))


class FusedEncoder(hf.BertEncoder):
    """The layers, one after the other."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        start = f"{prefix}layer."
        found = {name.removeprefix(start).partition(".")[0] for name in state_dict if name.startswith(start)}
        if found and len(found) != len(self.layer):  # which loading with strict=False, as Trainer does, lets pass
            warn_once(
                f"fastbert: a checkpoint with {len(found)} encoder layers is loaded into a model with {len(self.layer)}"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        head_masks: list[torch.Tensor | None] | None = None,
        state_layers: Collection[int] = (),
        map_layers: Collection[int] = (),
        map_seq: int | None = None,
        map_columns: torch.Tensor | None = None,
        first: FirstRows | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Run the layers on (batch, seq, hidden), or packed (1, tokens, hidden).

        Args:
            head_masks: one (heads,) or None a layer.
            state_layers: which hidden states to return, 0 being the embeddings.
            map_layers: which layers' attentions to return, in maps of side `map_seq`, each token at its column in
                `map_columns`.
            first: compute the last layer for these tokens only.
            kwargs: for every layer; a decoder's go to Hugging Face's own loop.

        Returns:
            `last_hidden_state`, and `hidden_states` and `attentions` with None where not asked for.
        """
        if args or head_masks is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        states = [hidden_states if 0 in state_layers else None]
        maps: list[torch.Tensor | None] = []
        if len(set(self.layer)) < len(self.layer):
            kwargs["seed"] = None  # a layer that is there twice would drop the same elements twice
        for i, layer in enumerate(self.layer):
            wanted = i in map_layers
            slot = MapSlot()
            hidden_states = layer(
                hidden_states,
                attention_mask,
                head_mask=head_masks[i],
                map_slot=slot if wanted else None,
                map_seq=map_seq if wanted else None,
                map_columns=map_columns if wanted else None,
                first=first if i + 1 == len(self.layer) else None,
                **kwargs,
            )
            states.append(hidden_states if i + 1 in state_layers else None)
            if wanted and slot.probs is None:
                raise ValueError(
                    f"layer {i} ({type(layer).__name__}) gave no attentions: leave it out of output_attentions"
                )
            maps.append(slot.probs)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states,
            hidden_states=tuple(states),
            attentions=tuple(maps),
        )


#: Hugging Face's module -> ours.
FUSED: dict[type[nn.Module], type[nn.Module]] = {
    hf.BertEmbeddings: FusedEmbeddings,
    hf.BertSelfAttention: FusedSelfAttention,
    hf.BertSelfOutput: FusedSelfOutput,
    hf.BertAttention: FusedAttention,
    hf.BertIntermediate: FusedIntermediate,
    hf.BertOutput: FusedOutput,
    hf.BertLayer: FusedLayer,
    hf.BertEncoder: FusedEncoder,
}
# Policies of sharding engines, and device maps, name the modules they keep whole: "BertLayer", or `_no_split_modules`.
for _plain, _fused in FUSED.items():
    _fused.__name__ = _plain.__name__


def attends_fused(layer: Any) -> bool:
    """Whether a layer's attention runs on the kernel, which packed sequences need."""
    attention = getattr(getattr(layer, "attention", None), "self", None)
    return isinstance(attention, FusedSelfAttention) and attention.unfused_reason() is None


def fuse_modules(bert: Any) -> None:
    """Swap the classes of the modules inside one `BertModel`, unless it is a decoder, which stays as it is."""
    if bert.config.is_decoder:
        return
    for module in bert.modules():
        fused = FUSED.get(type(module))
        if fused is not None:
            module.__class__ = fused
    for i, layer in enumerate(bert.encoder.layer):
        sites = (layer.attention.self, layer.attention.output, layer.output)
        for k, site in enumerate(sites):  # the embeddings have stream 0
            site.dropout_stream = 1 + len(sites) * i + k
        if isinstance(layer.attention.self, FusedSelfAttention):
            layer.attention.self.rehome()

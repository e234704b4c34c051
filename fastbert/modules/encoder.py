"""The layers, one after the other."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from fastbert.batch.attend import Attend
from fastbert.notices import warn_once
from fastbert_kernels.attention_map import HandOut, handed_out

from .attention import MapSlot
from .swap import is_patched


class FusedEncoder(nn.Module):
    """The layers, one after the other."""

    layer: Any

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
        attend: Attend | None = None,
        head_masks: list[torch.Tensor | None] | None = None,
        state_layers: Collection[int] = (),
        map_layers: Collection[int] = (),
        hand_out_state: HandOut | None = None,
        hand_out_map: HandOut | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Run the layers on (batch, seq, hidden), or packed (1, tokens, hidden).

        Args:
            attend: how the tokens lie. Without, this is Hugging Face's own loop, which has their arguments.
            head_masks: one (heads,) or None a layer.
            state_layers: which hidden states to return, 0 being the embeddings.
            map_layers: which layers' attentions to return.
            hand_out_state, hand_out_map: of one of these, what is returned of it, and what the following is made of.
            kwargs: for every layer.

        Returns:
            `last_hidden_state`, and `hidden_states` and `attentions` with None where not asked for. The last of the
            hidden states is not handed out: it is `last_hidden_state`.
        """
        if attend is None or is_patched(self):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        states: list[torch.Tensor | None] = []
        maps: list[torch.Tensor | None] = []
        if len(set(self.layer)) < len(self.layer):
            attend = replace(attend, seed=None)  # a layer that is there twice would drop the same elements twice
        inner = attend if attend.first is None else replace(attend, first=None)
        for i, layer in enumerate(self.layer):
            state = None
            if i in state_layers:
                state, hidden_states = handed_out(hidden_states, hand_out_state)
            states.append(state)
            slot = MapSlot(hand_out_map) if i in map_layers else None
            done = layer(
                hidden_states,
                attention_mask,
                attend=attend if i + 1 == len(self.layer) else inner,
                head_mask=None if head_masks is None else head_masks[i],
                map_slot=slot,
                **kwargs,
            )
            hidden_states = done[0] if isinstance(done, tuple) else done  # as Hugging Face's of each family do
            if slot is not None and slot.probs is None:
                raise ValueError(
                    f"layer {i} ({type(layer).__name__}) gave no attentions: leave it out of output_attentions"
                )
            maps.append(None if slot is None else slot.probs)
        states.append(hidden_states if len(self.layer) in state_layers else None)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states,
            hidden_states=tuple(states),
            attentions=tuple(maps),
        )

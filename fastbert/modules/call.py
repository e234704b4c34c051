"""What a call of an encoder model asks for: its caller's keywords, and what a caller inside this package adds."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fastbert.batch.batch import Batch, Inputs


@dataclass(frozen=True)
class Outputs:
    """What a call asks for besides the last hidden state.

    Attributes:
        maps, states: which layers' attentions, and which hidden states, 0 being the embeddings.
        wants_maps, wants_states: whether the output has those tuples, which may be empty.
        as_dict: not as a tuple.
    """

    maps: set[int]
    states: set[int]
    wants_maps: bool
    wants_states: bool
    as_dict: bool


class Replay(Protocol):
    """What may take the place of embeddings and layers: `graphs.inference.Graphed`."""

    def takes(self, model: Any, inputs: Inputs, outputs: Outputs) -> bool:
        """Whether a call may be replayed, as far as one sees before its batch is checked."""

    def refuse(self, reason: str) -> None:
        """Count a call that takes Hugging Face's own path."""

    def replay(self, batch: Batch) -> torch.Tensor | None:
        """`last_hidden_state` (batch, seq, hidden) of a packed batch, or None: it has to be computed."""


@dataclass(frozen=True)
class Plan:
    """What a caller inside this package wants of a call.

    Attributes:
        replay: takes the place of embeddings and layers where it can.
        labelled: bool (batch, seq), the rows of `last_hidden_state` that are handed out, as (rows, hidden).
        pools_each: the pooler reads each sequence of a batch that its caller packed; a head that reads nothing else is
            given their first rows, (sequences, 1, hidden), for some families' heads have the pooler in themselves.
        reads: what of the output is read, one of `packing.READS`; None: what the model says of itself.
        labels: int (batch, seq), of a caller that reads rows whose label is not -100.
    """

    replay: Replay | None = None
    labelled: torch.Tensor | None = None
    pools_each: bool = False
    reads: str | None = None
    labels: torch.Tensor | None = None


def asked_for(config: Any, layers: int, attentions: Any, hidden_states: Any, return_dict: bool | None) -> Outputs:
    """The outputs of a call of a model with so many layers; what it does not say is the configuration's."""
    attentions = config.output_attentions if attentions is None else attentions
    hidden_states = config.output_hidden_states if hidden_states is None else hidden_states
    selected: list[set[int]] = []
    for wanted, count in ((attentions, layers), (hidden_states, layers + 1)):
        if wanted is True:
            wanted = range(count)
        elif not wanted:
            wanted = ()
        elif isinstance(wanted, int):
            wanted = (wanted,)
        selected.append({i % count for i in wanted if -count <= i < count})  # those out of range select nothing
    maps, states = selected
    return Outputs(
        maps,
        states,
        bool(attentions),
        bool(hidden_states),
        getattr(config, "return_dict", True) if return_dict is None else return_dict,
    )

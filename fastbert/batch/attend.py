"""What the attention of every layer needs to know of a batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .first_tokens import FirstTokens
from .prefix import Prefix
from .records import Movable


@dataclass(frozen=True)
class Attend(Movable):
    """How attention reads the tokens of a batch. The additive mask goes beside it, as with Hugging Face's modules.

    Attributes:
        cu_seqlens: int32 (sequences + 1,), the packed sequences, or None: the batch has its own shape.
        max_seqlen: tokens in the longest sequence, or None: that of the hidden states.
        order: int32 (sequences,), the packed sequences from the longest to the shortest, where that is known.
        map_seq: the side of the maps, or None: that of the hidden states.
        map_columns: int32 (tokens,), each token's column in its map; None: its place in its sequence.
        seed: int64 scalar on the device, of all dropout in a forward pass; None: each module draws its own.
        prefix: what each sequence sees before itself. The other attributes count it in.
        first: compute the last layer for these tokens only.
        key_spans: int32 (sequences, 2), `sequences.key_spans` of the mask of keys that the additive mask is made of.
        by_modules: every module is called, none read, also where a checkpointed layer runs again.
    """

    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int | None = None
    order: torch.Tensor | None = None
    map_seq: int | None = None
    map_columns: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    prefix: Prefix | None = None
    first: FirstTokens | None = None
    key_spans: torch.Tensor | None = None
    by_modules: bool = False

    def map_side(self, seq: int) -> int:
        """The side of the maps, of hidden states of so many columns."""
        return seq if self.map_seq is None else self.map_seq

    @property
    def fits_block(self) -> bool:
        """Whether a block may take the attention: none knows a prefix, or computes some tokens only."""
        return self.prefix is None and self.first is None and not self.by_modules

    @classmethod
    def of_keywords(cls, kwargs: Mapping[str, Any]) -> "Attend":
        """How tokens lie as Hugging Face's keywords say it to a module that is called on its own."""
        return cls(kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q"))

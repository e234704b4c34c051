"""Embeddings: gathers, LayerNorm and dropout in one kernel; and which positions tokens have."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastbert.notices import warn_once
from fastbert_kernels import embed
from fastbert_kernels.backend import has_values

from .dropout import seed_for
from .readable import PATCHED, fused_repr, is_plain_embedding, leave, norm_reason, not_plain, wants_grad_output
from .swap import is_patched


def table_rows(embeddings: Any) -> int:
    """How many positions embeddings have, ours or Hugging Face's: as many as the buffer has, and the table."""
    rows = getattr(embeddings.position_embeddings, "num_embeddings", embeddings.position_ids.shape[1])
    return min(embeddings.position_ids.shape[1], rows)


class FusedEmbeddings(nn.Module):
    """Gathers, LayerNorm and dropout in one kernel. Word embeddings that are not plain are called instead."""

    word_embeddings: Any
    position_embeddings: Any
    token_type_embeddings: Any  # in some families there are none
    LayerNorm: Any
    dropout: Any
    position_ids: torch.Tensor
    dropout_stream = 0

    @staticmethod
    def first_position(embeddings: Any) -> int:
        """The position of a text's first token, of embeddings of this class or of Hugging Face's."""
        return 0

    @property
    def longest(self) -> int:
        """Tokens in the longest sequence that has positions."""
        return table_rows(self) - self.first_position(self)

    @property
    def limit(self) -> str:
        """What `longest` comes from, in a message."""
        return f"the model's max_position_embeddings={self.longest}"

    def has_rows(self, positions: torch.Tensor) -> bool:
        """Whether all positions (batch, seq) of a text longer than `longest` are in the table: here they count every
        token."""
        return False

    def positions(self, words: torch.Tensor, before: int = 0) -> torch.Tensor:
        """The positions of words (batch, seq), ids or vectors (batch, seq, hidden), that come without, after a prefix
        of length `before`: int64 (batch | 1, seq)."""
        return self.position_ids[:, before : before + words.shape[1]]

    def packed_positions(self, words: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """The positions of words (1, tokens) in packed sequences, each from the first on: int64 (1, tokens)."""
        tokens = words.shape[1]
        starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=tokens)
        return (torch.arange(tokens, device=words.device) - starts)[None]

    def token_types(self, position_ids: torch.Tensor) -> torch.Tensor | None:
        """The types of tokens at positions (batch | 1, seq) that come without, of the same shape; None: all are 0, as
        they come."""
        buffer = self._buffers.get("token_type_ids")
        if buffer is None or self._are_zero(buffer):
            return None
        return buffer[0].take(position_ids)

    def _are_zero(self, types: torch.Tensor) -> bool:
        """Whether all are, looked at once."""
        if not has_values(types):
            return False
        state = id(types), types.data_ptr(), types._version
        if self.__dict__.get("_zero_types", (None, False))[0] != state:
            self.__dict__["_zero_types"] = state, not bool(types.any())
        return self.__dict__["_zero_types"][1]

    def unfused_reason(self) -> str | None:
        if is_patched(self):
            return PATCHED
        for name in ("position_embeddings", "token_type_embeddings"):
            table = self._modules.get(name)
            if table is not None and not is_plain_embedding(table):
                return not_plain(name, table, nn.Embedding)
        return norm_reason(self.LayerNorm, self.dropout)

    def extra_repr(self) -> str:
        return fused_repr(self)

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
        cache_length: int = 0,
        seed: torch.Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> torch.Tensor:
        """Embed (batch, seq) ids, or (batch, seq, hidden) vectors: (batch, seq, hidden).

        Positions start at `cache_length`, before transformers 5.24 `past_key_values_length`.
        """
        cache_length = cache_length or past_key_values_length
        reason = self.unfused_reason()
        if reason is not None:
            leave(self, reason)
            return self._hugging_faces(input_ids, token_type_ids, position_ids, inputs_embeds, cache_length)
        if inputs_embeds is None and input_ids is None:
            raise ValueError("the embeddings need input_ids or inputs_embeds, got neither")
        if inputs_embeds is None and not is_plain_embedding(self.word_embeddings):
            warn_once("fastbert: word_embeddings are called as a module; the embeddings around them stay fused")
            inputs_embeds = self.word_embeddings(input_ids)
        words: Any = input_ids if inputs_embeds is None else inputs_embeds
        batch, seq = words.shape[:2]
        if position_ids is None:
            position_ids = self.positions(words, cache_length)
        types: Any = self._modules.get("token_type_embeddings")
        if types is None:
            token_type_ids = None
        elif token_type_ids is None:
            token_type_ids = self.token_types(position_ids)
            if token_type_ids is None:
                token_type_ids = words.new_zeros((1, 1), dtype=torch.long)
        dropout_p = self.dropout.p if self.dropout.training else 0.0
        y = embed(
            words.reshape(batch * seq, *words.shape[2:]),
            position_ids.expand(batch, seq).reshape(-1),
            None if token_type_ids is None else token_type_ids.expand(batch, seq).reshape(-1),
            self.word_embeddings.weight if inputs_embeds is None else None,
            self.position_embeddings.weight,
            None if types is None else types.weight,
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            self.LayerNorm.eps,
            padding_idx=None if inputs_embeds is not None else self.word_embeddings.padding_idx,
            position_padding_idx=self.position_embeddings.padding_idx,
            dropout_p=dropout_p,
            seed=seed_for(seed, dropout_p, self.position_embeddings.weight),
            stream=self.dropout_stream,
        )
        if wants_grad_output(self.word_embeddings) and torch.is_grad_enabled() and not y.requires_grad:
            y.requires_grad_()
        return y.view(batch, seq, y.shape[1])

    def _hugging_faces(
        self, input_ids: Any, token_type_ids: Any, position_ids: Any, inputs_embeds: Any, cache_length: int
    ) -> torch.Tensor:
        """Hugging Face's own forward."""
        return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds, cache_length)


class CountedPositions(FusedEmbeddings):
    """Embeddings whose positions count the ids that are not padding, from `padding_idx + 1` on; padding has the
    position `padding_idx`, wherever it stands. Vectors in the place of ids are counted all."""

    padding_idx: int

    @staticmethod
    def first_position(embeddings: Any) -> int:
        return embeddings.padding_idx + 1

    @property
    def limit(self) -> str:
        first = self.first_position(self)
        return (
            f"the model's {self.longest} tokens: max_position_embeddings={table_rows(self)}, and the first is {first}"
        )

    def has_rows(self, positions: torch.Tensor) -> bool:
        return has_values(positions) and bool(positions.max() < table_rows(self))

    def positions(self, words: torch.Tensor, before: int = 0) -> torch.Tensor:
        if words.dim() == 3:
            return torch.arange(words.shape[1], device=words.device)[None] + (self.padding_idx + 1)
        counted = words != self.padding_idx
        return (counted.cumsum(1) + before) * counted + self.padding_idx

    def packed_positions(self, words: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        if words.dim() == 3:
            return super().packed_positions(words, cu_seqlens) + (self.padding_idx + 1)
        counted = words[0] != self.padding_idx
        count = counted.cumsum(0)
        before = F.pad(count, (1, 0))[cu_seqlens[:-1].long()]
        before = before.repeat_interleave(cu_seqlens.diff(), output_size=words.shape[1])
        return ((count - before) * counted + self.padding_idx)[None]

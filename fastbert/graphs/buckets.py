"""Buckets of tokens, and the arrays that batches of any shape are laid into."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fastbert.batch.batch import UNLABELLED
from fastbert.batch.layout import Layout
from fastbert.modules.model import EncoderModel

#: Buckets by default: so close that a batch which is over one fills the next by two thirds.
TOKENS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)

#: A bucket has room for one sequence for so many tokens: each costs every attention launch programs that find it empty.
_TOKENS_OF_A_SEQUENCE = 16


@dataclass(frozen=True)
class Bucket:
    """What one recording takes.

    Attributes:
        tokens: in all sequences together.
        sequences: how many, empty ones included.
        longest: tokens of one.
    """

    tokens: int
    sequences: int
    longest: int

    @property
    def slots(self) -> int:
        """Sequences of the recording: those of a batch, and as many as padding alone would take."""
        return self.sequences + -(-self.tokens // self.longest)

    def bounds(self, device: torch.device) -> torch.Tensor:
        """Where sequences of padding end, wherever it starts: int32. After n tokens, those from n // longest on do."""
        ends = [min(end, self.tokens) for end in range(self.longest, self.tokens + self.longest, self.longest)]
        return torch.tensor(ends + [self.tokens] * self.slots, dtype=torch.int32, device=device)


def make_buckets(tokens: Iterable[int], max_sequences: int, longest: int) -> list[Bucket]:
    """The buckets of so many tokens, smallest first; the largest has room for all of `max_sequences`.

    Raises:
        ValueError: for no bucket, or a number under 1.
    """
    sizes = sorted(set(tokens))
    if not sizes or sizes[0] < 1 or max_sequences < 1:
        raise ValueError(f"buckets need tokens and max_sequences of at least 1, got {sizes} and {max_sequences}")
    rooms = [min(max_sequences, max(1, size // _TOKENS_OF_A_SEQUENCE)) for size in sizes[:-1]]
    return [Bucket(t, room, min(t, longest)) for t, room in zip(sizes, [*rooms, max_sequences], strict=True)]


def choose_bucket(buckets: list[Bucket], tokens: int, sequences: int, longest: int) -> Bucket | None:
    """The smallest bucket with room for so many tokens in so many sequences, None where there is none."""
    fits = (b for b in buckets if tokens <= b.tokens and sequences <= b.sequences and longest <= b.longest)
    return next(fits, None)


class Arrays:
    """Arrays that never move. A batch's tokens are laid into them one after the other, padding tokens after them in
    sequences of their own, and empty sequences after those.

    Args:
        bert: the model whose batches they take, on its device.
        buckets: what they have room for.
        token_labels, sequence_labels: by name, what each token and each sequence has besides.
    """

    def __init__(
        self,
        bert: EncoderModel,
        buckets: list[Bucket],
        token_labels: tuple[str, ...] = (),
        sequence_labels: tuple[str, ...] = (),
    ) -> None:
        self.device = bert.device
        self._bert = bert
        self._rest = dict.fromkeys(("input_ids", "position_ids", "token_type_ids"), 0)
        self._rest |= dict.fromkeys(token_labels, UNLABELLED)
        self._sequence_labels = sequence_labels
        tokens, slots = max(b.tokens for b in buckets), max(b.slots for b in buckets)
        length = len(self._rest) * tokens + len(sequence_labels) * slots
        self._ids = torch.zeros(length, dtype=torch.int64, device=self.device)
        self._cu_seqlens = torch.zeros(slots + 1, dtype=torch.int32, device=self.device)
        self._bounds = {bucket: bucket.bounds(self.device) for bucket in buckets}
        self._constants = {
            value: torch.full((max(tokens, slots),), value, dtype=torch.int64, device=self.device)
            for value in (0, UNLABELLED)
        }

    def read(self, bucket: Bucket) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """What a bucket's recording reads: ids and labels by name, int64 (1, tokens) or (slots,), and cu_seqlens."""
        names = (*self._rest, *self._sequence_labels)
        lengths = [bucket.tokens] * len(self._rest) + [bucket.slots] * len(self._sequence_labels)
        parts = self._ids[: sum(lengths)].split(lengths)
        named = {name: part[None] if name in self._rest else part for name, part in zip(names, parts, strict=True)}
        return named, self._cu_seqlens[: bucket.slots + 1]

    def fill(self, bucket: Bucket, values: dict[str, torch.Tensor | None], layout: Layout) -> None:
        """Lay a batch into the arrays: every element that the bucket's recording reads is written.

        Args:
            bucket: with room for the batch.
            values: ids and labels by name, integers, in the layout; without `position_ids` and `token_type_ids`, the
                model's own.
            layout: of the batch.
        """
        count = layout.tokens
        values, embeddings = dict(values), self._bert.embeddings
        if values["position_ids"] is None:
            words: Any = values["input_ids"]
            values["position_ids"] = embeddings.positions(words).expand(layout.batch, layout.seq)
        if values["token_type_ids"] is None:
            values["token_type_ids"] = embeddings.token_types(values["position_ids"])
        parts = []
        for name, rest in self._rest.items():
            value = values[name]
            value = self._constants[0][:count] if value is None else value
            parts += [value.reshape(-1), self._constants[rest][: bucket.tokens - count]]
        for name in self._sequence_labels:
            labels = values[name]
            assert labels is not None
            parts += [labels.reshape(-1), self._constants[UNLABELLED][: bucket.slots - layout.batch]]
        torch.cat(parts, out=self._ids[: sum([part.shape[0] for part in parts])])
        cu_seqlens = layout.cu_seqlens
        if cu_seqlens is None:
            cu_seqlens = torch.arange(0, count + 1, layout.seq, dtype=torch.int32, device=self.device)
        padding = self._bounds[bucket][count // bucket.longest :][: bucket.slots - layout.batch]
        torch.cat([cu_seqlens, padding], out=self._cu_seqlens[: bucket.slots + 1])

    def clear(self, bucket: Bucket) -> None:
        """Lay no token into the arrays, in one empty sequence."""
        none = self._constants[0][:0]
        values: dict[str, torch.Tensor | None] = dict.fromkeys((*self._rest, *self._sequence_labels), none)
        self.fill(bucket, values, Layout(0, 1, none, self._cu_seqlens.new_zeros(1), 1, None))

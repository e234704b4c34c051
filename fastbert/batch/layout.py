"""How the tokens of a batch lie: packed on the way in, unpacked on the way out.

Between the two a batch is one flat row of real tokens with `cu_seqlens`; batch and sequence exist only here. A batch
in which nothing can be dropped keeps its (batch, seq) shape, which is the same row of tokens seen in two dimensions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastbert.notices import warn_of_padding

from .records import Movable


@dataclass(frozen=True)
class Layout(Movable):
    """How the tokens of a batch lie in the arrays the encoder works on.

    Attributes:
        batch, seq: the padded shape the caller sees.
        indices: int64 (tokens,), each token's place in the flattened (batch * seq); None: every place is a token.
        cu_seqlens: int32 (batch + 1,); None: every sequence has `max_seqlen` tokens.
        max_seqlen: tokens in the longest sequence.
        columns: int32 (tokens,), each token's column; None where tokens stand at the start of their row.
        order: int32 (batch,), the sequences from the longest to the shortest; None: unknown, or all have one length.
    """

    batch: int
    seq: int
    indices: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    max_seqlen: int
    columns: torch.Tensor | None
    order: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many tokens there are, dropped padding not counted; of a batch that its caller packed, nobody knows."""
        return self.batch * self.seq if self.indices is None else self.indices.shape[0]

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, seq, ...) to (1, tokens, ...)."""
        if self.indices is None:
            return x
        return x.reshape(self.batch * self.seq, *x.shape[2:]).index_select(0, self.indices.to(x.device))[None]

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """(1, tokens, ...) to (batch, seq, ...), zero where there was no token; on the device of x, where the last
        layer may be alone."""
        if self.indices is None:
            return x
        flat = x.new_zeros(self.batch * self.seq, *x.shape[2:])
        return flat.index_copy(0, self.indices.to(x.device), x[0]).view(self.batch, self.seq, *x.shape[2:])


def dense_layout(batch: int, seq: int) -> Layout:
    """Every place is a token."""
    return Layout(batch, seq, None, None, seq, None)


def packed_layout(mask: torch.Tensor) -> Layout:
    """The layout of the tokens a mask marks, all else dropped.

    Args:
        mask: bool (batch, seq), True at tokens, in any pattern.
    """
    layout = pack_unless(mask, mask.new_zeros(()))
    assert layout is not None
    return layout


def pack_unless(mask: torch.Tensor, read: torch.Tensor) -> Layout | None:
    """The layout of the tokens a mask marks; None where there is padding, and it is read.

    Args:
        mask: bool (batch, seq), True at tokens, in any pattern.
        read: bool scalar, on the mask's device.

    Reads the lengths back from the device, whether tokens stand at the start of their rows, and whether padding is
    read, together: the one synchronisation of a forward pass.
    """
    batch, seq = mask.shape
    lengths = mask.sum(1)
    at_start = (mask[:, 1:] <= mask[:, :-1]).all()
    *host_lengths, aligned, is_read = torch.cat([lengths, torch.stack([at_start, read])]).tolist()
    total = sum(host_lengths)
    if total == batch * seq:
        return dense_layout(batch, seq)
    if is_read:
        warn_of_padding("labels at it are read, or a row starts with it and is pooled", total, batch * seq)
        return None
    longest, order = max(host_lengths), None
    if min(host_lengths) < longest:
        longest_first = sorted(range(batch), key=host_lengths.__getitem__, reverse=True)
        # The memory is copied from before the call returns, so nothing has to wait.
        order = torch.tensor(longest_first, dtype=torch.int32).to(mask.device, non_blocking=True)
    indices = torch.nonzero_static(mask.reshape(-1), size=total).squeeze(1)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    columns = None if aligned else (indices % seq).to(torch.int32)
    return Layout(batch, seq, indices, cu_seqlens, max(1, longest), columns, order)

"""Embeddings of text in bulk: sorted by length, packed into batches of so many tokens, nothing padded."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertModel

from fastbert.fusing import fuse
from fastbert.inputs import InputError, check_max_length, load, parse_device, parse_dtype
from fastbert.modules.model import EncoderModel

#: Tokens of a batch: enough to keep the products of a GPU busy, few enough for the memory of any.
TOKENS = 8192


def _mean(hidden: Tensor, lengths: Tensor) -> Tensor:
    return torch.segment_reduce(hidden, "mean", lengths=lengths)


def _first(hidden: Tensor, lengths: Tensor) -> Tensor:
    return hidden if len(hidden) == len(lengths) else hidden[lengths.cumsum(0) - lengths]


#: Pooling -> packed hidden states (tokens, hidden), for `cls` those of first tokens if no others were computed, and
#: lengths (texts,) to embeddings (texts, hidden).
POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": _mean, "cls": _first}


@dataclass(frozen=True)
class PackedTexts:
    """Texts that go through the model together.

    Attributes:
        rows: their places in the list they came from, longest text first.
        ids: each one's tokens, special ones included.
    """

    rows: list[int]
    ids: list[list[int]]


class Encoder:
    """Text in, embeddings out.

    The batches depend only on the texts and the settings, so the same texts give the same bits on the same machine.

    Args:
        model: a folder saved by transformers or sentence-transformers, a name on the Hugging Face hub, or a
            `BertModel`, which is then fused in place.
        tokenizer: only with a `BertModel`: its tokenizer.
        pooling: `mean` of a text's tokens, special ones included, or `cls`, the first of them.
        normalize: scale embeddings to length 1.
        max_length: texts are cut to this many tokens. Default: what the model takes.
        tokens: of a batch; a longer text is a batch of its own.
        dtype: float32, float16 or bfloat16, what the model computes in. Embeddings are pooled in float32.
        device: cpu, cuda or cuda:N. Default: the GPU if there is one.

    Raises:
        InputError: for an unknown pooling, dtype or device, a length or a number of tokens out of range, and when there
            is no BERT checkpoint under that name.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | BertModel,
        tokenizer: Any = None,
        *,
        pooling: str = "mean",
        normalize: bool = False,
        max_length: int | None = None,
        tokens: int = TOKENS,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device | None = None,
    ) -> None:
        if pooling not in POOLINGS:
            raise InputError(f"unknown pooling {pooling!r}: choose from {', '.join(POOLINGS)}")
        if tokens < 1:
            raise InputError(f"a batch of {tokens} tokens holds no text: give at least 1")
        self.dtype, self.device = parse_dtype(dtype), parse_device(device)
        if isinstance(model, BertModel):
            if tokenizer is None:
                raise InputError("a BertModel comes without a tokenizer: pass its tokenizer too")
            bert = model
        elif tokenizer is not None:
            raise InputError(f"{str(model)!r} brings its own tokenizer: pass a tokenizer with a BertModel only")
        else:
            bert, tokenizer = load(model)
            bert.pooler = None
        limit = min(bert.config.max_position_embeddings, tokenizer.model_max_length)
        length = check_max_length(max_length, limit)
        self.bert = fuse(bert).to(self.device, self.dtype).eval()
        if not isinstance(self.bert, EncoderModel) or bert.config.is_decoder:
            raise InputError(
                f"{type(bert).__name__} is a decoder or overrides BertModel: only BERT encoders take packed text"
            )
        self.tokenizer = tokenizer
        self.pooling, self.normalize, self.max_length, self.tokens = pooling, normalize, length, tokens

    @property
    def hidden(self) -> int:
        """Numbers in an embedding."""
        return self.bert.config.hidden_size

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts: float32 (texts, hidden), in their order.

        Raises:
            TypeError: for one that is not a str.
        """
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts[{i}] is {type(text).__name__}, not str: {text!r:.60}")
        embeddings = np.empty((len(texts), self.hidden), np.float32)
        for batch in self.batches(texts):
            embeddings[batch.rows] = self.embed(batch)
        return embeddings

    def batches(self, texts: Sequence[str]) -> list[PackedTexts]:
        """Tokenize texts and divide them, sorted by length, into batches of at most `tokens` tokens."""
        if not len(texts):
            return []
        ids: list[list[int]] = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        batches: list[PackedTexts] = []
        room = 0
        for row in sorted(range(len(ids)), key=lambda row: -len(ids[row])):
            if not batches or len(ids[row]) > room:
                batches.append(PackedTexts([], []))
                room = self.tokens
            batches[-1].rows.append(row)
            batches[-1].ids.append(ids[row])
            room -= len(ids[row])
        return batches

    @torch.inference_mode()
    def embed(self, batch: PackedTexts) -> np.ndarray:
        """The embeddings of one batch: float32 (texts, hidden), in the order of its rows."""
        lengths = torch.tensor([len(ids) for ids in batch.ids])
        words = torch.tensor([[token for ids in batch.ids for token in ids]])
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32).to(self.device)
        longest = int(lengths.max())
        hidden = self.bert(
            words.to(self.device),
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=longest,
            max_length_k=longest,
            read_rows="first" if self.pooling == "cls" else "all",
        ).last_hidden_state[0]
        pooled = POOLINGS[self.pooling](hidden.float(), lengths.to(self.device))
        if self.normalize:
            pooled = F.normalize(pooled)
        return pooled.cpu().numpy()

    def settings(self) -> dict[str, Any]:
        """What an embedding depends on besides its text, JSON-ready; weights and vocabulary as digests."""
        weights = hashlib.sha256()
        for name, tensor in self.bert.state_dict().items():
            weights.update(name.encode())
            weights.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        vocabulary = repr(sorted(self.tokenizer.get_vocab().items())).encode()
        return {
            "model": weights.hexdigest(),
            "vocabulary": hashlib.sha256(vocabulary).hexdigest(),
            "pooling": self.pooling,
            "normalize": self.normalize,
            "max_length": self.max_length,
            "tokens": self.tokens,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

"""Embeddings of text in bulk: sorted by length, packed into batches of so many tokens, nothing padded."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from fastbert.families import MODELS, longest_text
from fastbert.fusing import fuse
from fastbert.inputs import (
    InputError,
    check_backend,
    check_finite,
    check_max_length,
    check_tokenizer,
    is_unicode,
    load,
    parse_device,
    parse_dtype,
)
from fastbert.modules.model import EncoderModel
from fastbert.modules.swap import is_decoder

#: Tokens of a batch: enough to keep the products of a GPU busy, few enough for the memory of any.
TOKENS = 8192

#: Of a configuration or a tokenizer: where it came from, which says nothing of what it does.
_NAMES = ("_name_or_path", "name_or_path", "transformers_version", "is_local", "local_files_only")


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
            encoder model of one of the families, which is then fused in place.
        tokenizer: only with an encoder model: its tokenizer.
        pooling: `mean` of a text's tokens, special ones included, or `cls`, the first of them.
        normalize: scale embeddings to length 1.
        max_length: texts are cut to this many tokens. Default: what the model takes.
        tokens: of a batch; a longer text is a batch of its own.
        dtype: float32, float16 or bfloat16, what the model computes in. Embeddings are pooled in float32.
        device: cpu, cuda or cuda:N. Default: the GPU if there is one.

    Raises:
        InputError: for an unknown pooling, dtype or device, a length or a number of tokens out of range, when there is
            no such checkpoint, and for one that cannot be used: with a tokenizer that does not fit, or a weight that is
            not finite in that dtype.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
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
        check_backend(self.dtype, self.device)
        if isinstance(model, MODELS):
            if tokenizer is None:
                raise InputError("an encoder model comes without a tokenizer: pass its tokenizer too")
            bert, name = model, type(model).__name__
            check_tokenizer(tokenizer, bert.config.vocab_size, name)
        elif tokenizer is not None:
            raise InputError(f"{str(model)!r} brings its own tokenizer: pass a tokenizer with an encoder model only")
        else:
            bert, tokenizer = load(model)
            name = str(model)
            if hasattr(bert, "pooler"):
                bert.pooler = None
        length = check_max_length(max_length, int(min(longest_text(bert), tokenizer.model_max_length)))
        self.bert = fuse(bert).to(self.device, self.dtype).eval()
        check_finite(self.bert, name)  # in its dtype: float16 ends at 65504
        if not isinstance(self.bert, EncoderModel) or is_decoder(bert):
            raise InputError(
                f"{type(bert).__name__} is a decoder or overrides Hugging Face's class: "
                "only fused ones take packed text"
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
            InputError: for one with lone surrogates, which no tokenizer takes.
        """
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts[{i}] is {type(text).__name__}, not str: {text!r:.60}")
            if not is_unicode(text):
                raise InputError(f"texts[{i}] has lone surrogates, as bytes have that are not UTF-8: {text!r:.60}")
        embeddings = np.empty((len(texts), self.hidden), np.float32)
        for batch in self.batches(texts):
            embeddings[batch.rows] = self.embed(batch)
        return embeddings

    def batches(self, texts: Sequence[str]) -> list[PackedTexts]:
        """Tokenize texts and divide them, sorted by length, into batches of at most `tokens` tokens.

        Raises:
            InputError: for a text without tokens, where the tokenizer adds none of its own.
        """
        if not len(texts):
            return []
        ids: list[list[int]] = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        for row, tokens in enumerate(ids):
            if not tokens:
                raise InputError(f"texts[{row}] has no tokens ({texts[row]!r:.60}): use a tokenizer that adds [CLS]")
        batches: list[PackedTexts] = []
        left = 0
        for row in sorted(range(len(ids)), key=lambda row: -len(ids[row])):
            if not batches or len(ids[row]) > left:
                batches.append(PackedTexts([], []))
                left = self.tokens
            batches[-1].rows.append(row)
            batches[-1].ids.append(ids[row])
            left -= len(ids[row])
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
        """All that an embedding depends on besides its text, JSON-ready; what is long as a digest.

        Left out is what moves last digits only: the device, and the versions of the libraries.
        """
        return {
            "model": _digest_model(self.bert),
            "config": _digest_config(self.bert.config),
            "tokenizer": _digest_tokenizer(self.tokenizer),
            "pooling": self.pooling,
            "normalize": self.normalize,
            "max_length": self.max_length,
            "tokens": self.tokens,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def _digest_model(bert: torch.nn.Module) -> str:
    """Of a model's tensors, buffers that are not saved among them, and of what its modules are."""
    digest = hashlib.sha256()
    for name, module in bert.named_modules():
        digest.update(f"{name} {type(module).__qualname__}\n".encode())
    for name, tensor in (*bert.named_parameters(), *bert.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digest_config(config: PretrainedConfig) -> str:
    """Of a model's configuration: heads and activation leave no trace in its weights."""
    fields = {name: value for name, value in config.to_dict().items() if name not in _NAMES}
    return _digest_json(fields)


def _digest_tokenizer(tokenizer: Any) -> str:
    """Of a tokenizer's vocabulary and rules: its normalizer, the tokens it adds, the side on which it cuts."""
    rules: dict[str, Any] = {
        "kind": type(tokenizer).__qualname__,
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": tokenizer.special_tokens_map,
        "cuts": tokenizer.truncation_side,
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Cutting and padding are what the last call asked for, not rules.
        rules["backend"] = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
    else:
        rules["arguments"] = {k: v for k, v in tokenizer.init_kwargs.items() if k not in _NAMES and "file" not in k}
    return _digest_json(rules)


def _digest_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

"""Embeddings of text in bulk: sorted by length, packed into batches of so many tokens, nothing padded."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
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

from .pooling import POOLINGS, pool
from .recipe import Recipe, read_recipe

#: Tokens of a batch: enough to keep the products of a GPU busy, few enough for the memory of any.
TOKENS = 8192

#: Of a configuration or a tokenizer: where it came from, which says nothing of what it does.
_NAMES = ("_name_or_path", "name_or_path", "transformers_version", "is_local", "local_files_only")


@dataclass
class PackedTexts:
    """Texts that go through the model together.

    Attributes:
        rows: their places in the list they came from, longest text first.
        ids: each one's tokens, special ones included.
        cut: their number that lost their end to the length limit.
    """

    rows: list[int] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    cut: int = 0


class Encoder:
    """Text in, embeddings out.

    The batches depend only on the texts and the settings, so the same texts give the same bits on the same machine.

    Args:
        model: a folder saved by transformers or sentence-transformers, a name on the Hugging Face hub, or an encoder
            model of one of the families, which is then fused in place. What a folder of sentence-transformers says of
            its pooling, normalization, length and prompt is done, unless it is said here.
        tokenizer: only with an encoder model: its tokenizer.
        pooling: one of `POOLINGS`: `mean` of a text's tokens, special ones included, `cls`, the first of them, and so
            on. Default: the folder's, else `mean`.
        normalize: scale embeddings to length 1. Default: the folder's, else not.
        max_length: texts are cut to this many tokens. Default: the folder's, else what the model takes.
        prompt: stands before each text. Default: the folder's default one, if it has one.
        prompt_name: of one of the folder's prompts, in place of `prompt`.
        tokens: of a batch; a longer text is a batch of its own.
        dtype: float32, float16 or bfloat16, what the model computes in. Embeddings are pooled in float32.
        device: cpu, cuda or cuda:N. Default: the GPU if there is one.

    Raises:
        InputError: for an unknown pooling, dtype, device or prompt, a length or a number of tokens out of range, when
            there is no such checkpoint, for one that cannot be used: with a tokenizer that does not
            fit, or a weight that is not finite in that dtype; and for a folder of sentence-transformers that asks for
            what cannot be done.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        tokenizer: Any = None,
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        tokens: int = TOKENS,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device | None = None,
    ) -> None:
        if pooling is not None and pooling not in POOLINGS:
            raise InputError(f"unknown pooling {pooling!r}: choose from {', '.join(POOLINGS)}")
        if tokens < 1:
            raise InputError(f"a batch of {tokens} tokens holds no text: give at least 1")
        self.dtype, self.device = parse_dtype(dtype), parse_device(device)
        check_backend(self.dtype, self.device)
        recipe = Recipe()
        if isinstance(model, MODELS):
            if tokenizer is None:
                raise InputError("an encoder model comes without a tokenizer: pass its tokenizer too")
            bert, name = model, type(model).__name__
            check_tokenizer(tokenizer, bert.config.vocab_size, name)
        elif tokenizer is not None:
            raise InputError(f"{str(model)!r} brings its own tokenizer: pass a tokenizer with an encoder model only")
        else:
            bert, tokenizer = load(model)
            recipe = read_recipe(model)
            name = str(model)
            if hasattr(bert, "pooler"):
                bert.pooler = None
        self.poolings = recipe.poolings if pooling is None else (pooling,)
        self.normalize = recipe.normalize if normalize is None else normalize
        self.prompt = _choose_prompt(recipe, prompt, prompt_name)
        longest = int(min(longest_text(bert), tokenizer.model_max_length))
        asked = max_length if max_length is not None or recipe.max_length is None else min(recipe.max_length, longest)
        self.max_length = check_max_length(asked, longest)
        self.bert = fuse(bert).to(self.device, self.dtype).eval()
        check_finite(self.bert, name)  # in its dtype: float16 ends at 65504
        if not isinstance(self.bert, EncoderModel) or is_decoder(bert):
            raise InputError(
                f"{type(bert).__name__} is a decoder or overrides Hugging Face's class: "
                "only fused ones take packed text"
            )
        self.tokenizer = _lowering(tokenizer) if recipe.lower else tokenizer
        self.tokens = tokens

    @property
    def hidden(self) -> int:
        """Numbers in an embedding."""
        return self.bert.config.hidden_size * len(self.poolings)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts: float32 (texts, hidden), in their order.

        Raises:
            TypeError: for one text that is in no list, and for one that is not a str.
            InputError: for one with lone surrogates, which no tokenizer takes.
        """
        if isinstance(texts, str):  # whose letters would be embedded
            raise TypeError(f"texts is one str, {texts!r:.60}: give a list of texts")
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
        encoded = self.tokenizer(
            [self.prompt + text for text in texts],
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        ids: list[list[int]] = encoded["input_ids"]
        for row, tokens in enumerate(ids):
            if not tokens:
                raise InputError(f"texts[{row}] has no tokens ({texts[row]!r:.60}): use a tokenizer that adds [CLS]")
        batches: list[PackedTexts] = []
        left = 0
        for row in sorted(range(len(ids)), key=lambda row: -len(ids[row])):
            if not batches or len(ids[row]) > left:
                batches.append(PackedTexts())
                left = self.tokens
            batches[-1].rows.append(row)
            batches[-1].ids.append(ids[row])
            batches[-1].cut += len(ids[row]) == self.max_length and self._is_cut(encoded, row, texts)
            left -= len(ids[row])
        return batches

    def _is_cut(self, encoded: Any, row: int, texts: Sequence[str]) -> bool:
        """Whether a text, tokenized to the length limit, is longer than that."""
        if encoded.is_fast:
            return bool(encoded.encodings[row].overflowing)
        return len(self.tokenizer(self.prompt + texts[row], verbose=False)["input_ids"]) > self.max_length

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
            read_rows="first" if self.poolings == ("cls",) else "all",
        ).last_hidden_state[0]
        pooled = pool(self.poolings, hidden.float(), lengths.to(self.device))
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
            "pooling": "+".join(self.poolings),
            "normalize": self.normalize,
            "prompt": self.prompt,
            "max_length": self.max_length,
            "tokens": self.tokens,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def _choose_prompt(recipe: Recipe, prompt: str | None, name: str | None) -> str:
    """What stands before each text."""
    if prompt is not None and name is not None:
        raise InputError("a prompt and the name of one are two prompts: give one of them")
    if name is not None and name not in recipe.prompts:
        known = ", ".join(recipe.prompts) or "none"
        raise InputError(f"no prompt {name!r} in config_sentence_transformers.json: it has {known}")
    if prompt is None:
        chosen = recipe.prompt if name is None else name
        prompt = "" if chosen is None else recipe.prompts[chosen]
    if not is_unicode(prompt):
        raise InputError(f"the prompt {prompt!r:.60} is not UTF-8: give it text in UTF-8")
    if prompt and not recipe.pools_prompt:
        raise InputError(
            "this model leaves the tokens of its prompt out of the pooling, which encode cannot do: embed by "
            "sentence-transformers itself, after fastbert.fuse(model)"
        )
    return prompt


def _lowering(tokenizer: Any) -> Any:
    """A tokenizer that makes texts lower case before all else."""
    from tokenizers.normalizers import Lowercase, Sequence

    if not tokenizer.is_fast:
        raise InputError("do_lower_case in sentence_bert_config.json needs a tokenizer with a tokenizer.json")
    backend = tokenizer.backend_tokenizer
    backend.normalizer = Sequence([Lowercase(), *([] if backend.normalizer is None else [backend.normalizer])])
    return tokenizer


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

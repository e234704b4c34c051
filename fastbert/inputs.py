"""A user's words as objects: a checkpoint, a batch of text, a dtype and a device, each checked before any work."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, BertModel

#: English of very different lengths, so that a batch of it is mostly padding.
SENTENCES: tuple[str, ...] = (
    "Rain is falling.",
    "Who left the kitchen window open last night?",
    "The ferry leaves at a quarter past seven, whether or not the fog has lifted.",
    "She read the letter twice, folded it along its old creases, and put it back in the drawer without a word.",
    "Bakers know that dough is never the same on two mornings: flour drinks more on dry days, yeast sulks in the cold, "
    "and an oven that was true in June runs hot by October.",
    "The committee could not agree on the bridge. Engineers wanted steel because it was light, the town wanted stone "
    "because it was beautiful, and the treasurer, who had seen both estimates, wanted another ferry.",
    "When the museum finally opened its basement to visitors, nobody expected the clocks. There were four hundred of "
    "them, bought by a watchmaker's widow over thirty years, and every one was kept wound by a retired teacher who "
    "came by bus each morning, set them against the radio, and would not be paid for it.",
    "Early maps of the coast show an island that no ship has found since. Some captains blamed the first surveyor, a "
    "careful man who had never been wrong before; others said that the sea had taken it in the storm of that winter. "
    "A century later a fishing boat, hauling its nets in shallow water some nine miles out, brought up a carved door "
    "frame, two copper pans and the bell of a small church. The bell still rings, slightly flat, above the school "
    "where those pans hang on the wall.",
)

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


class InputError(ValueError):
    """Something the caller gave cannot be used; the message is one line, names it and says the way out."""


@dataclass
class Tokenized:
    """Tokenized sentences, padded on the right.

    Attributes:
        inputs: what the model is called with, int64 (batch, seq) each.
        tokens: each sentence's tokens, special ones included, padding not.
        truncated: how many sentences lost their end to the length limit.
    """

    inputs: dict[str, Tensor]
    tokens: list[list[str]]
    truncated: int

    @property
    def mask(self) -> Tensor:
        """bool (batch, seq), True at tokens."""
        return self.inputs["attention_mask"].bool()


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The working dtype of a name; InputError for any other than float32, float16 and bfloat16."""
    found = DTYPES.get(dtype.lower()) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise InputError(f"unknown dtype {str(dtype)!r}: use float32, float16 or bfloat16")
    return found


def parse_device(device: str | torch.device | None) -> torch.device:
    """The device of a name; None is the GPU if there is one. InputError for one that is not here."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise InputError(f"unknown device {str(device)!r}: use cpu, cuda or cuda:N") from None
    if found.type not in ("cpu", "cuda"):
        raise InputError(f"fastbert has no kernels for device {str(device)!r}: use cpu, cuda or cuda:N")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {str(device)!r} is not available, torch sees no GPU here: use --device cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {str(device)!r} is not available: torch sees {torch.cuda.device_count()} GPU(s)")
    return found


def load_config(model: str | os.PathLike[str]) -> Any:
    """The configuration of a BERT checkpoint: a folder saved by transformers, or a name on the Hugging Face hub.

    Raises:
        InputError: when there is none under that name.
    """
    folder = Path(model)
    if folder.exists() and not (folder / "config.json").is_file():
        raise InputError(f"no checkpoint in {str(model)!r}: it has no config.json; name a folder saved by transformers")
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model {str(model)!r} not found: name a folder with a BERT checkpoint, or a model on the Hugging Face hub "
            f"that this machine can reach ({_first_line(error)})"
        ) from error
    if config.model_type != "bert":
        raise InputError(f"model {str(model)!r} is of type {config.model_type!r}, not 'bert': fastbert takes BERT only")
    return config


def load(model: str | os.PathLike[str], dropout: bool = False) -> tuple[BertModel, Any]:
    """Hugging Face's eager `BertModel` in float32 on the CPU, and its tokenizer.

    A pooler that the checkpoint lacks gets fixed random weights; anything else that it lacks is an error.

    Args:
        model: a folder saved by transformers, or a name on the Hugging Face hub.
        dropout: keep the checkpoint's dropout probabilities; else they are 0.

    Raises:
        InputError: when there is no BERT checkpoint with a tokenizer under that name.
    """
    load_config(model)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            loaded: Any = BertModel.from_pretrained(
                model,
                attn_implementation="eager",
                dtype=torch.float32,
                output_loading_info=True,
                **({} if dropout else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
            )
        bert, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # every storage format has its own way of being broken
        raise InputError(f"cannot load {str(model)!r}: {_first_line(error)}") from error
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise InputError(f"{str(model)!r} is not a whole BERT checkpoint: {len(missing)} weights miss, as {missing[0]}")
    return bert, tokenizer


def check_max_length(max_length: int | None, limit: int) -> int:
    """The length to cut texts to: `limit`, the most that the model takes, unless a shorter one is asked for.

    Raises:
        InputError: for one outside 3 .. limit.
    """
    length = limit if max_length is None else max_length
    if not 3 <= length <= limit:  # [CLS], one token, [SEP]
        raise InputError(f"max length {length} is out of range: this model takes 3 to {limit}")
    return length


def tokenize(tokenizer: Any, sentences: Sequence[str], max_length: int | None, limit: int) -> Tokenized:
    """Tokenize sentences into one batch of at most `limit` positions, padded on the right to the longest.

    Raises:
        InputError: for no sentences, an empty one, or a `max_length` outside 3 .. limit.
    """
    if not sentences:
        raise InputError("no text to compare on: give at least one sentence")
    for i, sentence in enumerate(sentences):
        if not sentence.strip():
            raise InputError(f"sentence {i + 1} is empty ({sentence!r}): give it some text")
    length = check_max_length(max_length, limit)
    whole = [len(ids) for ids in tokenizer(list(sentences), verbose=False)["input_ids"]]
    encoded = tokenizer(
        list(sentences),
        padding=True,
        padding_side="right",
        truncation=True,
        max_length=length,
        return_attention_mask=True,
        return_token_type_ids=True,
        return_tensors="pt",
    )
    names = ("input_ids", "attention_mask", "token_type_ids")
    tokens = [
        tokenizer.convert_ids_to_tokens(ids[mask.bool()].tolist())
        for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
    ]
    return Tokenized({name: encoded[name] for name in names}, tokens, sum(count > length for count in whole))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

"""A user's words as objects: a checkpoint, a batch of text, a dtype and a device, each checked before any work."""

import os
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.activations import ACT2FN

from fastbert.families import MODEL_TYPES
from fastbert_kernels import uses_triton

#: [CLS], one token, [SEP].
MIN_LENGTH = 3

#: The fields of a configuration that say how large a model is: those of every family, and those of some.
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_MORE_SIZES = ("intermediate_size", "type_vocab_size", "embedding_size", "hidden_dim", "relative_attention_num_buckets")
#: The fields that name the activation, and those that are probabilities of dropout.
_ACTIVATIONS = ("hidden_act", "activation")
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")
#: Weights of an encoder in a checkpoint, also of one with a head. The two buffers were saved by old versions.
_OF_ENCODER = re.compile(
    r"(\w+\.)?(encoder\.|transformer\.|embeddings_project\.|embeddings\.(?!position_ids$|token_type_ids$))"
)

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
        raise InputError(f"device {str(device)!r} is not available, torch sees no GPU here: use cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {str(device)!r} is not available: torch sees {torch.cuda.device_count()} GPU(s)")
    return found


def check_backend(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether ops on such tensors run as Triton kernels; InputError where the chosen backend cannot run them."""
    try:
        return uses_triton(torch.empty(0, dtype=dtype, device=device))
    except (RuntimeError, TypeError) as error:
        raise InputError(str(error)) from error


def load_config(model: str | os.PathLike[str]) -> Any:
    """The configuration of a checkpoint of one of the families: a folder saved by transformers, or a name on the
    Hugging Face hub.

    Raises:
        InputError: when there is none under that name, and for sizes that no model has.
    """
    name = str(model)
    try:
        here = Path(model).exists()
        if Path(model).is_file():
            raise InputError(f"{name!r} is a file: name the folder that it is in, one saved by transformers")
        if here and not (Path(model) / "config.json").is_file():
            raise InputError(f"no checkpoint in {name!r}: it has no config.json; name a folder saved by transformers")
    except OSError as error:  # such as a name that is too long
        raise InputError(f"model {name!r} cannot be read: {_in_one_line(error)}") from error
    try:
        config = AutoConfig.from_pretrained(model)
    except Exception as error:  # a damaged file fails in many ways
        if here:
            raise InputError(f"cannot use config.json of {name!r}: {_in_one_line(error)}") from error
        raise InputError(
            f"model {name!r} not found: name a folder with a checkpoint, or a model on the Hugging Face hub "
            f"that this machine can reach ({_in_one_line(error)})"
        ) from error
    if config.model_type not in MODEL_TYPES:
        known = ", ".join(sorted(MODEL_TYPES))
        raise InputError(f"model {name!r} is of type {config.model_type!r}, which fastbert has not: it takes {known}")
    _check_config(name, config)
    return config


def _check_config(name: str, config: Any) -> None:
    """InputError for what no model has and Hugging Face's own checks let through."""
    for field in (*_SIZES, *[more for more in _MORE_SIZES if hasattr(config, more)]):
        value = getattr(config, field, None)
        if type(value) is not int or value < 1:
            raise InputError(f"config.json of {name!r}: {field} is {value!r}, which has to be a whole number from 1 on")
    for field in _ACTIVATIONS:
        if (activation := getattr(config, field, "gelu")) not in ACT2FN:
            raise InputError(f"config.json of {name!r}: {field} {activation!r} is no activation of transformers")
    if type(chunk := config.chunk_size_feed_forward) is not int:
        raise InputError(f"config.json of {name!r}: chunk_size_feed_forward is {chunk!r}, not a whole number")
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"config.json of {name!r}: hidden_size {config.hidden_size} does not divide into num_attention_heads "
            f"{config.num_attention_heads}"
        )


def load(model: str | os.PathLike[str], dropout: bool = False) -> tuple[PreTrainedModel, Any]:
    """Hugging Face's eager encoder model in float32 on the CPU, and its tokenizer.

    A pooler that the checkpoint lacks gets fixed random weights; anything else that it lacks is an error.

    Args:
        model: a folder saved by transformers, or a name on the Hugging Face hub.
        dropout: keep the checkpoint's dropout probabilities; else they are 0.

    Raises:
        InputError: when there is no such checkpoint with a tokenizer, when weights miss, when there are some that the
            configuration has no place for, or when one is not finite.
    """
    config = load_config(model)
    name = str(model)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            loaded: Any = MODEL_TYPES[config.model_type].from_pretrained(
                model,
                attn_implementation="eager",
                dtype=torch.float32,
                output_loading_info=True,
                **({} if dropout else dict.fromkeys([name for name in _DROPOUTS if hasattr(config, name)], 0.0)),
            )
        bert, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # every storage format has its own way of being broken
        raise InputError(f"cannot load {name!r}: {_in_one_line(error)}") from error
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise InputError(f"{name!r} is not a whole checkpoint: {len(missing)} weights miss, as {missing[0]}")
    unread = sorted(key for key in info["unexpected_keys"] if _OF_ENCODER.match(key))
    if unread:
        raise InputError(
            f"{name!r} has {len(unread)} weights that its config.json has no place for, as {unread[0]}: mend the "
            f"configuration, whose num_hidden_layers is {config.num_hidden_layers}"
        )
    check_finite(bert, name)
    check_tokenizer(tokenizer, config.vocab_size, name)
    return bert, tokenizer


def load_classifier(model: str | os.PathLike[str]) -> tuple[Any, Any]:
    """Hugging Face's eager classifier of sequences in float32 on the CPU, in eval mode, and its tokenizer.

    Raises:
        InputError: when there is none with a tokenizer under that name, when weights miss, those of the classifier
            among them, and when one is not finite.
    """
    config = load_config(model)
    name = str(model)
    try:
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            model, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
        )
        classifier, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # every storage format has its own way of being broken
        raise InputError(f"cannot load {name!r}: {_in_one_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{name!r} is no classifier of sequences: {len(missing)} weights miss, as {missing[0]}; name a folder that "
            "was saved after fine-tuning one"
        )
    check_finite(classifier, name)
    check_tokenizer(tokenizer, config.vocab_size, name)
    return classifier.eval(), tokenizer


def check_finite(bert: torch.nn.Module, name: str) -> None:
    """InputError for a model with a parameter that is not finite: whatever it computes is not a number either."""
    for key, parameter in bert.named_parameters():
        if not parameter.isfinite().all():
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise InputError(f"{name!r} cannot be used in {dtype}: its weight {key} has NaN or infinite values")


def check_tokenizer(tokenizer: Any, vocab_size: int, name: str) -> None:
    """Whether a tokenizer fits a model of `vocab_size` words.

    Raises:
        InputError: when it has no words, which is what transformers makes of a folder without its files; when it has
            token ids that the model has no embedding for; when its `model_max_length` is no length.
    """
    vocabulary = tokenizer.get_vocab()
    if vocabulary.keys() <= set(tokenizer.all_special_tokens):
        raise InputError(
            f"the tokenizer of {name!r} has no words: add its files (tokenizer.json or vocab.txt, and "
            "tokenizer_config.json), as tokenizer.save_pretrained writes them"
        )
    largest = max(vocabulary.values())
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer of {name!r} has token ids up to {largest}, the model takes them to {vocab_size - 1}: take "
            "the tokenizer that the model was trained with"
        )
    longest = tokenizer.model_max_length
    whole = type(longest) is int or (isinstance(longest, float) and longest.is_integer())
    if not whole or longest < MIN_LENGTH:
        raise InputError(
            f"the tokenizer of {name!r} has model_max_length {longest!r}: write a whole number of at least "
            f"{MIN_LENGTH} in tokenizer_config.json"
        )


def check_max_length(max_length: int | None, limit: int) -> int:
    """The length to cut texts to: `limit`, the most that the model takes, unless a shorter one is asked for.

    Raises:
        InputError: for one outside 3 .. limit.
    """
    length = limit if max_length is None else max_length
    if not MIN_LENGTH <= length <= limit:
        raise InputError(f"max length {length} is out of range: this model takes {MIN_LENGTH} to {limit}")
    return length


def tokenize(tokenizer: Any, sentences: Sequence[str], max_length: int | None, limit: int) -> Tokenized:
    """Tokenize sentences into one batch of at most `limit` positions, padded on the right to the longest.

    Raises:
        InputError: for no sentences, one that is empty or not UTF-8, or a `max_length` outside 3 .. limit.
    """
    if not sentences:
        raise InputError("no text to compare on: give at least one sentence")
    for i, sentence in enumerate(sentences):
        if not sentence.strip():
            raise InputError(f"sentence {i + 1} is empty ({sentence!r}): give it some text")
        if not is_unicode(sentence):
            raise InputError(f"sentence {i + 1} is not UTF-8 ({sentence!r:.60}): give it text in UTF-8")
    length = check_max_length(max_length, limit)
    whole = [len(ids) for ids in tokenizer(list(sentences), verbose=False)["input_ids"]]
    encoded = tokenizer(
        list(sentences),
        padding=True,
        padding_side="right",
        truncation=True,
        max_length=length,
        return_attention_mask=True,
        return_tensors="pt",
    )
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded]
    tokens = [
        tokenizer.convert_ids_to_tokens(ids[mask.bool()].tolist())
        for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
    ]
    return Tokenized({name: encoded[name] for name in names}, tokens, sum(count > length for count in whole))


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8. Lone surrogates, which stand for bytes that were not, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _in_one_line(error: BaseException) -> str:
    """What an error says, cut to what a reader takes in; its type where it says nothing."""
    return textwrap.shorten(str(error), 300) or type(error).__name__

"""What a folder of sentence-transformers says of how its embeddings are made.

`modules.json` lists what comes after each other: a Transformer, Pooling and Normalize are followed. Whatever else is
there, or is set to what is not known, is an error: embeddings that are not the model's own would be worse than none.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbert.inputs import InputError

from .pooling import POOLINGS

#: Fields of Pooling's configuration before version 6, in the order in which several stand side by side.
_OLD_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

_OTHER_WAY = "embed by sentence-transformers itself, after fastbert.fuse(model)"


@dataclass(frozen=True)
class Recipe:
    """How embeddings are made of a model's hidden states.

    Attributes:
        poolings: names of `POOLINGS`, whose results stand side by side.
        normalize: whether embeddings have length 1.
        max_length: texts are cut to this many tokens; None: to what the model takes.
        lower: whether texts are made lower case, whatever the tokenizer does.
        prompts: by name, what may stand before a text.
        prompt: the name of the one that does unless another is asked for.
        pools_prompt: whether the tokens of the prompt are pooled too.
    """

    poolings: tuple[str, ...] = ("mean",)
    normalize: bool = False
    max_length: int | None = None
    lower: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    prompt: str | None = None
    pools_prompt: bool = True


class _Folder:
    """The JSON files of a model: of a folder, or of a name on the Hugging Face hub."""

    def __init__(self, model: str | os.PathLike[str]) -> None:
        self.model, self.name = model, str(model)

    def read(self, file: str) -> Any:
        """What a file holds, or None where there is none.

        Raises:
            InputError: when it cannot be read.
        """
        try:
            path = self._find(file)
            return None if path is None else json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {file} of {self.name!r}: {error}") from error

    def _find(self, file: str) -> Path | None:
        if Path(self.model).exists():
            path = Path(self.model) / file
            return path if path.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.name, file))
        except LocalEntryNotFoundError as error:  # nobody knows whether the hub has it
            raise InputError(
                f"cannot see whether {self.name!r} has a {file}, for the Hugging Face hub cannot be reached: name a "
                "folder"
            ) from error
        except EntryNotFoundError:
            return None


def read_recipe(model: str | os.PathLike[str]) -> Recipe:
    """The recipe of a model; where there is no `modules.json`, as transformers saves it, the mean of all tokens.

    Raises:
        InputError: for what cannot be followed.
    """
    folder = _Folder(model)
    modules = folder.read("modules.json")
    if modules is None:
        return Recipe()
    kinds, paths = _modules_of(folder, modules)
    if kinds[:2] != ["Transformer", "Pooling"] or any(kind != "Normalize" for kind in kinds[2:]):
        raise InputError(
            f"{folder.name!r} makes its embeddings by {', '.join(kinds) or 'nothing'}, of which encode can do "
            f"Transformer, Pooling and Normalize only: {_OTHER_WAY}"
        )
    if paths[0]:
        raise InputError(
            f"{folder.name!r} has its model in {paths[0]!r}: name that folder, and give --pooling yourself"
        )
    for path in paths[2:]:
        own = "sentence_embedding"
        _check(folder, f"{path}/config.json", module_input_name=own, module_output_name=own)
    poolings, pools_prompt = _read_pooling(folder, f"{paths[1]}/config.json")
    length, lower = _read_transformer(folder)
    about = _check(folder, "config_sentence_transformers.json", model_type="SentenceTransformer")
    prompts = {name: text or "" for name, text in (about.get("prompts") or {}).items()}
    default = about.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise InputError(f"{folder.name!r} has no prompt {default!r}, which its default_prompt_name names")
    return Recipe(poolings, len(kinds) > 2, length, lower, prompts, default, pools_prompt)


def _modules_of(folder: _Folder, modules: Any) -> tuple[list[str], list[str]]:
    """The kinds of modules, and their folders, in their order."""
    try:
        ordered = sorted(modules, key=lambda module: module["idx"])
        types, paths = [str(module["type"]) for module in ordered], [str(module["path"]) for module in ordered]
    except (TypeError, KeyError) as error:
        raise InputError(f"modules.json of {folder.name!r} is no list of modules ({error})") from error
    kinds = [kind.rpartition(".")[2] if kind.startswith("sentence_transformers.") else kind for kind in types]
    return kinds, paths


def _read_pooling(folder: _Folder, file: str) -> tuple[tuple[str, ...], bool]:
    """The poolings, and whether they pool the prompt too."""
    config = folder.read(file)
    if not isinstance(config, dict):
        raise InputError(f"{folder.name!r} has no {file}, which says how it pools")
    named = config.get("pooling_mode")
    if named is None:
        named = [name for old, name in _OLD_POOLINGS.items() if config.get(old)] or ["mean"]
    poolings = (named,) if isinstance(named, str) else tuple(named)
    unknown = [name for name in poolings if name not in POOLINGS]
    if unknown or not poolings:
        raise InputError(f"{file} of {folder.name!r} asks for pooling {named!r}: encode knows {', '.join(POOLINGS)}")
    return poolings, config.get("include_prompt", True)


def _read_transformer(folder: _Folder) -> tuple[int | None, bool]:
    """The length that texts are cut to, and whether they are made lower case."""
    file = "sentence_bert_config.json"
    config = _check(folder, file, transformer_task="feature-extraction", module_output_name="token_embeddings")
    length = config.get("max_seq_length")
    if length is not None and type(length) is not int:
        raise InputError(f"{file} of {folder.name!r}: max_seq_length is {length!r}, not a whole number")
    return length, bool(config.get("do_lower_case"))


def _check(folder: _Folder, file: str, **fields: str) -> dict[str, Any]:
    """What a file holds, empty where there is none; InputError where a field, if it is there, has another value."""
    config = folder.read(file) or {}
    for name, value in fields.items():
        if config.get(name) not in (value, None):
            raise InputError(
                f"{file} of {folder.name!r}: {name} is {config[name]!r}, which encode cannot do: {_OTHER_WAY}"
            )
    return config

"""The table of families: of each, Hugging Face's classes, a tiny configuration, and what differs from BERT."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from models import mask_of, randomize
from torch import nn

import fastbert

LENGTHS = [11, 4, 7]
SEQ = 11
#: No family has its padding, or another special id, from here on.
FIRST_WORD = 4
VOCABULARY = 60

#: Two layers, four heads of 8. Attention is neither flat nor saturated, where rounding alone would decide.
#: DistilBERT's configuration takes these names too.
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
}

#: What comes after a family's prefix in a head's name -> what its labels are (`labelled`).
COMMON_HEADS = {
    "ForMaskedLM": "words",
    "ForSequenceClassification": "sequence",
    "ForMultipleChoice": "choice",
    "ForTokenClassification": "tokens",
    "ForQuestionAnswering": "span",
}


@dataclass(frozen=True)
class Family:
    """One family, or one of two kinds of its models.

    Attributes:
        model: Hugging Face's encoder model.
        settings: of its tiny configuration, besides `TINY`.
        heads: what comes after the family's prefix in a head's name -> what its labels are.
        layers: the path of its layers.
        projections, norm, chunk: the paths in a layer of query, key and value, of the LayerNorm after attention, and of
            the function that the feed-forward part runs in chunks.
        dropouts: what the configuration calls the probabilities after products, and of attention.
        pad: the id of padding.
        token_types: how many; 0: the family has none.
        counts: positions count the ids that are not padding, from `pad + 1` on.
        decodes: it can be made a decoder, and takes a cache.
    """

    model: type[Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    heads: Mapping[str, str] = field(default_factory=lambda: COMMON_HEADS | {"ForCausalLM": "causal"})
    layers: str = "encoder.layer"
    projections: tuple[str, str, str] = ("attention.self.query", "attention.self.key", "attention.self.value")
    norm: str = "attention.output.LayerNorm"
    chunk: str = "feed_forward_chunk"
    dropouts: tuple[str, str] = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    pad: int = 0
    token_types: int = 2
    counts: bool = False
    decodes: bool = True

    @property
    def prefix(self) -> str:
        """What the family's classes begin with."""
        return self.model.__name__.removesuffix("Model")

    def config(self, dropout: float = 0.0, **changes: Any) -> Any:
        """A tiny configuration."""
        own = dict(self.settings) | dict.fromkeys(self.dropouts, dropout)
        if self.token_types:
            own["type_vocab_size"] = self.token_types
        return self.model.config_class(**{**TINY, "pad_token_id": self.pad, **own, **changes})

    def plain(self, head: str = "Model", **changes: Any) -> Any:
        """Hugging Face's encoder model, or a head, with random values in every parameter, in eval mode."""
        made = getattr(transformers, self.prefix + head)(self.config(**changes))
        randomize(made)
        with torch.no_grad():
            for module in made.modules():
                if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                    module.weight[module.padding_idx].normal_(std=0.5)
        return made.eval()

    def pair(self, head: str = "Model", packing: bool | str = "auto", **changes: Any) -> tuple[Any, Any]:
        """The same, and a copy of it that is fused."""
        plain = self.plain(head, **changes)
        return plain, fastbert.fuse(copy.deepcopy(plain), packing=packing)

    def layer(self, model: Any, index: int) -> Any:
        """A layer of an encoder model."""
        return model.get_submodule(f"{self.layers}.{index}")

    def name(self, part: str, index: int) -> str:
        """The name in an encoder model of what has this path in a layer."""
        return f"{self.layers}.{index}.{part}"

    def batch(self, kind: str = "ragged") -> dict[str, torch.Tensor]:
        """A padded batch: "full", "ragged", "left" (padding on the left), "holes" (words that the mask hides), or "pad
        inside" (the id of padding among words that the mask shows)."""
        mask = mask_of([SEQ] * 3 if kind == "full" else LENGTHS, SEQ)
        mask = mask.flip(1) if kind == "left" else mask
        words = torch.randint(FIRST_WORD, VOCABULARY, mask.shape).masked_fill(mask == 0, self.pad)
        if kind == "holes":
            mask[0, 4:6] = 0
            mask[2, 1] = 0
        if kind == "pad inside":
            words[0, 3] = words[1, 0] = words[2, 5] = self.pad
        given = {"input_ids": words, "attention_mask": mask}
        if self.token_types:
            given["token_type_ids"] = torch.randint(0, self.token_types, mask.shape)
        return given

    def labelled(self, head: str, at_padding: int = -100) -> dict[str, torch.Tensor]:
        """A ragged batch with the labels that a head's usual collator makes, and `at_padding` at padding."""
        given, kind = self.batch(), self.heads[head]
        words, padding = given["input_ids"], given["attention_mask"] == 0
        of_sequences = torch.tensor([0, 1, 1])
        if "choice" in kind:
            given = {name: torch.stack([value, value.flip(0)], 1) for name, value in given.items()}
        if kind == "sequence" or "choice" in kind:
            return given | {"labels": of_sequences}
        if kind == "span":
            return given | {"start_positions": torch.tensor([1, 2, 0]), "end_positions": torch.tensor([3, 3, 6])}
        if kind == "words and sequence":
            given["next_sentence_label"] = of_sequences
        if "words" in kind:
            words = words.masked_fill(torch.rand(words.shape) > 0.4, -100)
            words[0, 1] = FIRST_WORD
        labels = words % 2 if kind in ("tokens", "replaced") else words
        if kind != "replaced":  # that loss leaves out what the mask hides, and knows no -100
            labels = labels.masked_fill(padding, at_padding)
        return given | {"labels": labels}


_ROBERTA: dict[str, Any] = {"settings": {"intermediate_size": 48}, "pad": 1, "token_types": 1, "counts": True}
_ELECTRA: dict[str, Any] = {"intermediate_size": 48, "summary_last_dropout": 0.0}
_ELECTRA_HEADS = COMMON_HEADS | {
    "ForMultipleChoice": "choice of a summary",
    "ForCausalLM": "causal",
    "ForPreTraining": "replaced",
}

FAMILIES: dict[str, Family] = {
    "bert": Family(
        transformers.BertModel,
        {"intermediate_size": 48},
        COMMON_HEADS
        | {"LMHeadModel": "causal", "ForPreTraining": "words and sequence", "ForNextSentencePrediction": "sequence"},
    ),
    "roberta": Family(transformers.RobertaModel, **_ROBERTA),
    "xlm-roberta": Family(transformers.XLMRobertaModel, **_ROBERTA),
    "camembert": Family(transformers.CamembertModel, **_ROBERTA),
    "data2vec-text": Family(transformers.Data2VecTextModel, **_ROBERTA),
    "electra": Family(transformers.ElectraModel, _ELECTRA | {"embedding_size": 32}, _ELECTRA_HEADS),
    "electra, narrow": Family(transformers.ElectraModel, _ELECTRA | {"embedding_size": 16}, _ELECTRA_HEADS),
    "distilbert": Family(
        transformers.DistilBertModel,
        {"hidden_dim": 48, "qa_dropout": 0.0, "seq_classif_dropout": 0.0},
        COMMON_HEADS,
        layers="transformer.layer",
        projections=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        norm="sa_layer_norm",
        chunk="ffn.ff_chunk",
        dropouts=("dropout", "attention_dropout"),
        token_types=0,
        decodes=False,
    ),
    "mpnet": Family(
        transformers.MPNetModel,
        {"intermediate_size": 48},
        COMMON_HEADS,
        projections=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        norm="attention.LayerNorm",
        pad=1,
        token_types=0,
        counts=True,
        decodes=False,
    ),
}

#: For tests of every family, of those that take a cache, and of every head of every family.
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
each_decoding = pytest.mark.parametrize(
    "family", [pytest.param(family, id=name) for name, family in FAMILIES.items() if family.decodes]
)
each_head = pytest.mark.parametrize(
    ("family", "head"),
    [pytest.param(family, head, id=f"{name}-{head}") for name, family in FAMILIES.items() for head in family.heads],
)

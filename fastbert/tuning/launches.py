"""Which launches a model makes."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from transformers.activations import ACT2FN

from fastbert.families import activation_name, intermediate_size
from fastbert.modules.feed_forward import KERNEL_ACTIVATIONS
from fastbert_kernels.backend import allows_tf32
from fastbert_kernels.catalogue import FUSED, KERNELS, TUNABLE, Launch, Product
from fastbert_kernels.tiles import feed_forward_fusible, short_class

from .problems import Sizes


@dataclass(frozen=True)
class Widths:
    """What a model's launches depend on: its features, those of its feed-forward layer, and of a head; and what the
    kernels call its activation, None where they have none."""

    hidden: int
    intermediate: int
    head_dim: int
    activation: str | None = "gelu"

    def fusible(self, dtype: torch.dtype) -> bool:
        """Whether the feed-forward products can be fused at all."""
        return feed_forward_fusible(dtype, self.hidden, self.intermediate, self.activation)

    @classmethod
    def of(cls, config: Any) -> "Widths":
        """The widths of a BERT configuration."""
        head_dim = config.hidden_size // config.num_attention_heads
        name = activation_name(config)
        activation = KERNEL_ACTIVATIONS.get(type(ACT2FN[name])) if name in ACT2FN else None
        return cls(config.hidden_size, intermediate_size(config), head_dim, activation)


#: Measured where no model is named: BERT-base, BERT-large, MiniLM.
COMMON = (Widths(768, 3072, 64), Widths(1024, 4096, 64), Widths(384, 1536, 32))


def launches(
    models: tuple[Widths, ...],
    dtype: torch.dtype,
    full: bool,
    named: tuple[str, ...] = (),
    lengths: tuple[int, ...] = Sizes.lengths,
) -> list[Launch]:
    """The launches of models, each once, kernel by kernel: float32 scores with TF32 where torch allows it.

    Args:
        full: also those that read or write attention maps, and the relation kernels of distillation.
        named: only kernels whose names have one of these words in them; default all.
        lengths: tokens of the sequences: attention kernels have a launch for each class of them.
    """
    found = []
    for name in TUNABLE:
        kernel = KERNELS[name]
        if named and not any(word in name for word in named):
            continue
        if kernel.op == "relation" and not full:
            continue
        for model in models:
            if kernel.op == "feed_forward" and not model.fusible(dtype):
                continue
            width = getattr(model, kernel.width)
            tf32 = kernel.attends and dtype == torch.float32 and allows_tf32()
            if kernel.op != "attention":
                found.append(Launch(name, dtype, width, tf32=tf32))
                continue
            for maps, length in itertools.product((False, True) if full else (False,), sorted(lengths)):
                found.append(Launch(name, dtype, width, maps, short_class(length), tf32))
    return list(dict.fromkeys(found))


def products(models: tuple[Widths, ...], dtype: torch.dtype, named: tuple[str, ...] = ()) -> list[Product]:
    """The feed-forward products of models that can be fused, each once; `named` as of `launches`, the name is FUSED."""
    if named and not any(word in FUSED for word in named):
        return []
    found = [Product(dtype, x.hidden, x.activation) for x in models if x.activation is not None and x.fusible(dtype)]
    return list(dict.fromkeys(found))

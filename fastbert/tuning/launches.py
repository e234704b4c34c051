"""Which launches a model makes."""

from dataclasses import dataclass
from typing import Any

import torch

from fastbert_kernels.tuned import KERNELS, Launch


@dataclass(frozen=True)
class Widths:
    """What a model's launches depend on: its features, those of its feed-forward layer, and of a head."""

    hidden: int
    intermediate: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> "Widths":
        """The widths of a BERT configuration."""
        return cls(config.hidden_size, config.intermediate_size, config.hidden_size // config.num_attention_heads)


#: Measured where no model is named: BERT-base, BERT-large, MiniLM.
COMMON = (Widths(768, 3072, 64), Widths(1024, 4096, 64), Widths(384, 1536, 32))


def launches(models: tuple[Widths, ...], dtype: torch.dtype, full: bool, named: tuple[str, ...] = ()) -> list[Launch]:
    """The launches of models, each once, kernel by kernel.

    Args:
        full: also those that read or write attention maps, and the relation kernels of distillation.
        named: only kernels whose names have one of these words in them; default all.
    """
    found = []
    for kernel in KERNELS:
        if named and not any(word in kernel for word in named):
            continue
        if kernel.startswith("relation_") and not full:
            continue
        for model in models:
            if kernel.startswith(("attention_", "relation_")):
                width = model.head_dim
            else:
                width = model.intermediate if kernel.startswith("bias_") else model.hidden
            found.append(Launch(kernel, dtype, width))
            if full and kernel.startswith("attention_"):
                found.append(Launch(kernel, dtype, width, maps=True))
    return list(dict.fromkeys(found))

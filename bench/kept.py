"""What a layer in training keeps for its backward pass, counted without a GPU.

`python -m bench.kept` shows ours beside Hugging Face's, in vectors of the hidden size and two bytes an element for each
token. Dropout is off: for each one that a kernel does not draw again, a GPU keeps a byte an element more.
"""

import contextlib
import itertools
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import fastbert

from .stand_in import as_on_a_gpu

HIDDEN = 768


def _kept_bytes(library: Any, attention: str, autocast: bool, layers: int, batch: int, seq: int) -> int:
    config = transformers.BertConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=layers,
        vocab_size=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation=attention,
    )
    model = library.BertModel(config, add_pooling_layer=False).to(torch.float32 if autocast else torch.bfloat16)
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes(), saved  # alive, or its memory is another's
        return saved

    with contextlib.ExitStack() as stack:
        if library is fastbert:
            stack.enter_context(as_on_a_gpu())
        stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved))
        last = model.train()(torch.ones(batch, seq, dtype=torch.long)).last_hidden_state
    assert last.requires_grad
    return sum(size for size, _ in kept.values())


def kept_vectors(library: Any, attention: str, autocast: bool, seq: int) -> float:
    """What one more layer keeps for one more token, in vectors of the hidden size in bfloat16.

    Args:
        library: `fastbert` or `transformers`.
        attention: Hugging Face's implementation, "eager" or "sdpa"; of no effect on `fastbert`.
        autocast: to bfloat16, with float32 parameters; else all is bfloat16.
        seq: tokens of a sequence.
    """
    of_both = []
    for batch in (1, 2):  # without what does not grow with the tokens, as weights do not
        few, more = (_kept_bytes(library, attention, autocast, layers, batch, seq) for layers in (1, 2))
        of_both.append(more - few)
    return (of_both[1] - of_both[0]) / (seq * HIDDEN * 2)


def main() -> None:
    """Print the counts."""
    table = Table("model", "dtype", "tokens", "kept", title="kept by a layer, hidden-sized vectors a token")
    for autocast, seq in itertools.product((False, True), (128, 512)):
        for name, library in (("fastbert", fastbert), ("sdpa", transformers), ("eager", transformers)):
            kept = kept_vectors(library, "sdpa" if name == "sdpa" else "eager", autocast, seq)
            table.add_row(name, "autocast" if autocast else "bfloat16", str(seq), f"{kept:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()

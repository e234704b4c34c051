"""What a layer in training keeps for its backward pass, counted without a GPU.

`python -m bench.kept` shows ours beside Hugging Face's, in vectors of the hidden size and two bytes an element for each
token, without dropout and with. For a dropout Hugging Face keeps what it does on a GPU: a byte an element, and eager
attention the map after it too. Our kernels draw it again. Sdpa has no dropout in its attention here, for which it keeps
nothing on a GPU.
"""

import contextlib
import itertools
from typing import Any
from unittest import mock

import torch
import transformers
from rich.console import Console
from rich.table import Table

import fastbert

from .stand_in import as_on_a_gpu

HIDDEN = 768


def _gpu_dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Dropout as a GPU has it: its mask is bool. A CPU keeps one of x's dtype."""
    return torch.native_dropout(x, p, training)[0] if p > 0.0 else x


def _kept_bytes(
    library: Any, attention: str, autocast: bool, layers: int, batch: int, seq: int, dropout_p: float
) -> int:
    config = transformers.BertConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=layers,
        vocab_size=8,
        hidden_dropout_prob=dropout_p,
        attention_probs_dropout_prob=0.0 if attention == "sdpa" else dropout_p,
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
        stack.enter_context(mock.patch.object(torch.nn.functional, "dropout", _gpu_dropout))
        stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved))
        last = model.train()(torch.ones(batch, seq, dtype=torch.long)).last_hidden_state
    assert last.requires_grad
    return sum(size for size, _ in kept.values())


def kept_vectors(library: Any, attention: str, autocast: bool, seq: int, dropout_p: float = 0.0) -> float:
    """What one more layer keeps for one more token, in vectors of the hidden size in bfloat16.

    Args:
        library: `fastbert` or `transformers`.
        attention: Hugging Face's implementation, "eager" or "sdpa"; of no effect on `fastbert`.
        autocast: to bfloat16, with float32 parameters; else all is bfloat16.
        seq: tokens of a sequence.
        dropout_p: of the hidden states, and but for sdpa of the attention.
    """
    of_both = []
    for batch in (1, 2):  # without what does not grow with the tokens, as weights do not
        few, more = (_kept_bytes(library, attention, autocast, layers, batch, seq, dropout_p) for layers in (1, 2))
        of_both.append(more - few)
    return (of_both[1] - of_both[0]) / (seq * HIDDEN * 2)


def main() -> None:
    """Print the counts."""
    names = "dtype", "tokens", "dropout", "fastbert", "sdpa", "eager", "of sdpa's", "of eager's"
    table = Table(*names, title="kept by a layer, hidden-sized vectors a token")
    for autocast, seq, dropout_p in itertools.product((False, True), (128, 512), (0.0, 0.1)):
        ours, sdpa, eager = (
            kept_vectors(library, attention, autocast, seq, dropout_p)
            for library, attention in ((fastbert, "eager"), (transformers, "sdpa"), (transformers, "eager"))
        )
        cells = (f"{ours:.1f}", f"{sdpa:.1f}", f"{eager:.1f}", f"{ours / sdpa:.2f}", f"{ours / eager:.2f}")
        table.add_row("autocast" if autocast else "bfloat16", str(seq), f"{dropout_p:.1f}", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()

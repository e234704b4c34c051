"""Attention maps of one sentence, checked before they are shown."""

from collections.abc import Sequence

from torch import Tensor


def checked_maps(
    attentions: Sequence[Tensor | None], tokens: Sequence[str], sentence: int, heads: Sequence[int] | None
) -> dict[int, Tensor]:
    """The maps there are, by layer: float32 (heads, length, length) on the CPU, padding and other heads left out.

    Raises:
        ValueError: where there is nothing to show, or the sentence or a head is not on the maps.
    """
    maps = {i: layer for i, layer in enumerate(attentions) if layer is not None}
    if not maps or not tokens:
        raise ValueError(f"nothing to show: {len(maps)} attention maps and {len(tokens)} tokens")
    length = len(tokens)
    for i, layer in maps.items():
        if layer.dim() != 4 or not 0 <= sentence < layer.shape[0] or length > layer.shape[-1]:
            raise ValueError(
                f"attentions[{i}] has shape {tuple(layer.shape)}: showing sentence {sentence} with {length} tokens "
                "needs (batch, heads, seq, seq) that holds it"
            )
        missing = [head for head in heads or () if not 0 <= head < layer.shape[1]]
        if missing:
            raise ValueError(f"no head {', '.join(map(str, missing))}: layer {i} has 0 to {layer.shape[1] - 1}")
    chosen = slice(None) if heads is None else list(heads)
    return {i: layer[sentence, chosen, :length, :length].detach().float().cpu() for i, layer in maps.items()}

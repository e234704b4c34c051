"""Attention masks and head masks as callers write them, brought to the forms the encoder knows."""

import torch

from fastbert_kernels.reference import additive


def token_mask(mask: torch.Tensor, batch: int, seq: int) -> torch.Tensor:
    """A 2-D mask as bool (batch, seq), True at tokens.

    Raises:
        ValueError: for another shape, and for an additive mask, whose meaning a cast to bool would invert.
    """
    if mask.shape != (batch, seq):
        raise ValueError(
            f"attention_mask must have shape (batch, seq) = ({batch}, {seq}) like the input, the prefix in "
            f"a cache counted in, or be 3-D or 4-D, got {tuple(mask.shape)}"
        )
    if mask.is_floating_point() and torch.compiler.is_compiling():
        torch._assert_async(((mask == 0) | (mask == 1)).all(), "a 2-D attention_mask holds only 0 and 1")
    elif mask.is_floating_point() and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(
            f"a 2-D attention_mask marks tokens with 1 and padding with 0, got values from {mask.min().item():g} to "
            f"{mask.max().item():g}: pass an additive mask with four dimensions, or (mask == 0) if this is one"
        )
    return mask.to(torch.bool)


def dense_bias(mask: torch.Tensor, wanted: tuple[int, int, int, int]) -> torch.Tensor:
    """A 3-D or 4-D mask as additive float32 (batch | 1, heads | 1, seq | 1, keys).

    Bool and int masks mark visible keys; float masks are added to the scores.

    Args:
        mask: of the shape wanted or broadcasting to it; with three dimensions for all heads.
        wanted: (batch, heads, seq, keys).

    Raises:
        ValueError: for a shape that does not broadcast, a float mask of ones and zeros, or one that needs a gradient.
    """
    wide = mask[:, None] if mask.dim() == 3 else mask
    batch, _, seq, keys = wanted
    fits = wide.dim() == 4 and wide.shape[3] == keys
    if not fits or any(have not in (1, want) for have, want in zip(wide.shape, wanted, strict=True)):
        raise ValueError(
            f"attention_mask must have shape (batch, seq) = ({batch}, {keys}), (batch, seq, seq) = ({batch}, {seq}, "
            f"{keys}), or broadcast to (batch, heads, seq, seq) = {wanted}, got {tuple(mask.shape)}"
        )
    if not mask.is_floating_point():
        return additive(wide.to(torch.bool))
    if mask.requires_grad:
        raise ValueError(
            "attention_mask needs a gradient, which the fused attention does not give: pass mask.detach(), or train "
            "it on fastbert.unfuse(model)"
        )
    if not torch.compiler.is_compiling() and bool(((mask == 0) | (mask == 1)).all()) and bool((mask == 1).any()):
        raise ValueError(
            f"a float attention_mask with {mask.dim()} dimensions is added to the scores, but this one holds only 0 "
            "and 1: pass mask.bool() if it marks visible keys"
        )
    return additive(wide)


def layer_head_masks(mask: torch.Tensor | None, layers: int, heads: int) -> list[torch.Tensor | None]:
    """A head mask (heads,) or (layers, heads) as one (heads,) a layer.

    Raises:
        ValueError: for another shape.
    """
    if mask is None:
        return [None] * layers
    if mask.shape not in ((heads,), (layers, heads)):
        raise ValueError(
            f"head_mask must have shape (heads,) = ({heads},) or (layers, heads) = ({layers}, {heads}), got "
            f"{tuple(mask.shape)}"
        )
    mask = mask if mask.is_floating_point() else mask.float()
    return list(mask.expand(layers, heads).unbind(0))

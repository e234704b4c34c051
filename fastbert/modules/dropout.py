"""One seed a forward pass, from which every dropout draws a stream of its own."""

import torch

from fastbert_kernels import uses_triton


def draw_seed(device: torch.device) -> torch.Tensor:
    """A seed for the kernels' dropout from torch's generator: int64 scalar on the device."""
    return torch.randint(2**62, (), dtype=torch.int64, device=device)


def seed_for(seed: torch.Tensor | None, dropout_p: float, like: torch.Tensor) -> torch.Tensor | None:
    """The forward pass's seed; where a module is called on its own, with dropout, one of its own."""
    return draw_seed(like.device) if seed is None and dropout_p > 0.0 and uses_triton(like) else seed

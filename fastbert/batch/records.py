"""Records of tensors that move from device to device together."""

from dataclasses import fields, replace
from typing import Any, Self

import torch


class Movable:
    """A frozen dataclass of tensors, lists and other such records, with a tensor's own `to` for devices."""

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Self:
        """The same record with every tensor on the device; itself where all are there already."""
        moved = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            there = _moved(value, device, non_blocking)
            if there is not value:
                moved[field.name] = there
        return replace(self, **moved) if moved else self  # type: ignore[type-var]


def _moved(value: Any, device: Any, non_blocking: bool) -> Any:
    if isinstance(value, torch.Tensor | Movable):
        return value.to(device, non_blocking=non_blocking)
    if type(value) in (list, tuple):
        there = type(value)(_moved(item, device, non_blocking) for item in value)
        return value if all(a is b for a, b in zip(value, there, strict=True)) else there
    return value

"""What leaves the fast path says so, once."""

import functools
import logging

import torch

logger = logging.getLogger("fastbert")


@functools.cache
def say_once(message: str) -> None:
    """Log a warning the first time this message is seen."""
    logger.warning(message)


def warn_once(message: str) -> bool:
    """Log a warning the first time this message is seen, and say whether this was it. Code that is traced cannot log:
    `BertModel` does for it."""
    if torch.compiler.is_compiling():
        return False
    said = say_once.cache_info().misses
    say_once(message)
    return say_once.cache_info().misses > said


def warn_of_padding(reason: str, tokens: int | None, places: int) -> None:
    """Log once why a batch's padding is kept, and what dropping it would save, where it is known how many `tokens`
    are at the batch's places."""
    if tokens == places or not warn_once(f"fastbert: padding is kept: {reason}") or tokens is None:
        return
    logger.warning(
        f"fastbert: {tokens / places:.0%} of this batch are tokens: packing=True would leave the other "
        f"{1 - tokens / places:.0%} out of every product"
    )

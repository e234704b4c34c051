"""What leaves the fast path says so, once."""

import functools
import logging

import torch

logger = logging.getLogger("fastbert")


@functools.cache
def say_once(message: str) -> None:
    """Log a warning the first time this message is seen."""
    logger.warning(message)


def warn_once(message: str) -> None:
    """Log a warning the first time this message is seen. Code that is traced cannot log: `BertModel` does for it."""
    if not torch.compiler.is_compiling():
        say_once(message)

"""What leaves the fast path says so, once."""

import functools
import logging

import torch

logger = logging.getLogger("fastbert")


@functools.cache
def _warn(message: str) -> None:
    logger.warning(message)


def warn_once(message: str) -> None:
    """Log a warning the first time this message is seen. Compiled code, which cannot log, says nothing."""
    if not torch.compiler.is_compiling():
        _warn(message)

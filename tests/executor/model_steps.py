"""Steps of a small model in training, by compiled kernels that are executed here, or by interpreted ones.

TRITON_INTERPRET=0 python -m tests.executor.model_steps FILE   # writes the executed steps to a file
"""

import sys
from typing import NamedTuple
from unittest import mock

import torch

from .calls import model_step
from .launch import executed

LENGTHS = [32, 9]


class Step(NamedTuple):
    """What is computed."""

    dtype: torch.dtype
    dropout_p: float
    fused: bool
    """Whether the activation is fused with its product."""


STEPS = [
    Step(torch.float32, 0.0, False),
    Step(torch.float32, 0.0, True),
    Step(torch.float32, 0.1, False),
    Step(torch.float32, 0.1, True),
    Step(torch.bfloat16, 0.1, True),
]


def by(backend: str, step: Step) -> list[torch.Tensor]:
    """Loss, states and gradients."""
    with mock.patch("fastbert.modules.layer.feed_forward_is_fused", return_value=step.fused):
        return model_step(backend, step.dtype, LENGTHS, step.dropout_p)


def main() -> None:
    with executed() as launches:
        steps = [by("triton", step) for step in STEPS]
    torch.save((steps, set(launches.count)), sys.argv[1])


if __name__ == "__main__":
    main()

"""What the backward passes of all ops and blocks have in common: which gradients they are asked for, and refusals."""

from typing import Any

import torch
from torch._C import _will_engine_execute_node as will_run
from torch._C._functorch import is_legacy_batchedtensor

from .backend import is_transformed


def _reached(step: Any) -> bool:
    try:
        return will_run(step)
    except RuntimeError:  # of a leaf that autograd.grad was asked for, torch does not answer
        return True


def needed_gradients(ctx: Any) -> tuple[bool, ...]:
    """`ctx.needs_input_grad`, without what the backward pass under way does not go on to.

    `torch.autograd.grad(y, embeddings)` asks a layer for the gradient of its input alone: torch's own steps leave out
    the products of weights then, and so do these.
    """
    steps = [step for step, _ in ctx.next_functions if step is not None]
    try:
        if all(map(will_run, steps)):
            return ctx.needs_input_grad
    except RuntimeError:
        pass
    found = map(_reached, steps)
    return tuple([needs and next(found) for needs in ctx.needs_input_grad])


#: How to run what no kernel has.
PLAIN_PYTORCH = "run plain PyTorch, by FASTBERT_BACKEND=torch or fastbert_kernels.set_backend('torch')"


def refuse_batched(name: str, grads: tuple[torch.Tensor | None, ...]) -> None:
    """Raise NotImplementedError where a backward pass runs under vmap, as with is_grads_batched=True."""
    batched = is_transformed()
    for grad in grads:
        batched = batched or (grad is not None and is_legacy_batchedtensor(grad))
    if batched:
        raise NotImplementedError(
            f"fastbert's {name} kernel takes one gradient at a time: for is_grads_batched=True, or a vmap over a "
            f"backward pass, {PLAIN_PYTORCH}"
        )


def second_derivative_error(name: str, instead: str = PLAIN_PYTORCH) -> NotImplementedError:
    return NotImplementedError(
        f"fastbert's {name} kernel has no second derivative: for gradients of gradients {instead}"
    )

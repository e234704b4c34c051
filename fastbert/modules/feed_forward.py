"""The feed-forward block's first product, then bias and activation in one kernel."""

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from fastbert_kernels import bias_activation

from .qkv import project
from .readable import PATCHED, called, fused_repr, is_called, is_plain_linear, leave
from .swap import is_ours, is_patched

#: Module class of an activation -> the kernels' name for its formula.
KERNEL_ACTIVATIONS: dict[type[nn.Module], str] = {
    type(ACT2FN[name]): kernel
    for kernel, names in {
        "gelu": ("gelu",),
        "gelu_tanh": ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate"),
        "relu": ("relu",),
        "silu": ("silu",),
    }.items()
    for name in names
}


class FusedIntermediate(nn.Module):
    """The feed-forward block's first product, then bias and activation in one kernel."""

    dense: Any
    intermediate_act_fn: Any

    def unfused_reason(self) -> str | None:
        if is_patched(self):
            return PATCHED
        activation = self.intermediate_act_fn
        if type(activation) in KERNEL_ACTIVATIONS:
            return "the activation is hooked" if is_called(activation) else None
        return f"no kernel has the activation {getattr(activation, '__name__', activation)}"

    def extra_repr(self) -> str:
        return fused_repr(self)

    def note(self) -> str | None:
        return called(dense=self.dense)

    def block_arguments(self) -> dict[str, Any] | None:
        """What a block needs of this module; None where the module has to be called itself."""
        up: Any = self.dense
        if not is_ours(self) or is_called(self) or not is_plain_linear(up):
            return None
        if self.unfused_reason() is not None:
            return None
        parameters, activation = up._parameters, KERNEL_ACTIVATIONS[type(self.intermediate_act_fn)]
        return {"up_weight": parameters["weight"], "up_bias": parameters["bias"], "activation": activation}

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, seq, hidden) to (batch, seq, intermediate)."""
        reason = self.unfused_reason()
        if reason is not None:
            leave(self, reason)
            return super().forward(hidden_states)
        x, bias = project(self.dense, hidden_states)
        return bias_activation(x, bias, KERNEL_ACTIVATIONS[type(self.intermediate_act_fn)])

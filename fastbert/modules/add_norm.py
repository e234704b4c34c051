"""The output product of a block, then bias, dropout, residual and LayerNorm in one kernel."""

from typing import Any

import torch
from torch import nn

from fastbert_kernels import add_layer_norm

from .dropout import seed_for
from .qkv import project
from .readable import PATCHED, called, fused_repr, is_called, is_plain_linear, leave, norm_reason
from .swap import is_ours, is_patched


def add_norm(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    dropout: Any,
    norm: Any,
    seed: torch.Tensor | None,
    stream: int,
) -> torch.Tensor:
    """norm(dropout(x + bias) + residual) in one kernel.

    Args:
        x, residual: (..., features).
        bias: (features,) or None.
        dropout, norm: plain, as `norm_reason` finds; no dropout: None.
        seed: of the forward pass; None: draw one.
        stream: of the dropout.
    """
    dropout_p = dropout.p if dropout is not None and dropout.training else 0.0
    return add_layer_norm(
        x,
        bias,
        residual,
        norm._parameters["weight"],
        norm._parameters["bias"],
        norm.eps,
        dropout_p=dropout_p,
        seed=seed_for(seed, dropout_p, x),
        stream=stream,
    )


def add_norm_arguments(dense: Any, dropout: Any, norm: Any, stream: int) -> dict[str, Any] | None:
    """What a block needs of its output product and of what follows; None where one has to be called itself."""
    if not is_plain_linear(dense) or norm_reason(norm, dropout) is not None:
        return None
    return {
        **dense._parameters,
        "norm_weight": norm._parameters["weight"],
        "norm_bias": norm._parameters["bias"],
        "eps": norm.eps,
        "hidden_dropout_p": dropout.p if dropout is not None and dropout.training else 0.0,
        "hidden_stream": stream,
    }


class FusedAddNorm(nn.Module):
    """LayerNorm(dropout(dense(x)) + residual), as the outputs of both blocks are."""

    dense: Any
    dropout: Any
    LayerNorm: Any
    dropout_stream = 0

    def unfused_reason(self) -> str | None:
        if is_patched(self):
            return PATCHED
        return norm_reason(self.LayerNorm, self.dropout)

    def extra_repr(self) -> str:
        return fused_repr(self)

    def note(self) -> str | None:
        return called(dense=self.dense)

    def block_arguments(self) -> dict[str, Any] | None:
        """What a block needs of this module; None where the module has to be called itself."""
        find: Any = self._modules.get  # a module's attributes are looked up slowly
        if not is_ours(self) or is_called(self):
            return None
        return add_norm_arguments(find("dense"), find("dropout"), find("LayerNorm"), self.dropout_stream)

    def forward(
        self, hidden_states: torch.Tensor, input_tensor: torch.Tensor, seed: torch.Tensor | None = None
    ) -> torch.Tensor:
        """hidden_states (batch, seq, in) and the residual input_tensor (batch, seq, hidden): like the residual."""
        reason = self.unfused_reason()
        if reason is not None:
            leave(self, reason)
            return super().forward(hidden_states, input_tensor)
        x, bias = project(self.dense, hidden_states)
        return add_norm(x, bias, input_tensor, self.dropout, self.LayerNorm, seed, self.dropout_stream)

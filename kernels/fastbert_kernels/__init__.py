"""Fused Triton kernels for BERT-family encoders: tensors in, tensors out.

Every op runs as a compiled kernel on a GPU and as plain PyTorch on a CPU; `backend` says how that is decided.
"""

from . import flops as flops
from .attention import attention
from .backend import backend, get_backend, set_backend, uses_triton
from .bias_activation import ACTIVATIONS, bias_activation
from .block_records import AttentionArguments, FeedForwardArguments
from .blocks import attention_block, feed_forward_block, layer_block, runs_as_block
from .embedding import embed
from .feed_forward import feed_forward, feed_forward_is_fused
from .layer_norm import add_layer_norm
from .onednn import describe_products
from .relation import relation_loss

__all__ = [
    "ACTIVATIONS",
    "AttentionArguments",
    "FeedForwardArguments",
    "add_layer_norm",
    "attention",
    "attention_block",
    "backend",
    "bias_activation",
    "describe_products",
    "embed",
    "feed_forward",
    "feed_forward_block",
    "feed_forward_is_fused",
    "get_backend",
    "layer_block",
    "relation_loss",
    "runs_as_block",
    "set_backend",
    "uses_triton",
]

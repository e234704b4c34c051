"""The kernels by name, and what the tiles of a launch are chosen by."""

from typing import Any, Literal, NamedTuple

import torch

#: Launch parameters: the tile sizes a kernel takes, and how it is compiled.
Tiles = dict[str, Any]


class Kernel(NamedTuple):
    """A kernel, and what its tiles depend on.

    Attributes:
        name: of the kernel, and in files of measured tiles.
        op: what launches it.
        step: which of the op's kernels.
        work: what a tile is of: "scores" of heads, which are products of rows and columns; the result of a "product";
            whole "rows"; "elements", of which any will do; or partial "sums", whose tiles are no choice.
        width: the size of a model that a launch's `width` is. A relation kernel's is the larger of both models'.
        by_columns: whether a program keeps its columns of scores and goes through rows, not the other way round. Its
            scores are transposed.
    """

    name: str
    op: str
    step: str
    work: Literal["scores", "product", "rows", "elements", "sums"]
    width: Literal["head_dim", "hidden", "intermediate"]
    by_columns: bool = False

    @property
    def backward(self) -> bool:
        """Whether this kernel is of a backward pass."""
        return self.step != "forward"

    @property
    def attends(self) -> bool:
        """Whether this kernel has heads, and works by tiles of rows and columns of scores."""
        return self.work == "scores"

    @property
    def multiplies(self) -> bool:
        """Whether this kernel multiplies matrices, so that no side of a tile is under 16."""
        return self.work in ("scores", "product")

    @property
    def whole_rows(self) -> bool:
        """Whether a program holds whole rows, so that BLOCK_N is no choice."""
        return self.work == "rows"


_ALL = (
    Kernel("attention_forward", "attention", "forward", "scores", "head_dim"),
    Kernel("attention_backward_dq", "attention", "backward_dq", "scores", "head_dim"),
    Kernel("attention_backward_dkv", "attention", "backward_dkv", "scores", "head_dim", by_columns=True),
    Kernel("relation_forward", "relation", "forward", "scores", "head_dim"),
    Kernel("relation_backward_a", "relation", "backward_a", "scores", "head_dim"),
    Kernel("relation_backward_b", "relation", "backward_b", "scores", "head_dim", by_columns=True),
    Kernel("add_layer_norm_forward", "add_layer_norm", "forward", "rows", "hidden"),
    Kernel("add_layer_norm_backward", "add_layer_norm", "backward", "rows", "hidden"),
    Kernel("embed_forward", "embed", "forward", "rows", "hidden"),
    Kernel("embed_backward", "embed", "backward", "rows", "hidden"),
    Kernel("bias_activation_forward", "bias_activation", "forward", "elements", "intermediate"),
    Kernel("bias_activation_backward", "bias_activation", "backward", "elements", "intermediate"),
    Kernel("feed_forward_forward", "feed_forward", "forward", "product", "hidden"),
    Kernel("feed_forward_backward", "feed_forward", "backward", "product", "hidden"),
    Kernel("column_sums", "column_sums", "backward", "sums", "hidden"),
)

KERNELS = {kernel.name: kernel for kernel in _ALL}

#: Names of the kernels whose tiles can be measured.
TUNABLE = tuple(kernel.name for kernel in _ALL if kernel.work != "sums")

#: In a file of measured tiles the name of what is said of a `Product`; not a kernel.
FUSED = "feed_forward_fused"


#: Sequences up to so long have tiles of their own in the attention kernels: a tile made for long ones is mostly empty.
SHORT = (32, 64)


class Launch(NamedTuple):
    """What tiles are chosen by.

    Attributes:
        kernel: the name of one of `KERNELS`.
        dtype: of the activations, or of a backward pass's incoming gradient.
        width: what `Kernel.width` says.
        maps: whether an attention kernel reads or writes (seq, seq) planes.
        up_to: one of `SHORT`: an attention kernel's sequences are at most so long, or its grid so small that it takes
            tiles as if they were. None: they are longer, or the kernel has none.
        tf32: whether torch lets an attention or relation kernel round the operands of its float32 products to TF32.
    """

    kernel: str
    dtype: torch.dtype
    width: int
    maps: bool = False
    up_to: int | None = None
    tf32: bool = False

    @property
    def traits(self) -> Kernel:
        """All else that is known of the kernel."""
        return KERNELS[self.kernel]

    def __str__(self) -> str:
        maps = " with maps" if self.maps else ""
        short = "" if self.up_to is None else f" up to {self.up_to} tokens"
        tf32 = " in TF32" if self.tf32 else ""
        return f"{self.kernel} {dtype_name(self.dtype)}{tf32} {self.width}{maps}{short}"


class Product(NamedTuple):
    """What decides, beside the number of tokens, whether the feed-forward block's products are fused.

    Attributes:
        dtype: of the products.
        hidden: the hidden size.
        activation: one of `tiles.FEED_FORWARD_ACTIVATIONS`.
    """

    dtype: torch.dtype
    hidden: int
    activation: str

    @property
    def kernel(self) -> str:
        """A name beside those of `KERNELS`."""
        return FUSED

    def __str__(self) -> str:
        return f"{FUSED} {dtype_name(self.dtype)} {self.hidden} {self.activation}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Calls of the kernels at the sizes of real models, and the same calls as others make them.

Inputs are drawn in bfloat16 whatever the dtype, and from one seed: every contender, and the truth, has the same.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.static.limits import FEED_FORWARD, Cost, cost
from fastbert.benchmark.workloads import full, ragged
from fastbert_kernels import add_layer_norm, attention, bias_activation, embed, feed_forward

TOKENS = 32768

#: The contenders whose float32 result is the truth, and whose error bounds the others'.
REFERENCES = ("torch eager", "cuBLAS")
#: The contenders that are compiled anew for every case, which takes far longer than to time them.
SLOW_PEERS = ("torch.compile", "FlexAttention")


def draw(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal random numbers that bfloat16 holds."""
    return torch.randn(*shape, device=device).bfloat16().to(dtype)


@dataclass(frozen=True)
class Call:
    """A way to make the call.

    Attributes:
        forward: returns the outputs.
        inputs: what gradients are taken of.
        align: brings outputs, or gradients of the inputs, to the shape in which contenders are compared.
        cotangents: brings the gradients of the compared outputs to the shape of this call's outputs.
    """

    forward: Callable[[], tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    align: Callable[[tuple[Tensor, ...]], list[Tensor]] = list
    align_gradients: Callable[[tuple[Tensor, ...]], list[Tensor]] = list
    cotangents: Callable[[list[Tensor]], list[Tensor]] = list


@dataclass(frozen=True)
class OpCase:
    """An op at a size.

    Attributes:
        kernel: the op.
        case: the sizes, for people.
        forward, backward: what each direction must compute and move.
        calls: contender -> how it makes the call, or why it cannot: by dtype, device and dropout probability.
        dropout_p: with which it is timed; results are compared without.
    """

    kernel: str
    case: str
    forward: Cost
    backward: Cost | None
    calls: Callable[[torch.dtype, torch.device, float], dict[str, Call | str]]
    dropout_p: float = 0.0


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By torch.compile, so that its backward pass can run again and again."""
    import torch._functorch.config as functorch

    functorch.donated_buffer = False
    return torch.compile(function, dynamic=False)


# Attention


def _eager_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, maps: bool) -> tuple[Tensor, ...]:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    probs = torch.softmax(scores if bias is None else scores + bias, dim=-1)
    return (probs @ v, probs) if maps else (probs @ v,)


def _attention_calls(
    dtype: torch.dtype, device: torch.device, dropout_p: float, *, lengths: tuple[int, ...], heads: int, maps: bool
) -> dict[str, Call | str]:
    seq, tokens, dim = max(lengths), sum(lengths), 64
    mask = torch.arange(seq, device=device)[None, :] < torch.tensor(lengths, device=device)[:, None]
    ends = torch.tensor((0, *lengths), device=device).cumsum(0).int()
    torch.manual_seed(0)
    qkv = draw(tokens, 3, heads, dim, dtype=dtype, device=device).requires_grad_()
    whole = min(lengths) == seq
    cu_seqlens, order = None, None
    if not whole:  # as the model has it
        cu_seqlens, order = ends, torch.tensor(lengths, device=device).argsort(descending=True).int()

    def pad(packed: Tensor) -> Tensor:
        """(tokens, heads, dim) to (batch, heads, seq, dim)."""
        padded = packed.new_zeros(*mask.shape, *packed.shape[1:])
        padded[mask] = packed
        return padded.transpose(1, 2).contiguous()

    def ours() -> tuple[Tensor, ...]:
        out, probs = attention(qkv, cu_seqlens, seq, probs_seq=seq if maps else None, order=order)
        return (out,) if probs is None else (out, probs)

    padded = tuple(pad(part.detach()).requires_grad_() for part in qkv.unbind(1))
    bias = (
        None if whole else torch.zeros(mask.shape, device=device, dtype=dtype).masked_fill(~mask, -1e9)[:, None, None]
    )
    rows = mask[:, None, :, None]

    def align(outputs: tuple[Tensor, ...]) -> list[Tensor]:
        return [outputs[0].transpose(1, 2)[mask], *(probs.masked_fill(~rows, 0) for probs in outputs[1:])]

    def align_gradients(gradients: tuple[Tensor, ...]) -> list[Tensor]:
        return [torch.stack([gradient.transpose(1, 2)[mask] for gradient in gradients], 1)]

    def peer(forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]) -> Call:
        def cotangents(gradients: list[Tensor]) -> list[Tensor]:
            return [pad(gradients[0]), *gradients[1:]]

        return Call(lambda: forward(*padded), padded, align, align_gradients, cotangents)

    def backend(which: SDPBackend) -> Call:
        visible = None if whole else mask[:, None, None, :].expand(-1, 1, seq, -1)

        def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
            with sdpa_kernel(which):
                return (F.scaled_dot_product_attention(q, k, v, attn_mask=visible),)

        return peer(forward)

    eager = functools.partial(_eager_attention, bias=bias, maps=maps)
    calls: dict[str, Call | str] = {
        "fastbert": Call(ours, (qkv,)),
        "torch eager": peer(eager),
        "torch.compile": peer(compiled(eager)),
    }
    for name, which in (("flash", "FLASH"), ("efficient", "EFFICIENT"), ("cudnn", "CUDNN")):
        if maps:
            calls[f"SDPA {name}"] = "returns no maps"
        elif name == "flash" and not whole:
            calls[f"SDPA {name}"] = "takes no mask"
        else:
            calls[f"SDPA {name}"] = backend(getattr(SDPBackend, f"{which}_ATTENTION"))
    calls["FlexAttention"] = "returns no maps" if maps else peer(_flex(mask, whole))
    return calls


def _flex(mask: Tensor, whole: bool) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths, (batch, seq) = mask.sum(1), mask.shape
    blocks = None
    if not whole:
        blocks = create_block_mask(lambda b, h, q, k: k < lengths[b], batch, None, seq, seq, device=str(mask.device))
    run = compiled(functools.partial(flex_attention, block_mask=blocks))
    return lambda q, k, v: (run(q, k, v),)


def _attention_case(lengths: tuple[int, ...], about: str, maps: bool = False, heads: int = 12) -> OpCase:
    work = functools.partial(cost, lengths=lengths, heads=heads, width=64, dtype="bfloat16")
    return OpCase(
        "attention with maps" if maps else "attention",
        f"{about}, {heads} heads of 64",
        work("attention_forward", flags={"PROBS"} if maps else ()),
        work("attention_backward", flags={"DPROBS"} if maps else ()),
        functools.partial(_attention_calls, lengths=lengths, heads=heads, maps=maps),
    )


# Rows


def _norm_alone_calls(
    dtype: torch.dtype, device: torch.device, dropout_p: float, *, features: int, tokens: int
) -> dict[str, Call | str]:
    torch.manual_seed(0)
    x = draw(tokens, features, dtype=dtype, device=device).requires_grad_()
    weight, norm_bias = (draw(features, dtype=dtype, device=device).requires_grad_() for _ in range(2))
    inputs = (x, weight, norm_bias)

    def eager() -> tuple[Tensor]:
        return (F.layer_norm(x, (features,), weight, norm_bias, 1e-12),)

    return {
        "fastbert": Call(lambda: (add_layer_norm(x, None, None, weight, norm_bias, 1e-12),), inputs),
        "torch eager": Call(eager, inputs),
        "torch.compile": Call(compiled(eager), inputs),
        "Liger": _liger(lambda norm: Call(lambda: (norm(x, weight, norm_bias, 1e-12),), inputs)),
    }


def _liger(call: Callable[[Callable[..., Tensor]], Call]) -> Call | str:
    """A call of Liger's LayerNorm, or why there is none."""
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    except ImportError:
        return "liger-kernel is not installed"
    return call(LigerLayerNormFunction.apply)


def _norm_calls(
    dtype: torch.dtype, device: torch.device, dropout_p: float, *, features: int, tokens: int
) -> dict[str, Call | str]:
    torch.manual_seed(0)
    x, residual = (draw(tokens, features, dtype=dtype, device=device).requires_grad_() for _ in range(2))
    vectors = [draw(features, dtype=dtype, device=device).requires_grad_() for _ in range(3)]
    inputs = (x, residual, *vectors)
    seed = torch.zeros((), dtype=torch.int64, device=device)

    def ours() -> tuple[Tensor]:
        bias, weight, norm_bias = vectors
        return (add_layer_norm(x, bias, residual, weight, norm_bias, 1e-12, dropout_p=dropout_p, seed=seed),)

    def eager() -> tuple[Tensor]:
        bias, weight, norm_bias = vectors
        return (F.layer_norm(F.dropout(x + bias, dropout_p) + residual, (features,), weight, norm_bias, 1e-12),)

    def liger(norm: Callable[..., Tensor]) -> tuple[Tensor]:
        bias, weight, norm_bias = vectors
        return (norm(F.dropout(x + bias, dropout_p) + residual, weight, norm_bias, 1e-12),)

    return {
        "fastbert": Call(ours, inputs),
        "torch eager": Call(eager, inputs),
        "torch.compile": Call(compiled(eager), inputs),
        "Liger": _liger(lambda norm: Call(lambda: liger(norm), inputs)),
    }


def _norm_case(features: int, dropout_p: float = 0.0, tokens: int = TOKENS) -> OpCase:
    flags = {"BIAS", "RESIDUAL"} | ({"DROPOUT"} if dropout_p else set())
    work = functools.partial(cost, lengths=[tokens], width=features, dtype="bfloat16", flags=flags)
    return OpCase(
        "add_layer_norm",
        f"{tokens} x {features}" + (f", dropout {dropout_p}" if dropout_p else ""),
        work("add_layer_norm_forward"),
        work("add_layer_norm_backward"),
        functools.partial(_norm_calls, features=features, tokens=tokens),
        dropout_p,
    )


def _norm_alone_case(features: int, tokens: int = TOKENS) -> OpCase:
    work = functools.partial(cost, lengths=[tokens], width=features, dtype="bfloat16")
    return OpCase(
        "LayerNorm alone",
        f"{tokens} x {features}",
        work("add_layer_norm_forward"),
        work("add_layer_norm_backward"),
        functools.partial(_norm_alone_calls, features=features, tokens=tokens),
    )


def _gelu_calls(
    dtype: torch.dtype, device: torch.device, dropout_p: float, *, features: int, tokens: int
) -> dict[str, Call | str]:
    torch.manual_seed(0)
    x = draw(tokens, features, dtype=dtype, device=device).requires_grad_()
    bias = draw(features, dtype=dtype, device=device).requires_grad_()

    def eager() -> tuple[Tensor]:
        return (F.gelu(x + bias),)

    return {
        "fastbert": Call(lambda: (bias_activation(x, bias),), (x, bias)),
        "torch eager": Call(eager, (x, bias)),
        "torch.compile": Call(compiled(eager), (x, bias)),
    }


def _gelu_case(features: int, tokens: int = TOKENS) -> OpCase:
    work = functools.partial(
        cost, lengths=[tokens], width=features, dtype="bfloat16", flags={"BIAS"}, activation="gelu"
    )
    return OpCase(
        "bias_gelu",
        f"{tokens} x {features}",
        work("bias_activation_forward"),
        work("bias_activation_backward"),
        functools.partial(_gelu_calls, features=features, tokens=tokens),
    )


def _feed_forward_calls(
    dtype: torch.dtype, device: torch.device, dropout_p: float, *, hidden: int, tokens: int
) -> dict[str, Call | str]:
    torch.manual_seed(0)
    x = draw(tokens, hidden, dtype=dtype, device=device).requires_grad_()
    # A power of two, so that bfloat16 holds them still; about one over the root of the columns.
    weight1, weight2 = (
        (draw(*shape, dtype=dtype, device=device) / 32).requires_grad_()
        for shape in ((FEED_FORWARD * hidden, hidden), (hidden, FEED_FORWARD * hidden))
    )
    bias1 = draw(FEED_FORWARD * hidden, dtype=dtype, device=device).requires_grad_()
    inputs = (x, weight1, bias1, weight2)

    def eager() -> tuple[Tensor]:
        return (F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2),)

    return {
        "fastbert": Call(lambda: (feed_forward(*inputs, fused=True),), inputs),
        "cuBLAS, bias_gelu": Call(lambda: (feed_forward(*inputs, fused=False),), inputs),
        "torch eager": Call(eager, inputs),
        "torch.compile": Call(compiled(eager), inputs),
    }


def _feed_forward_case(hidden: int, tokens: int = TOKENS) -> OpCase:
    intermediate = FEED_FORWARD * hidden
    product = 2 * tokens * hidden * intermediate

    def work(products: int, matrices: int, intermediates: int) -> Cost:
        moved = matrices * tokens * hidden + intermediates * tokens * intermediate + products * hidden * intermediate
        return Cost(products * product, 2 * moved, 0)

    # x and y; the activation out and in. Then dy, x and dx; the pre-activation, and both gradients out and in.
    return OpCase(
        "feed_forward",
        f"{tokens} x {hidden} to {intermediate}",
        work(2, 2, 2),
        work(4, 3, 5),
        functools.partial(_feed_forward_calls, hidden=hidden, tokens=tokens),
    )


def _embed_calls(
    dtype: torch.dtype, device: torch.device, dropout_p: float, *, features: int, batch: int, seq: int
) -> dict[str, Call | str]:
    torch.manual_seed(0)
    words = torch.randint(30522, (batch * seq,), device=device)
    positions = torch.arange(seq, device=device).repeat(batch)
    types = torch.zeros_like(words)
    word, position, token_type = (
        draw(rows, features, dtype=dtype, device=device).requires_grad_() for rows in (30522, 512, 2)
    )
    weight, norm_bias = (draw(features, dtype=dtype, device=device).requires_grad_() for _ in range(2))
    inputs = (word, position, token_type, weight, norm_bias)

    def ours() -> tuple[Tensor]:
        return (embed(words, positions, types, word, position, token_type, weight, norm_bias, 1e-12),)

    def eager() -> tuple[Tensor]:
        total = F.embedding(words, word) + F.embedding(types, token_type) + F.embedding(positions, position)
        return (F.layer_norm(total, (features,), weight, norm_bias, 1e-12),)

    return {
        "fastbert": Call(ours, inputs),
        "torch eager": Call(eager, inputs),
        "torch.compile": Call(compiled(eager), inputs),
    }


def _embed_case(features: int, batch: int = 64, seq: int = 512) -> OpCase:
    work = functools.partial(cost, lengths=(seq,) * batch, width=features, dtype="bfloat16", flags={"WORD_TABLE"})
    return OpCase(
        "embed",
        f"{batch} x {seq} x {features}",
        work("embed_forward"),
        work("embed_backward"),
        functools.partial(_embed_calls, features=features, batch=batch, seq=seq),
    )


def _linear_calls(
    dtype: torch.dtype, device: torch.device, dropout_p: float, *, shape: tuple[int, int, int]
) -> dict[str, Call | str]:
    tokens, features, out = shape
    torch.manual_seed(0)
    x = draw(tokens, features, dtype=dtype, device=device).requires_grad_()
    weight = draw(out, features, dtype=dtype, device=device).requires_grad_()
    return {"cuBLAS": Call(lambda: (F.linear(x, weight),), (x, weight))}


def _linear_case(features: int, out: int, tokens: int = TOKENS) -> OpCase:
    def work(products: int) -> Cost:
        moved = 2 * (tokens * features + tokens * out + features * out) * products
        return Cost(2 * products * tokens * features * out, moved, 0)

    calls = functools.partial(_linear_calls, shape=(tokens, features, out))
    return OpCase("linear", f"{tokens} x {features} to {out}", work(1), work(2), calls)


#: What is measured, by name: first what a layer's time is made of.
CASES: dict[str, OpCase] = {
    "attention-512": _attention_case(full(64, 512), "64 x 512"),
    "attention-128": _attention_case(full(256, 128), "256 x 128"),
    "attention-ragged": _attention_case(ragged(64, 512, 0.46), "64 x 512, fill 0.46"),
    "attention-maps": _attention_case(full(16, 512), "16 x 512", maps=True),
    "norm-768": _norm_case(768),
    "norm-768-dropout": _norm_case(768, dropout_p=0.1),
    "norm-768-alone": _norm_alone_case(768),
    "norm-1024": _norm_case(1024),
    "gelu-3072": _gelu_case(3072),
    "feed-forward-384": _feed_forward_case(384),
    "feed-forward-768": _feed_forward_case(768),
    "feed-forward-1024": _feed_forward_case(1024),
    "embed-768": _embed_case(768),
    "linear-qkv": _linear_case(768, 2304),
    "linear-out": _linear_case(768, 768),
    "linear-up": _linear_case(768, 3072),
    "linear-down": _linear_case(3072, 768),
}

"""Small models and batches the tests share."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers

import fastbert


def tiny_config(**changes: Any) -> transformers.BertConfig:
    """Two layers, four heads of 8, dropout off."""
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 60,
        "max_position_embeddings": 40,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.5,
        "attn_implementation": "eager",
    }
    return transformers.BertConfig(**settings | changes)


def randomize(model: torch.nn.Module) -> None:
    """Random values in every parameter, so that no bias is 0 and no norm weight 1."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias") or "norm" in name.lower():
                p.add_(torch.randn_like(p) * 0.3)


def pair(
    device: torch.device | str = "cpu", packing: bool | str = True, **changes: Any
) -> tuple[transformers.BertModel, fastbert.BertModel]:
    """A Hugging Face model with eager attention and a fastbert one with the same weights, in eval mode."""
    plain = transformers.BertModel(tiny_config(**changes))
    randomize(plain)
    fused = fastbert.BertModel(tiny_config(**changes))
    fused.packing = packing
    fused.load_state_dict(plain.state_dict(), strict=True)
    return plain.to(device).eval(), fused.to(device).eval()


def ids(batch: int = 3, seq: int = 11, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.randint(1, 60, (batch, seq)).to(device)


def mask_of(lengths: list[int], seq: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """int64 (batch, seq), 1 at the first tokens of each row."""
    return (torch.arange(seq)[None, :] < torch.tensor(lengths)[:, None]).long().to(device)


@contextlib.contextmanager
def onednn_enabled(enabled: bool) -> Iterator[None]:
    """Switch torch's use of oneDNN, without what `torch.backends.mkldnn.flags` warns of: GPUs that are not there."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(enabled)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def assert_close(
    ours: torch.Tensor, theirs: torch.Tensor, where: torch.Tensor | None = None, atol: float = 2e-5
) -> None:
    """Equal within float32 rounding, at the marked places."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    if where is not None:
        ours, theirs = ours[where], theirs[where]
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-4)

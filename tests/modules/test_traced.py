"""A trace by torch.jit serves every mask, not only the one that it was made with."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import assert_close, ids, mask_of, pair, randomize, tiny_config
from torch import nn

import fastbert
from fastbert_kernels import backend

SEQ = 6
MASKS = {
    "full": torch.ones(2, SEQ, dtype=torch.long),
    "right": mask_of([6, 3], SEQ),
    "left": mask_of([6, 3], SEQ).flip(1),
    "holes": torch.tensor([[1, 0, 1, 1, 1, 0], [1, 1, 0, 0, 1, 1]]),
}


class Last(nn.Module):
    """What a model hands out first."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, attention_mask, return_dict=False)[0]


CASES = [(made_with, packing, "auto") for made_with in MASKS for packing in ("auto", True)]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("made_with", "packing", "backend_name"), [*CASES, ("right", "auto", "torch"), ("right", "auto", "triton")]
)
def test_a_trace_serves_every_mask(
    device: torch.device, made_with: str, packing: bool | str, backend_name: str
) -> None:
    plain, fused = pair(device, packing=packing, num_hidden_layers=1)
    x = ids(2, SEQ, device)
    with backend(backend_name), torch.no_grad():
        traced = torch.jit.trace(Last(fused), (x, MASKS[made_with].to(device)), check_trace=False)
        for mask in MASKS.values():
            mask = mask.to(device)
            wanted = plain(x.flip(0), mask).last_hidden_state
            assert_close(traced(x.flip(0), mask), wanted * mask[..., None] if packing is True else wanted)


def _heads() -> tuple[Any, Any]:
    torch.manual_seed(0)
    plain = transformers.BertForSequenceClassification(tiny_config()).eval()
    randomize(plain)
    fused = fastbert.fuse(transformers.BertForSequenceClassification(tiny_config()).eval())
    fused.load_state_dict(plain.state_dict())
    return plain, fused


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_head_serves_every_mask() -> None:
    plain, fused = _heads()
    x = ids(2, SEQ)
    with torch.no_grad():
        traced = torch.jit.trace(Last(fused), (x, MASKS["full"]), check_trace=False)
        for mask in MASKS.values():
            assert_close(traced(x, mask), plain(x, mask).logits)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_what_the_legacy_exporter_makes_serves_every_mask(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    plain, fused = _heads()
    x, names, path = ids(2, SEQ), ["input_ids", "attention_mask"], tmp_path / "model.onnx"
    axes = {name: {0: "batch", 1: "seq"} for name in names}
    torch.onnx.export(
        Last(fused),
        (x, MASKS["right"]),
        str(path),
        input_names=names,
        dynamic_axes=axes,
        opset_version=17,
        dynamo=False,
    )
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for mask in MASKS.values():
        (logits,) = session.run(None, {"input_ids": x.numpy(), "attention_mask": mask.numpy()})
        assert_close(torch.from_numpy(logits), plain(x, mask).logits.detach())
    shorter = {"input_ids": x[:1, :4].numpy(), "attention_mask": MASKS["full"][:1, :4].numpy()}
    assert_close(torch.from_numpy(session.run(None, shorter)[0]), plain(x[:1, :4]).logits.detach())

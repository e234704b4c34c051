"""Bad input gets an error that names the values and the way out."""

import pytest
import torch
import transformers
from models import ids, pair

from fastbert_kernels import backend


def fused_model(**changes: object) -> torch.nn.Module:
    return pair(**changes)[1]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({}, ValueError, "exactly one of input_ids and inputs_embeds, got neither"),
        ({"input_ids": ids(), "inputs_embeds": torch.zeros(3, 11, 32)}, ValueError, "got both"),
        ({"input_ids": ids()[0]}, ValueError, r"integers of shape \(batch, seq\), got torch.int64 \(11,\)"),
        ({"input_ids": ids().float()}, ValueError, r"got torch.float32"),
        ({"inputs_embeds": torch.zeros(3, 11)}, ValueError, r"got \(3, 11\)"),
        ({"input_ids": ids(), "attention_mask": torch.ones(3, 10)}, ValueError, r"\(3, 11\).*got \(3, 10\)"),
        ({"input_ids": ids(), "attention_mask": torch.ones(3, 11, 10)}, ValueError, r"got \(3, 11, 10\)"),
        ({"input_ids": ids(), "attention_mask": torch.ones(3, 2, 11, 11)}, ValueError, r"\(3, 4, 11, 11\), got"),
        ({"input_ids": ids(), "attention_mask": torch.ones(3, 1, 11, 11)}, ValueError, r"pass mask.bool\(\)"),
        (
            {"input_ids": ids(), "attention_mask": torch.zeros(3, 1, 11, 11, requires_grad=True)},
            ValueError,
            r"mask.detach\(\)",
        ),
        ({"input_ids": ids(), "attention_mask": torch.full((3, 11), -1e4)}, ValueError, "values from -10000 to -10000"),
        ({"input_ids": ids(1, 41)}, ValueError, r"length 41 is over .*=40"),
        ({"input_ids": ids(), "position_ids": torch.zeros(2, 11, dtype=torch.long)}, ValueError, r"got \(2, 11\)"),
        ({"input_ids": ids(), "token_type_ids": torch.zeros(3, 5, dtype=torch.long)}, ValueError, r"got \(3, 5\)"),
        ({"input_ids": ids(), "head_mask": torch.ones(3)}, ValueError, r"\(4,\) or .* \(2, 4\), got \(3,\)"),
        ({"input_ids": ids(), "head_mask": torch.ones(2, 1, 4, 1, 1)}, ValueError, r"got \(2, 1, 4, 1, 1\)"),
        ({"input_ids": ids(), "is_causal": True}, ValueError, "pass a 4-D attention_mask"),
        ({"input_ids": ids() + 100}, IndexError, "outside the 60 rows"),
        ({"input_ids": -ids()}, IndexError, "words holds -"),
    ],
)  # fmt: skip
def test_model_calls(kwargs: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused_model()(**kwargs)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("Rain is falling.", "str"),
        (["Rain is falling."], "list"),
        ([[1, 2]], "list"),
        (transformers.BatchEncoding({"input_ids": ids()}), "BatchEncoding"),
    ],
)
def test_what_is_no_tensor(given: object, kind: str) -> None:
    message = rf'needs tensors, got {kind}: call it by model\(\*\*batch\), .* return_tensors="pt"'
    with pytest.raises(TypeError, match=message):
        fused_model()(given)


def test_mixed_devices() -> None:
    with pytest.raises(ValueError, match=r"inputs on meta.*\.to\(device\)"):
        fused_model()(ids().to("meta"))


def test_a_dtype_no_kernel_has() -> None:
    with backend("triton"), pytest.raises(TypeError, match=r"float64.*FASTBERT_BACKEND=torch"):
        fused_model().double()(ids())


def test_head_mask_off_the_fast_path() -> None:
    with pytest.raises(ValueError, match=r"head_mask has no effect.*decoder"):
        fused_model(is_decoder=True)(ids(), head_mask=torch.ones(4))

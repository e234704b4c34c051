"""Embeddings in bulk: right and in order, whatever the lengths."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from embedded import TEXTS, plain_embeddings
from transformers import AutoTokenizer

from fastbert.encode import Encoder
from fastbert.inputs import InputError


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("tokens", [1, 150, 100_000])
def test_embeddings_are_hugging_faces(tiny: Path, pooling: str, tokens: int) -> None:
    encoder = Encoder(tiny, pooling=pooling, tokens=tokens, device="cpu")
    ours = encoder(TEXTS)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, plain_embeddings(tiny, TEXTS, pooling), atol=2e-6)
    unit = Encoder(tiny, pooling=pooling, normalize=True, device="cpu")(TEXTS)
    np.testing.assert_allclose(unit, ours / np.linalg.norm(ours, axis=1, keepdims=True), atol=2e-6)


def test_batches_keep_to_the_tokens_and_hold_each_text_once(tiny: Path) -> None:
    encoder = Encoder(tiny, tokens=100, device="cpu")
    batches = encoder.batches(TEXTS)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(TEXTS)))
    lengths = [len(ids) for batch in batches for ids in batch.ids]
    assert lengths == sorted(lengths, reverse=True)
    assert all(sum(map(len, batch.ids)) <= 100 or len(batch.ids) == 1 for batch in batches)
    assert len(batches) < 0.6 * len(TEXTS)
    assert encoder([]).shape == (0, 32)
    assert encoder.batches([]) == []


def test_a_model_at_hand_and_half_precision(tiny: Path) -> None:
    model, tokenizer = transformers.BertModel.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    half = Encoder(model, tokenizer, dtype="bf16", max_length=9, device="cpu")(TEXTS)
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, plain_embeddings(tiny, TEXTS, max_length=9), atol=0.05)


def test_what_no_encoder_is_made_of(tiny: Path) -> None:
    for wrong, message in (
        ({"pooling": "max"}, "unknown pooling 'max': choose from mean, cls"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"device": "tpu"}, "unknown device"),
        ({"max_length": 500}, "takes 3 to 128"),
        ({"tokens": 0}, "at least 1"),
        ({"tokenizer": object()}, "its own tokenizer"),
    ):
        with pytest.raises(InputError, match=message):
            Encoder(tiny, **wrong)  # type: ignore[arg-type]
    model = transformers.BertModel.from_pretrained(tiny)
    with pytest.raises(InputError, match="without a tokenizer"):
        Encoder(model)
    with pytest.raises(InputError, match="decoder"):
        Encoder(transformers.BertModel(transformers.BertConfig(is_decoder=True)), AutoTokenizer.from_pretrained(tiny))
    with pytest.raises(TypeError, match=r"texts\[1\] is NoneType"):
        Encoder(tiny, device="cpu")(["a", None])  # type: ignore[list-item]


def test_the_encoder_is_reached_from_the_package_which_alone_is_light() -> None:
    code = "import sys, fastbert\nassert 'torch' not in sys.modules\nfastbert.encode.Encoder"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

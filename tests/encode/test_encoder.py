"""Embeddings in bulk: right and in order, whatever the lengths."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
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
        ({"pooling": "sum"}, "unknown pooling 'sum': choose from mean, cls, max"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"device": "tpu"}, "unknown device"),
        ({"max_length": 500}, "takes 3 to 128"),
        ({"tokens": 0}, "at least 1"),
        ({"prompt_name": "query"}, "no prompt 'query' in .*: it has none"),
        ({"prompt": "a", "prompt_name": "query"}, "give one of them"),
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
    with pytest.raises(TypeError, match="texts is one str, 'a text': give a list of texts"):
        Encoder(tiny, device="cpu")("a text")


def test_the_encoder_is_reached_from_the_package_which_alone_is_light() -> None:
    code = "import sys, fastbert\nassert 'torch' not in sys.modules\nfastbert.encode.Encoder"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_cls_takes_first_tokens_where_the_last_layer_computes_all(tiny: Path) -> None:
    encoder = Encoder(tiny, pooling="cls", tokens=150, device="cpu")
    rows: list[int] = []
    encoder.bert.register_forward_hook(lambda module, args, output: rows.append(output.last_hidden_state.shape[1]))
    fused = encoder(TEXTS)
    few = rows.copy()
    encoder.bert.encoder.layer[-1].register_forward_hook(lambda module, args, output: None)
    rows.clear()
    watched = encoder(TEXTS)
    assert sum(few) == len(TEXTS) < sum(rows)
    np.testing.assert_allclose(watched, plain_embeddings(tiny, TEXTS, "cls"), atol=2e-6)
    np.testing.assert_allclose(watched, fused, atol=2e-6)


def test_texts_and_tokenizers_that_no_model_takes(tiny: Path) -> None:
    encoder = Encoder(tiny, device="cpu")
    with pytest.raises(InputError, match=r"texts\[1\] has lone surrogates"):
        encoder(["rain", "\udcff"])
    model, tokenizer = transformers.BertModel.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["fastbert"])
    with pytest.raises(InputError, match="token ids up to 30522, the model takes them to 30521"):
        Encoder(model, tokenizer, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.Sequence([])
    with pytest.raises(InputError, match=r"texts\[1\] has no tokens \('\\x01'\)"):
        Encoder(model, tokenizer, device="cpu")(["rain", "\x01"])


def test_weights_that_are_not_finite_are_no_model(tiny: Path) -> None:
    model, tokenizer = transformers.BertModel.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[3, 4] = 1e5
    message = "cannot be used in float16: its weight encoder.layer.1.output.dense.weight has NaN or infinite"
    with pytest.raises(InputError, match=message):
        Encoder(copy.deepcopy(model), tokenizer, dtype="float16", device="cpu")
    assert np.isfinite(Encoder(model, tokenizer, device="cpu")(TEXTS)).all()

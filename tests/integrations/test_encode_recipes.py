"""`Encoder` on folders of sentence-transformers gives that library's own embeddings."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules

from fastbert.encode import Encoder
from fastbert.inputs import SENTENCES, InputError

#: Ragged: from two words to over the checkpoint's 256 tokens.
TEXTS = [*SENTENCES, *(sentence[: 7 + 11 * i] for i, sentence in enumerate(SENTENCES)), " ".join(SENTENCES)]


def save(checkpoint: Path, folder: Path, pooling: Any, normalize: bool = False, **settings: Any) -> SentenceTransformer:
    """A model of that pooling, saved and loaded again."""
    transformer = modules.Transformer(str(checkpoint), max_seq_length=settings.pop("max_seq_length", 64))
    parts = [transformer, modules.Pooling(transformer.get_embedding_dimension(), pooling)]
    parts += [modules.Normalize()] if normalize else []
    SentenceTransformer(modules=parts, device="cpu", **settings).save_pretrained(str(folder))
    return SentenceTransformer(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("pooling", "settings"),
    [
        ("mean", {}),
        ("mean", {"normalize": True}),
        ("cls", {}),
        ("cls", {"normalize": True, "max_seq_length": 17}),
        ("max", {}),
        ("mean_sqrt_len_tokens", {}),
        ("weightedmean", {"normalize": True}),
        ("lasttoken", {}),
        (("mean", "max"), {}),
        ("mean", {"prompts": {"query": "query: "}, "default_prompt_name": "query"}),
    ],
)
def test_embeddings_are_the_librarys_own(checkpoint: Path, tmp_path: Path, pooling: Any, settings: Any) -> None:
    theirs = save(checkpoint, tmp_path, pooling, **settings).encode(TEXTS)
    ours = Encoder(tmp_path, device="cpu")(TEXTS)
    assert ours.shape == theirs.shape
    lengths = [np.linalg.norm(x, axis=1) for x in (ours, theirs)]
    cosines = (ours.astype(np.float64) * theirs).sum(1) / lengths[0] / lengths[1]
    print(f"{pooling} {settings}: cosine at least {cosines.min():.9f}")
    assert cosines.min() > 1 - 1e-6
    np.testing.assert_allclose(*lengths, rtol=1e-5)


def test_another_module_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    transformer = modules.Transformer(str(checkpoint))
    parts = [transformer, modules.Pooling(384), modules.Dense(384, 8)]
    SentenceTransformer(modules=parts, device="cpu").save_pretrained(str(tmp_path))
    with pytest.raises(InputError, match="Transformer, Pooling, Dense, of which encode can do"):
        Encoder(tmp_path, device="cpu")

"""What the tests of embeddings share: texts of many lengths, and what Hugging Face makes of them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoTokenizer

from fastbert.encode import Encoder
from fastbert.encode.encoder import PackedTexts
from fastbert.inputs import SENTENCES

if TYPE_CHECKING:
    from fastbert.encode import files

TEXTS = [" ".join(SENTENCES)[i * 13 : i * 13 + 5 + 29 * i % 310] + " end" for i in range(40)]


def plain_embeddings(folder: Path, texts: list[str], pooling: str = "mean", max_length: int = 128) -> np.ndarray:
    """By Hugging Face's model, a text at a time."""
    model = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in texts:
        encoded = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**encoded).last_hidden_state[0]
        rows.append((hidden.mean(0) if pooling == "mean" else hidden[0]).numpy())
    return np.stack(rows)


def encode(tiny: Path, lines: Path, out: Path, **settings: Any) -> "files.Summary":
    """What `encode_file` makes of lines of text."""
    from fastbert.encode import files
    from fastbert.encode.rows import Texts

    return files.encode_file(Encoder(tiny, tokens=100, device="cpu", **settings), Texts(lines), out)


def same(one: Path, other: Path) -> bool:
    """Whether two files hold the same, bit for bit."""
    import pyarrow.parquet as pq

    tables = [pq.read_table(path) for path in (one, other)]
    bits = [np.array(table["embedding"].to_pylist(), np.float32).tobytes() for table in tables]
    return bits[0] == bits[1] and tables[0].drop("embedding").equals(tables[1].drop("embedding"))


class Stop(Exception):  # noqa: N818
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
    """Make the encoder fail after so many batches; the list tells how many it did."""
    done = [0]
    right = Encoder.embed

    def embed(self: Encoder, batch: PackedTexts) -> np.ndarray:
        if done[0] == count:
            raise Stop
        done[0] += 1
        return right(self, batch)

    monkeypatch.setattr(Encoder, "embed", embed)
    return done

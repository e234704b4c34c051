"""What the tests of embeddings share: texts of many lengths, and what Hugging Face makes of them."""

from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoTokenizer

from fastbert.inputs import SENTENCES

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

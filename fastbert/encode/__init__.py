"""Embeddings of text in bulk: `Encoder`. Files of any size are in `files`, which needs the `encode` extra."""

from .encoder import Encoder as Encoder
from .pooling import POOLINGS as POOLINGS

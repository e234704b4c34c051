"""A family with BERT's layers is its classes, two lines each: tried with one that Hugging Face's RoBERTa gives."""

import pytest
import torch
import transformers
from models import assert_close, randomize
from transformers.models.roberta import modeling_roberta as hf

from fastbert.batch.attend import Attend
from fastbert.modules import swap
from fastbert.modules.add_norm import FusedAddNorm
from fastbert.modules.attention import FusedSelfAttention
from fastbert.modules.encoder import FusedEncoder
from fastbert.modules.explaining import explain_encoder
from fastbert.modules.feed_forward import FusedIntermediate
from fastbert.modules.layer import FusedAttention, FusedLayer
from fastbert.modules.model import EncoderModel

CLASSES = [
    type(name, (fused, getattr(hf, name)), {"__module__": __name__})
    for name, fused in {
        "RobertaSelfAttention": FusedSelfAttention,
        "RobertaSelfOutput": FusedAddNorm,
        "RobertaAttention": FusedAttention,
        "RobertaIntermediate": FusedIntermediate,
        "RobertaOutput": FusedAddNorm,
        "RobertaLayer": FusedLayer,
        "RobertaEncoder": FusedEncoder,
        "RobertaModel": EncoderModel,
    }.items()
]


@pytest.fixture
def _family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "FUSED", dict(swap.FUSED))
    monkeypatch.setattr(swap, "_OURS", dict(swap._OURS))
    swap.register(*CLASSES)


@pytest.mark.usefixtures("_family")
def test_another_familys_layers_run_on_the_same_modules() -> None:
    config = transformers.RobertaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=60,
        max_position_embeddings=40, attn_implementation="eager", initializer_range=0.5,
    )  # fmt: skip
    plain = transformers.RobertaModel(config).eval()
    randomize(plain)
    fused = CLASSES[-1](config).eval()
    fused.load_state_dict(plain.state_dict(), strict=True)
    layers = [part for part in explain_encoder(fused) if part.layer is not None]
    assert len(layers) == 8
    assert all(part.fused for part in layers)
    x = torch.randint(2, 60, (3, 11))
    want = plain(x, output_attentions=True, output_hidden_states=True)
    # Its embeddings are Hugging Face's here, for they have positions of their own: no family of ours has them yet.
    got = fused.encoder(plain.embeddings(x), attend=Attend(), map_layers={0, 1}, state_layers={0, 1, 2})
    assert_close(got.last_hidden_state, want.last_hidden_state)
    for ours, theirs in zip(got.attentions, want.attentions, strict=True):
        assert_close(ours, theirs)

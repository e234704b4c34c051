"""A family with BERT's layers is its classes, two lines each: tried with one that Hugging Face's ERNIE gives."""

import sys
import types

import pytest
import torch
import transformers
from models import assert_close, randomize
from transformers.models.ernie import modeling_ernie as hf

from fastbert.batch.attend import Attend
from fastbert.modules import swap
from fastbert.modules.add_norm import FusedAddNorm
from fastbert.modules.attention import FusedSelfAttention
from fastbert.modules.encoder import FusedEncoder
from fastbert.modules.explaining import explain_encoder
from fastbert.modules.feed_forward import FusedIntermediate
from fastbert.modules.layer import FusedAttention, FusedLayer
from fastbert.modules.model import EncoderModel

FAMILY = "a_family"
CLASSES = [
    type(name, (fused, getattr(hf, name)), {"__module__": FAMILY})
    for name, fused in {
        "ErnieSelfAttention": FusedSelfAttention,
        "ErnieSelfOutput": FusedAddNorm,
        "ErnieAttention": FusedAttention,
        "ErnieIntermediate": FusedIntermediate,
        "ErnieOutput": FusedAddNorm,
        "ErnieLayer": FusedLayer,
        "ErnieEncoder": FusedEncoder,
        "ErnieModel": EncoderModel,
    }.items()
]


@pytest.fixture
def _family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "FUSED", dict(swap.FUSED))
    monkeypatch.setattr(swap, "_OURS", dict(swap._OURS))
    module = types.ModuleType(FAMILY)
    vars(module).update({kind.__name__: kind for kind in CLASSES})
    monkeypatch.setitem(sys.modules, FAMILY, module)
    swap.register(FAMILY)


@pytest.mark.usefixtures("_family")
def test_another_familys_layers_run_on_the_same_modules() -> None:
    config = transformers.ErnieConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=60,
        max_position_embeddings=40, attn_implementation="eager", initializer_range=0.5,
    )  # fmt: skip
    plain = transformers.ErnieModel(config).eval()
    randomize(plain)
    fused = CLASSES[-1](config).eval()
    fused.load_state_dict(plain.state_dict(), strict=True)
    layers = [part for part in explain_encoder(fused) if part.layer is not None]
    assert len(layers) == 8
    assert all(part.fused for part in layers)
    x = torch.randint(2, 60, (3, 11))
    want = plain(x, output_attentions=True, output_hidden_states=True)
    # Its embeddings are Hugging Face's here, for they have a task type: no family of ours has one yet.
    got = fused.encoder(plain.embeddings(x), attend=Attend(), map_layers={0, 1}, state_layers={0, 1, 2})
    assert_close(got.last_hidden_state, want.last_hidden_state)
    for ours, theirs in zip(got.attentions, want.attentions, strict=True):
        assert_close(ours, theirs)

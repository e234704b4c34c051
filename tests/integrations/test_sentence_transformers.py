"""sentence-transformers with its inner BERT fused in one line: the same embeddings, its own training loop."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import fastbert
from fastbert.inputs import SENTENCES

pytest.importorskip("sentence_transformers", reason="needs `make test-all`")

from sentence_transformers import SentenceTransformer

#: Ragged: from two words to over the checkpoint's 256 tokens.
TEXTS = [*SENTENCES, *(sentence[: 7 + 11 * i] for i, sentence in enumerate(SENTENCES)), " ".join(SENTENCES)]


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> SentenceTransformer:
    return SentenceTransformer(str(checkpoint), device="cpu")


def inner(model: SentenceTransformer) -> Any:
    """The BERT inside."""
    return model[0].auto_model


def test_embeddings_are_the_same(plain: SentenceTransformer, capfd: pytest.CaptureFixture[str]) -> None:
    fused = fastbert.fuse(copy.deepcopy(plain))
    assert isinstance(inner(fused), fastbert.BertModel)
    assert fastbert.explain(fused).fused
    assert not isinstance(inner(plain), fastbert.BertModel)
    theirs = plain.encode(TEXTS, batch_size=5, convert_to_tensor=True)
    capfd.readouterr()
    ours = fused.encode(TEXTS, batch_size=5, convert_to_tensor=True, show_progress_bar=True)
    assert "Batches: 100%" in capfd.readouterr().err
    assert torch.cosine_similarity(theirs.double(), ours.double()).min() >= 0.99999
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert not torch.allclose(ours[0], ours[1], atol=0.1)


def test_fusing_the_inner_model_is_the_same(plain: SentenceTransformer) -> None:
    whole, part = copy.deepcopy(plain), copy.deepcopy(plain)
    fastbert.fuse(whole)
    fastbert.fuse(inner(part), packing=True)  # alone, it is not told that the pooling leaves padding out
    assert (whole.encode(TEXTS[:4]) == part.encode(TEXTS[:4])).all()
    fastbert.unfuse(whole)
    assert (whole.encode(TEXTS[:4]) == plain.encode(TEXTS[:4])).all()


@pytest.mark.parametrize("output_value", ["sentence_embedding", "token_embeddings"])
def test_every_kind_of_output(plain: SentenceTransformer, output_value: Any) -> None:
    fused = fastbert.fuse(copy.deepcopy(plain))
    theirs = plain.encode(TEXTS[:5], output_value=output_value)
    ours = fused.encode(TEXTS[:5], output_value=output_value)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), atol=1e-5, rtol=0)


def test_its_own_packed_batches(plain: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded with flash attention it packs its batches itself, and goes on to when it is fused."""
    from transformers import modeling_flash_attention_utils

    fused = fastbert.fuse(copy.deepcopy(plain))
    module: Any = fused[0]
    monkeypatch.setattr(module, "_is_flash_attention_requested", lambda: True)
    monkeypatch.setattr(
        modeling_flash_attention_utils, "lazy_import_flash_attention", lambda name: ((None, print, None, None), None)
    )
    module.unpad_inputs = None
    assert module.can_flatten_inputs
    assert module.preprocess(TEXTS)["cu_seq_lens_q"].shape == (len(TEXTS) + 1,)
    ours = fused.encode(TEXTS, batch_size=32)
    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(plain.encode(TEXTS)), atol=1e-5, rtol=0)


def test_a_saved_model_is_theirs(plain: SentenceTransformer, tmp_path: Path) -> None:
    fused = fastbert.fuse(copy.deepcopy(plain))
    fused.save_pretrained(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), device="cpu")
    assert type(inner(again)).__module__.startswith("transformers.")
    assert (again.encode(TEXTS[:4]) == plain.encode(TEXTS[:4])).all()


def train(model: SentenceTransformer, folder: Path) -> list[float]:
    """The losses of four steps of sentence-transformers' own training."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    # The second half of a sentence belongs to its first.
    halves = [(s[: len(s) // 2], s[len(s) // 2 :]) for s in SENTENCES]
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-4, logging_steps=1,
        report_to="none", save_strategy="no", seed=0, use_cpu=True, disable_tqdm=True, warmup_steps=0,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"anchor": [a for a, _ in halves], "positive": [b for _, b in halves]}),
        loss=MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_its_training_loop_gives_the_same_losses(plain: SentenceTransformer, tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs `make test-all`")
    pytest.importorskip("accelerate", reason="needs `make test-all`")
    theirs, ours = copy.deepcopy(plain), fastbert.fuse(copy.deepcopy(plain))
    for model in (theirs, ours):  # dropout draws differently on the two paths
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    their_losses, our_losses = train(theirs, tmp_path / "theirs"), train(ours, tmp_path / "ours")
    assert len(our_losses) == 4
    assert our_losses == pytest.approx(their_losses, abs=1e-3)
    assert fastbert.explain(ours).fused
    trained, before = (inner(model).encoder.layer[0].attention.self.query.weight for model in (ours, plain))
    assert (trained - before).abs().max() > 1e-5
    torch.testing.assert_close(
        torch.as_tensor(ours.encode(TEXTS[:6])), torch.as_tensor(theirs.encode(TEXTS[:6])), atol=2e-3, rtol=0
    )


def _saved(folder: Path, kind: str, head: str, tokenizer: Any) -> Path:
    """A tiny random checkpoint of a family, with some tokenizer."""
    import transformers

    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "max_position_embeddings": 40, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    torch.manual_seed(0)
    model: Any = getattr(transformers, head).from_config(transformers.AutoConfig.for_model(kind, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["mpnet", "roberta", "distilbert"])
def test_a_sentence_encoder_of_another_family(kind: str, plain: SentenceTransformer, tmp_path: Path) -> None:
    from sentence_transformers import models

    transformer = models.Transformer(str(_saved(tmp_path, kind, "AutoModel", plain.tokenizer)), max_seq_length=24)
    theirs = SentenceTransformer(modules=[transformer, models.Pooling(32)], device="cpu")
    fused = fastbert.fuse(copy.deepcopy(theirs))
    assert fastbert.explain(fused).fused
    assert "dropped" in str(fastbert.explain(fused))
    ours = fused.encode(TEXTS, batch_size=5)
    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs.encode(TEXTS)), atol=1e-5, rtol=0)


def test_a_cross_encoder_of_another_family(plain: SentenceTransformer, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    folder = _saved(tmp_path, "xlm-roberta", "AutoModelForSequenceClassification", plain.tokenizer)
    theirs, fused = (CrossEncoder(str(folder), device="cpu", max_length=24) for _ in range(2))
    fastbert.fuse(fused)
    pairs = [(TEXTS[i], TEXTS[-i]) for i in range(1, 6)]
    torch.testing.assert_close(
        torch.as_tensor(fused.predict(pairs)), torch.as_tensor(theirs.predict(pairs)), atol=1e-5, rtol=0
    )


def test_a_sparse_encoder_of_another_family(plain: SentenceTransformer, tmp_path: Path) -> None:
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder import modules as models

    folder = _saved(tmp_path, "distilbert", "AutoModelForMaskedLM", plain.tokenizer)

    def make() -> Any:
        parts = [models.MLMTransformer(str(folder), max_seq_length=24), models.SpladePooling()]
        return SparseEncoder(modules=parts, device="cpu")

    theirs, fused = make(), fastbert.fuse(make())
    assert fastbert.explain(fused).fused
    ours, wanted = (model.encode(TEXTS[:6], convert_to_tensor=True).to_dense() for model in (fused, theirs))
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=0)

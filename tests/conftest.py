"""Test set-up: which backend_name of the kernels runs, and where the real checkpoint lies.

Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before they are defined.
"""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["FASTBERT_TUNED"] = "0"  # tests are of the shipped tiles

import pytest

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from quick_interpreter import speed_up

    speed_up()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device on which the Triton kernels run here: a GPU, or the CPU through the interpreter."""
    return torch.device(DEVICE)


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The folder of the real MiniLM checkpoint."""
    path = Path(os.environ.get("FASTBERT_CHECKPOINT", Path(__file__).parents[1] / ".cache" / "minilm"))
    if not (path / "config.json").exists():
        pytest.fail(f"no checkpoint in {path}: run the tests with `make test`, which fetches it")
    return path


@pytest.fixture(scope="session")
def tiny(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer random checkpoint, with the tokenizer of the real one: quick to run whole."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    path = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def tuned_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of measured tiles, empty, that launches read as a user's; nothing of it is read yet."""
    from fastbert_kernels import tuned

    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTBERT_CACHE", str(folder))
    monkeypatch.setenv("FASTBERT_TUNED", "1")
    monkeypatch.setattr(tuned, "_tables", {})
    tuned._read.cache_clear()
    yield folder
    tuned._read.cache_clear()


@pytest.fixture(params=["torch", "triton"])
def backend_name(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend under which a test of recordings runs."""
    from fastbert_kernels import backend

    if request.param == "torch" and torch.cuda.is_available():
        pytest.skip("plain PyTorch makes a GPU wait, which no graph can hold")
    with backend(request.param):
        yield request.param


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each batch whose padding might have been dropped, whether it was."""
    from fastbert.batch import batch as batches

    seen: list[bool] = []
    pack_unless = batches.pack_unless

    def noted(*arguments: torch.Tensor) -> Any:
        layout = pack_unless(*arguments)
        seen.append(layout is not None and layout.indices is not None)
        return layout

    monkeypatch.setattr(batches, "pack_unless", noted)
    return seen


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    for marker in (
        "accelerate_tests",
        "flash_attn_test",
        "flash_attn_3_test",
        "flash_attn_4_test",
        "torch_compile_test",
    ):
        config.addinivalue_line("markers", f"{marker}: of transformers' own tests (test_transformers_common.py)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def browser(tmp_path: Path) -> Callable[[Path], str]:
    """What a real browser makes of a page, as HTML, once its scripts have run."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no chromium here")
    off = ("gpu", "quic", "background-networking", "component-update", "sync")
    options = [*(f"--disable-{name}" for name in off), f"--user-data-dir={tmp_path / 'user'}"]
    options += ["--headless", "--no-sandbox", "--no-first-run", "--virtual-time-budget=5000", "--dump-dom"]

    def dump(page: Path) -> str:
        done = subprocess.run([program, *options, page.as_uri()], capture_output=True, timeout=300, check=True)
        return done.stdout.decode()

    return dump


@pytest.fixture
def same_verbosity() -> Iterator[None]:
    """Leave transformers' logging, which the examples make quiet, as it was."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()

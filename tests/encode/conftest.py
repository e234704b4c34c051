"""A file to embed, and chunks that are smaller than it."""

from pathlib import Path

import pytest
from embedded import TEXTS


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastbert.encode import files

    monkeypatch.setattr(files, "CHUNK_ROWS", 12)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join([*TEXTS[:20], "", *TEXTS[20:]]), encoding="utf-8")
    return path

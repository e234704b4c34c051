"""What a run over a file has finished, in a folder until all is done, so that the next run can go on from there.

Nothing is believed that is not there: every batch and every chunk of rows is checked by a checksum before it counts.
"""

import errno
import fcntl
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from fastbert.inputs import InputError

#: Of the folder: raised when what lies in it is read differently.
FORMAT = 3

#: All that a run makes, in the order in which it is deleted. Nothing else in the folder is touched.
FILES = ("whole.parquet", "embeddings", "journal", "settings.json.part", "settings.json")

#: Settings that are digests: too long to be told.
_DIGESTS = ("input", "model", "config", "tokenizer")

_WAY_OUT = "delete the folder, or choose another --out"


class Parts:
    """The folder of what is finished; used in a `with` block, which locks it.

    `settings.json` says of what run; `embeddings` holds float32 (rows, hidden) with each finished row at its place;
    `journal` has a line `chunk batch checksum 0` for each finished batch, and `chunk -1 checksum cut` for each finished
    chunk, in which `cut` texts lost their end. A line is written after the embeddings it speaks of.

    Args:
        folder: is made if it is not there.
        settings: of this run, JSON-ready.
        hidden: numbers in an embedding.

    Raises:
        InputError: when the folder belongs to other settings, to a run that still goes on or to nobody known, and when
            it cannot be written.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], hidden: int) -> None:
        self.folder, self._width = folder, 4 * hidden
        settings = {"format": FORMAT} | settings
        try:
            folder.mkdir(parents=True, exist_ok=True)
            known = _read_settings(folder)
            self._journal = (folder / "journal").open("a+b")
            try:
                self._lock()
                if known is None:
                    self._begin(settings)
                else:
                    _compare(folder, known, settings)
                self._finished = self._read_journal()
                self._data = os.open(folder / "embeddings", os.O_RDWR | os.O_CREAT, 0o666)
            except BaseException:
                self._journal.close()
                raise
        except OSError as error:
            raise InputError(
                f"{str(folder)!r} cannot be written ({error.strerror or error}), where unfinished work is kept: "
                "choose another --out"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._data)
        self._journal.close()

    def has_batch(self, chunk: int, batch: int, rows: Sequence[int]) -> bool:
        """Whether a batch with these rows of the file is finished, and there."""
        finished = self._finished.get((chunk, batch))
        return finished is not None and finished[0] == zlib.crc32(b"".join(self._read(row, 1) for row in rows))

    def add_batch(self, chunk: int, batch: int, rows: Sequence[int], embeddings: np.ndarray) -> None:
        """Keep a finished batch: its rows and their embeddings, float32 (rows, hidden)."""
        for row, embedding in zip(rows, embeddings, strict=True):
            _all(os.pwrite(self._data, embedding.tobytes(), row * self._width), self._width)
        self._note(chunk, batch, zlib.crc32(embeddings.tobytes()))

    def has_chunk(self, chunk: int, start: int, count: int) -> bool:
        """Whether all batches of a chunk, which is `count` rows from `start` on, are finished, and there."""
        finished = self._finished.get((chunk, -1))
        return finished is not None and finished[0] == zlib.crc32(self._padded(start, count))

    def add_chunk(self, chunk: int, start: int, count: int, cut: int) -> None:
        """Note that a chunk is finished, in which `cut` texts lost their end."""
        self._note(chunk, -1, zlib.crc32(self._padded(start, count)), cut)

    def cut(self, chunk: int) -> int:
        """How many texts of a finished chunk lost their end."""
        return self._finished[chunk, -1][1]

    def embeddings(self, chunk: int, start: int, count: int) -> np.ndarray:
        """A finished chunk, float32 (count, hidden); zeros where no batch had the row.

        Raises:
            InputError: when it is not what was finished.
        """
        if not self.has_chunk(chunk, start, count):
            raise InputError(f"{str(self.folder)!r} was changed while the run went on: start it again")
        return np.frombuffer(self._padded(start, count), np.float32).reshape(count, -1).copy()

    def remove(self) -> None:
        """Delete what the run made. The folder stays where something else lies in it."""
        for name in FILES:
            (self.folder / name).unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it, whatever ends us
        except BlockingIOError:
            raise InputError(
                f"another run is writing to {str(self.folder)!r}: wait for it, or choose another --out"
            ) from None

    def _begin(self, settings: dict[str, Any]) -> None:
        written = self.folder / "settings.json.part"
        written.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        written.replace(self.folder / "settings.json")

    def _read_journal(self) -> dict[tuple[int, int], tuple[int, int]]:
        """(chunk, batch) -> the checksum of its embeddings, and how many texts were cut."""
        self._journal.seek(0)
        *lines, cut = self._journal.read().split(b"\n")
        if cut:  # by what ended the last run
            self._journal.truncate(sum(len(line) + 1 for line in lines))
        finished = {}
        for line in lines:
            try:
                chunk, batch, checksum, cut_texts = map(int, line.split())
            except ValueError:
                raise InputError(
                    f"the journal in {str(self.folder)!r} is damaged ({line[:40]!r} is no line of it): {_WAY_OUT}"
                ) from None
            finished[chunk, batch] = checksum, cut_texts
        return finished

    def _note(self, chunk: int, batch: int, checksum: int, cut: int = 0) -> None:
        line = b"%d %d %d %d\n" % (chunk, batch, checksum, cut)
        _all(os.write(self._journal.fileno(), line), len(line))
        self._finished[chunk, batch] = checksum, cut

    def _read(self, start: int, count: int) -> bytes:
        return os.pread(self._data, count * self._width, start * self._width)

    def _padded(self, start: int, count: int) -> bytes:
        """Rows of the file, with zeros for those past its end: bad rows are not written."""
        return self._read(start, count).ljust(count * self._width, b"\0")


def _read_settings(folder: Path) -> dict[str, Any] | None:
    """The settings of the run that a folder holds; None when it holds none.

    Raises:
        InputError: when there are files of the names that a run needs, and they are not a run's.
    """
    try:
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        for name in FILES[:3]:
            path = folder / name
            if path.is_dir() or (path.exists() and path.stat().st_size):
                raise InputError(
                    f"{str(folder)!r} holds {name!r} without the settings of its run: {_WAY_OUT}"
                ) from None
        return None
    except ValueError:
        settings = None
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        raise InputError(f"settings.json in {str(folder)!r} is not of a run that can go on: {_WAY_OUT}")
    return settings


def _compare(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise InputError unless the settings are the same."""
    changed = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if changed:
        named = [f"another {n}" if n in _DIGESTS else f"{n} {there.get(n)!r}, now {here.get(n)!r}" for n in changed]
        raise InputError(
            f"{str(folder)!r} holds an unfinished run with {'; '.join(named)}: give it what it had, {_WAY_OUT}"
        )


def _all(written: int, wanted: int) -> None:
    """A full disk may take a part without an error."""
    if written != wanted:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

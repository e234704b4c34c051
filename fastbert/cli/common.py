"""What the commands share: their input, checked before any work, and a quiet transformers."""

import contextlib
import importlib.util
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import typer

CHECKPOINT_VARIABLE = "FASTBERT_CHECKPOINT"
LOCAL_CHECKPOINT = Path(".cache/minilm")
MODEL_HELP = (
    "Folder of a checkpoint, or a name on the Hugging Face hub. "
    f"Default: ${CHECKPOINT_VARIABLE}, else {LOCAL_CHECKPOINT}."
)


#: Variables of the environment -> what they may be.
VARIABLES = {
    "FASTBERT_BACKEND": ("auto", "torch", "triton"),
    "FASTBERT_CHECK": ("0", "1"),
    "FASTBERT_TUNED": ("0", "1"),
}


#: The exit code of what Ctrl-C ended.
INTERRUPTED = 130


def fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def check_environment() -> None:
    """Fail on a variable that says nothing known: it would be ignored, or stop an import."""
    for name, known in VARIABLES.items():
        value = os.environ.get(name, known[0])
        if value not in known:
            fail(f"the environment has {name}={value!r}: use {', '.join(known[:-1])} or {known[-1]}, or unset it")


def printable(text: str | os.PathLike[str]) -> str:
    """A path or a name as a terminal can show it: bytes that are not UTF-8 as question marks."""
    return os.fspath(text).encode(errors="replace").decode()


def check_unicode(option: str, text: str) -> None:
    """Fail on a text from the command line with bytes that are not UTF-8, which Python keeps as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        fail(f"{option} {text!r} is not UTF-8: give it text in UTF-8")


def read_sentences(text: list[str] | None, file: Path | None) -> list[str]:
    """The sentences of --text and --file, none where neither is given."""
    sentences = list(text or ())
    for sentence in sentences:
        if not sentence.strip():
            fail(f"--text {sentence!r} is empty: give it some text")
        check_unicode("--text", sentence)
    if file is not None:
        try:
            content = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            fail(f"cannot read --file {str(file)!r} ({reason}): name a UTF-8 text file, one sentence a line")
        if "\0" in content:
            fail(f"--file {str(file)!r} has NUL characters, as UTF-16 has: save it as UTF-8, one sentence a line")
        lines = [line.strip() for line in content.splitlines()]
        if not any(lines):
            fail(f"--file {str(file)!r} has no text: write one sentence a line")
        sentences += [line for line in lines if line]
    return sentences


def default_model() -> str:
    named = os.environ.get(CHECKPOINT_VARIABLE)
    if named:
        return named
    if (LOCAL_CHECKPOINT / "config.json").is_file():
        return str(LOCAL_CHECKPOINT)
    fail(
        f"no model given and none in {str(LOCAL_CHECKPOINT)!r}: name a checkpoint folder, set {CHECKPOINT_VARIABLE}, "
        "or run `make demo`, which fetches one"
    )


def check_targets(json_file: str | None, picture: tuple[str, Path | None]) -> None:
    """Fail before the work, not after it, on files that cannot be written.

    Args:
        json_file: of --json; - is stdout.
        picture: the option that asks for a PNG, and its file.
    """
    option, png = picture
    if png is not None and importlib.util.find_spec("matplotlib") is None:
        fail(f"{option} needs matplotlib, which is not installed: pip install matplotlib")
    if png is not None and png.suffix.lower() != ".png":
        fail(f"{option} {str(png)!r} is not a PNG: let its name end in .png")
    for name, target in (("--json", json_file), (option, png)):
        if target is None or target == "-":
            continue
        check_writable(name, Path(target))


def check_writable(option: str, path: Path) -> None:
    """Fail on a file that cannot be written. Folders on the way may be missing."""
    try:
        with contextlib.suppress(FileNotFoundError):
            path.stat()  # whose error says, on every Python, why there can be no such file
        if path.is_dir():
            fail(f"{option} {str(path)!r} is a folder: name a file")
        if path.exists():
            if not os.access(path, os.W_OK):
                fail(f"{option} {str(path)!r} cannot be written: choose another place")
        else:  # permissions alone do not tell, such as of /proc
            above = next(parent for parent in path.absolute().parents if parent.exists())
            tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        fail(f"{option} {str(path)!r} cannot be written: choose another place ({error.strerror or error})")


@contextlib.contextmanager
def writing(option: str, path: Path | str) -> Iterator[None]:
    """Fail in one line where a file cannot be written after all, such as on a full disk."""
    try:
        yield
    except OSError as error:
        fail(f"{option} {str(path)!r} cannot be written: choose another place ({error.strerror or error})")


def write_json(target: str | None, content: str) -> None:
    """Write JSON text where --json says: a file, whose folders are made, or stdout for -. None: nowhere."""
    if target == "-":
        sys.stdout.write(content)
    elif target is not None:
        path = Path(target)
        with writing("--json", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")


def choose_interpreter(backend: str, device: str | None) -> None:
    """Turn on Triton's interpreter where the triton backend is asked for on a CPU."""
    if backend != "triton":
        return
    if importlib.util.find_spec("triton") is None:
        fail("--backend triton needs Triton, which is not installed here; plain PyTorch runs without it")
    import torch

    on_cpu = device.startswith("cpu") if device else not torch.cuda.is_available()
    if not on_cpu:
        return
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from fastbert_kernels.backend import INTERPRETED

    if not INTERPRETED:
        fail("--backend triton on the CPU needs Triton's interpreter: set TRITON_INTERPRET=1 before starting")


@contextlib.contextmanager
def telling(first: str) -> Iterator[Callable[[str], None]]:
    """A line on stderr, while it lasts, of what is going on; what it yields is told what that is from now on."""
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(first) as status:
        # As text, for a model's name may look like markup.
        yield lambda message: status.update(Text(f"{printable(message)} ..."))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what transformers says while it loads: this command reports on its own."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

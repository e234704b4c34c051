"""Tiles measured on the user's own GPU, in place of the shipped ones: what `fastbert tune` writes and launches read.

So is the number of tokens from which on the feed-forward block's products are fused.

There is a file for each kind of device in the user's cache folder. It is read once in a process, at the first launch on
such a device, and never written by a launch: the same call gets the same kernel to the end of the process, and on every
rank that sees the same folder. `FASTBERT_TUNED=0` leaves it unread. A file for another device, Triton or state of the
kernels, or a damaged one, is ignored with one warning.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from .backend import KERNEL_DTYPES

logger = logging.getLogger("fastbert")

#: Of the file: raised when what it says is read differently.
FORMAT = 2

_TILES = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in KERNEL_DTYPES}

#: Kernels whose tiles can be measured; what is not named here keeps the shipped ones.
KERNELS = (
    *("attention_forward", "attention_backward_dq", "attention_backward_dkv"),
    *("relation_forward", "relation_backward_a", "relation_backward_b"),
    *("add_layer_norm_forward", "add_layer_norm_backward", "embed_forward", "embed_backward"),
    *("bias_activation_forward", "bias_activation_backward", "feed_forward_forward", "feed_forward_backward"),
)

#: In a file the name of what is said of a `Product`; not a kernel.
FUSED = "feed_forward_fused"


class Launch(NamedTuple):
    """What tiles are chosen by.

    Attributes:
        kernel: one of `KERNELS`.
        dtype: of the activations, or of a backward pass's incoming gradient.
        width: head_dim of an attention kernel, the larger dim of a relation kernel, hidden size of a feed-forward
            kernel, features of the others.
        maps: whether an attention kernel reads or writes (seq, seq) planes.
    """

    kernel: str
    dtype: torch.dtype
    width: int
    maps: bool = False

    @property
    def attends(self) -> bool:
        """Whether this kernel has heads, and works by tiles of rows and columns of scores."""
        return self.kernel.startswith(("attention_", "relation_"))

    @property
    def multiplies(self) -> bool:
        """Whether this kernel multiplies matrices, so that no side of a tile is under 16."""
        return self.attends or self.kernel.startswith("feed_forward_")

    @property
    def whole_rows(self) -> bool:
        """Whether a program holds whole rows, so that BLOCK_N is no choice."""
        return self.kernel.startswith(("add_layer_norm_", "embed_"))

    def __str__(self) -> str:
        return f"{self.kernel} {dtype_name(self.dtype)} {self.width}{' with maps' if self.maps else ''}"


class Product(NamedTuple):
    """What decides, beside the number of tokens, whether the feed-forward block's products are fused.

    Attributes:
        dtype: of the products.
        hidden: the hidden size.
        activation: one of `tiles.FEED_FORWARD_ACTIVATIONS`.
    """

    dtype: torch.dtype
    hidden: int
    activation: str

    @property
    def kernel(self) -> str:
        """A name beside those of `KERNELS`."""
        return FUSED

    def __str__(self) -> str:
        return f"{FUSED} {dtype_name(self.dtype)} {self.hidden} {self.activation}"


Tiles = dict[str, int]
#: Launch -> its tiles. Product -> the number of tokens from which on it is fused, None for never.
Table = dict[Launch | Product, Any]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def folder() -> Path:
    """Where the files lie: `$FASTBERT_CACHE`, else `$XDG_CACHE_HOME/fastbert`, else `~/.cache/fastbert`."""
    if own := os.environ.get("FASTBERT_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastbert"


def kind(device: torch.device) -> str:
    """The kind of device a table is of: the name its maker gave it, or `"interpreter"`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def path_of(name: str) -> Path:
    """The file of a kind of device."""
    return folder() / f"tiles-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def enabled() -> bool:
    """Whether files are read at all: not with `FASTBERT_TUNED=0`."""
    return os.environ.get("FASTBERT_TUNED", "1") != "0"


@functools.cache
def identity(name: str) -> dict[str, Any]:
    """What a file must agree with to be used on a kind of device: a time says nothing about other code."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return {"format": FORMAT, "device": name, "triton": triton.__version__, "kernels": digest.hexdigest()[:16]}


def load(path: Path, name: str) -> dict[str, Any]:
    """The content of a file.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it cannot be used on this kind of device; the message is the reason.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"it cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError("it is damaged: no JSON object")
    for key, here in identity(name).items():
        if content.get(key) != here:
            if key == "kernels":
                raise ValueError("it was measured with other kernels than this version of fastbert has")
            raise ValueError(f"its {key} is {content.get(key)!r}, here it is {here!r}")
    try:
        for entry in content["entries"]:
            read_entry(entry)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is damaged: {type(error).__name__}: {error}") from error
    return content


def read_entry(entry: dict[str, Any]) -> tuple[Launch | Product, Any]:
    """A row of a `Table`, from what a file says.

    Raises:
        ValueError: for tiles that no kernel takes, or that would give a wrong result; for what is no number of tokens.
        KeyError, TypeError: for what is no entry at all.
    """
    return _read_product(entry) if entry["kernel"] == FUSED else _read_launch(entry)


def _read_product(entry: dict[str, Any]) -> tuple[Product, int | None]:
    product = Product(_DTYPES[entry["dtype"]], entry["width"], entry["activation"])
    start = entry["fused_from"]
    sound = type(product.hidden) is int and type(product.activation) is str
    if not sound or not (start is None or (type(start) is int and start > 0)):
        raise ValueError(
            f"it is damaged: products of {product.hidden!r} features with {product.activation!r} cannot be fused from "
            f"{start!r} tokens on"
        )
    return product, start


def _read_launch(entry: dict[str, Any]) -> tuple[Launch, Tiles]:
    launch = Launch(entry["kernel"], _DTYPES[entry["dtype"]], entry["width"], entry["maps"])
    tiles = {name: entry["tiles"][name] for name in _TILES}
    sizes = [tiles[name] for name in _TILES[:3]]
    sound = (
        launch.kernel in KERNELS
        and type(launch.width) is int
        and type(launch.maps) is bool
        and all(type(value) is int and value > 0 for value in tiles.values())
        and all(size & (size - 1) == 0 for size in sizes)
        and tiles["BLOCK_N"] >= (launch.width if launch.whole_rows else 16)
        and (tiles["BLOCK_M"] >= 16 or not launch.multiplies)
        and tiles["num_warps"] <= 32
    )
    if not sound:
        raise ValueError(f"it is damaged: {launch.kernel!r} of width {launch.width!r} cannot have {tiles}")
    return launch, tiles


def write(name: str, entries: list[dict[str, Any]], provenance: dict[str, Any]) -> Path:
    """Write the file of a kind of device, so that a reader, or an interruption, never sees half of it.

    Args:
        name: what `kind` says.
        entries: what `read_entry` takes; anything else in them is for people.
        provenance: JSON-ready, for people.

    Raises:
        OSError: when the folder cannot be written.
    """
    path = path_of(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = identity(name) | {"provenance": provenance, "entries": entries}
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1) + "\n")
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    return path


#: Device -> its table, filled at its first launch.
_tables: dict[torch.device, Table] = {}


def measured(device: torch.device) -> Table:
    """The table in force on a device, empty where there is none. Read at the first call."""
    table = _tables.get(device)
    if table is None:
        table = _tables[device] = _read(kind(device)) if enabled() else {}
    return table


@functools.cache
def _read(name: str) -> Table:
    """The table of a kind of device: one read, and one warning, however many devices of a kind there are."""
    try:
        path = path_of(name)
        return dict(read_entry(entry) for entry in load(path, name)["entries"])
    except (FileNotFoundError, RuntimeError):  # no file, or no home to look for one in
        return {}
    except ValueError as error:
        logger.warning(f"measured tiles in {path} are ignored, the shipped ones run: {error}. `fastbert tune` measures")
        return {}


@contextlib.contextmanager
def in_force(device: torch.device, table: Table) -> Iterator[None]:
    """Run a block under another table, e.g. an empty one: `with in_force(device, {}): ...`."""
    before = _tables.get(device)
    _tables[device] = table
    try:
        yield
    finally:
        if before is None:
            del _tables[device]
        else:
            _tables[device] = before


def tuned_tiles(
    kernel: str, x: torch.Tensor, width: int, shipped: dict[str, Any], maps: bool = False
) -> dict[str, Any]:
    """The tiles of a launch on the device of `x`: measured there, or else the shipped ones. See `Launch`."""
    return measured(x.device).get((kernel, x.dtype, width, maps), shipped)  # type: ignore[call-overload]


def tuned_start(device: torch.device, product: Product, shipped: int | None) -> int | None:
    """The number of tokens from which on products are fused: measured on a device, or else the shipped one."""
    start: int | None = measured(device).get(product, shipped)
    return start

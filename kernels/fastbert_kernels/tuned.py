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
from typing import Any

import torch

from .backend import KERNEL_DTYPES
from .catalogue import FUSED, SHORT, TUNABLE, Launch, Product, Tiles, dtype_name
from .language import triton

logger = logging.getLogger("fastbert")

#: Of the file: raised when what it says is read differently.
FORMAT = 3

_TILE_KEYS = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
#: Far above what is shipped, or tried by `fastbert tune`. More would not compile, or not fit on any GPU.
_LONGEST_SIDE, _MOST_STAGES = 512, 8
_DTYPES = {dtype_name(dtype): dtype for dtype in KERNEL_DTYPES}

#: Launch -> its tiles. Product -> the number of tokens from which on it is fused, None for never.
Table = dict[Launch | Product, Any]


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
    launch = Launch(
        entry["kernel"], _DTYPES[entry["dtype"]], entry["width"], entry["maps"], entry["up_to"], entry["tf32"]
    )
    tiles = {name: entry["tiles"][name] for name in _TILE_KEYS}
    sizes = [tiles[name] for name in _TILE_KEYS[:3]]
    sound = (
        launch.kernel in TUNABLE
        and type(launch.width) is int
        and type(launch.maps) is bool
        and (launch.up_to is None or (launch.up_to in SHORT and launch.traits.op == "attention"))
        and type(launch.tf32) is bool
        and all(type(value) is int and value > 0 for value in tiles.values())
        and all(size & (size - 1) == 0 for size in sizes)
        and tiles["BLOCK_N"] >= (launch.width if launch.traits.whole_rows else 16)
        and (tiles["BLOCK_M"] >= 16 or not launch.traits.multiplies)
        and tiles["BLOCK_N"] <= (2 * max(launch.width, 16) if launch.traits.whole_rows else _LONGEST_SIDE)
        and tiles["BLOCK_M"] <= _LONGEST_SIDE
        and tiles["num_warps"] <= 32
        and tiles["num_stages"] <= _MOST_STAGES
    )
    if not sound:
        raise ValueError(
            f"it is damaged: {launch.kernel!r} of width {launch.width!r}, up_to {launch.up_to!r}, cannot have {tiles}"
        )
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
    kernel: str,
    x: torch.Tensor,
    width: int,
    shipped: Tiles,
    maps: bool = False,
    up_to: int | None = None,
    tf32: bool = False,
) -> Tiles:
    """The tiles of a launch on the device of `x`: measured there, or else the shipped ones. See `catalogue.Launch`."""
    return measured(x.device).get((kernel, x.dtype, width, maps, up_to, tf32), shipped)  # type: ignore[call-overload]


def tuned_start(device: torch.device, product: Product, shipped: int | None) -> int | None:
    """The number of tokens from which on products are fused: measured on a device, or else the shipped one."""
    start: int | None = measured(device).get(product, shipped)
    return start

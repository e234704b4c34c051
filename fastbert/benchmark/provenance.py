"""Where a figure comes from: device, driver, clocks, versions, commit, date."""

import contextlib
import datetime
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastbert
from fastbert_kernels.tuned import measured

#: What to ask of a GPU's driver.
_DRIVER_FACTS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
_PACKAGES = ("triton", "transformers", "onnxruntime", "flash-attn", "liger-kernel")


def facts(device: torch.device) -> dict[str, Any]:
    """What every result carries: JSON-ready.

    Returns:
        date (UTC), commit of the code (None outside a repository; "+" marks uncommitted changes), versions, device
        name and type, and for a GPU its driver, clocks (MHz), power limit and temperature, and how many launches have
        tiles of `fastbert tune` in place of the shipped ones; for a CPU its threads.
    """
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device_name(device),
        "device_type": device.type,
        "versions": versions(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": _ask_driver(device),
            "measured_tiles": len(measured(device)),
        }
    else:
        found["threads"] = torch.get_num_threads()
    return found


def versions() -> dict[str, str]:
    """Versions of fastbert, Python, CUDA and the packages that a figure depends on, as far as they are installed."""
    # Of torch the build too, which its package does not always tell.
    found = {"python": platform.python_version(), "fastbert": fastbert.__version__, "torch": torch.__version__}
    found |= installed(*_PACKAGES)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def installed(*packages: str) -> dict[str, str]:
    """Versions of packages, of those that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def device_name(device: torch.device) -> str:
    """The name its maker gave it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        names = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = None
    return names[1] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit this code is at, with a "+" where files differ from it; None when it is in no repository, or is
    installed inside one of another project, which does not track it."""
    file = Path(__file__).resolve()
    here = file.parent
    if _output("git", "-C", str(here), "ls-files", "--error-unmatch", file.name) is None:
        return None
    head = _output("git", "-C", str(here), "rev-parse", "HEAD")
    if head is None:
        return None
    return head + ("+" if _output("git", "-C", str(here), "status", "--porcelain", "--untracked-files=no") else "")


def _ask_driver(device: torch.device) -> dict[str, str] | None:
    # By UUID: an index would ignore CUDA_VISIBLE_DEVICES.
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    answer = _output("nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(_DRIVER_FACTS)}", "--format=csv,noheader")
    return dict(zip(_DRIVER_FACTS, answer.split(", "), strict=False)) if answer else None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None

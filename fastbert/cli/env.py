"""`fastbert env`: what a bug report needs."""

import os
import platform
from pathlib import Path

import typer

from .common import VARIABLES

#: Packages that a model here may meet, beside those that a figure depends on.
_AROUND = ("tokenizers", "safetensors", "accelerate", "peft", "sentence-transformers", "setfit", "captum", "numpy")


def env() -> None:
    """Print versions, the device and the choices in force: what a bug report needs."""
    import torch

    import fastbert
    from fastbert.benchmark.provenance import facts, installed
    from fastbert.modules.explaining import describe_backend

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = facts(device)
    versions = found.pop("versions")
    lines = {
        **versions,
        **installed(*_AROUND),
        "system": platform.platform(),
        "processor": platform.machine(),
        **{name: value for name, value in found.items() if name != "date"},
        "runs as": describe_backend(torch.empty(0, device=device)),
        "installed in": Path(fastbert.__file__).parent,
        **{name: os.environ[name] for name in (*VARIABLES, "FASTBERT_CACHE", "TRITON_INTERPRET") if name in os.environ},
    }
    width = max(map(len, lines))
    for name, value in lines.items():
        typer.echo(f"{name:<{width}}  {value}")

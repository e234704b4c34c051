"""Texts embedded per second, beside sentence-transformers, interleaved in one run: `python -m bench.embed`.

2,000 sentences and paragraphs of Python's own documentation strings, of the standard library that runs this, in an
order that is fixed and mixed. Every contender's embeddings are compared with sentence-transformers' own before any is
timed; its peak memory is that of a process of its own. The figures are ratios of this run on this machine.
"""

import ast
import functools
import hashlib
import multiprocessing
import resource
import sysconfig
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from fastbert import fuse
from fastbert.benchmark.provenance import facts
from fastbert.benchmark.results import save_json
from fastbert.benchmark.timing import Times, interleaved
from fastbert.encode.encoder import TOKENS, Encoder
from fastbert.inputs import parse_device

CHECKPOINT = Path(__file__).parents[1] / ".cache" / "minilm"
COSINE = 0.99999
OURS = "fastbert.encode"

#: Texts to their embeddings.
Embed = Callable[[list[str]], Any]


def sentences(count: int) -> list[str]:
    """So many docstrings' first paragraphs and sections, each on one line, 3 to 300 words, none twice: ragged."""
    found: set[str] = set()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                    text = " ".join(paragraph.split())
                    if 3 <= len(text.split()) <= 300:
                        found.add(text)
    if len(found) < count:
        raise ValueError(f"the standard library here has {len(found)} such paragraphs, fewer than {count}")
    return sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())[:count]


def sentence_transformer(model: Path, device: torch.device, attention: str, fused: bool) -> Any:
    """A folder's model as sentence-transformers has it, its BERT fused or not."""
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(
        str(model), device=str(device), model_kwargs={"attn_implementation": attention}, local_files_only=True
    )
    return fuse(loaded) if fused else loaded


def _theirs(
    model: Path, device: torch.device, batch: int, tokens: int, attention: str = "sdpa", fused: bool = False
) -> Embed:
    loaded = sentence_transformer(model, device, attention, fused)
    return lambda texts: loaded.encode(texts, batch_size=batch, show_progress_bar=False)


def _ours(model: Path, device: torch.device, batch: int, tokens: int) -> Embed:
    return Encoder(model, tokens=tokens, device=device)


#: How each contender is made. All embed with the folder's own pooling, normalization and length.
CONTENDERS: dict[str, Callable[[Path, torch.device, int, int], Embed]] = {
    OURS: _ours,
    "sentence-transformers, fused": functools.partial(_theirs, fused=True),
    "sentence-transformers, sdpa": _theirs,
    "sentence-transformers, eager": functools.partial(_theirs, attention="eager"),
}


def peak_memory(name: str, model: Path, device: torch.device, batch: int, tokens: int, count: int) -> int:
    """The most bytes that a process of its own takes to make a contender and to embed so many texts: of the GPU, or on
    a CPU, of the whole process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_peak_memory, name, model, device, batch, tokens, count, torch.get_num_threads()).result()


def _peak_memory(
    name: str, model: Path, device: torch.device, batch: int, tokens: int, count: int, threads: int
) -> int:
    torch.set_num_threads(threads)
    CONTENDERS[name](model, device, batch, tokens)(sentences(count))
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def least_cosine(one: np.ndarray, other: np.ndarray) -> float:
    """The smallest cosine between rows of the two."""
    return torch.cosine_similarity(torch.from_numpy(one).double(), torch.from_numpy(other).double()).min().item()


def main(
    model: Annotated[Path, typer.Option(help="A sentence-transformers folder with a BERT inside.")] = CHECKPOINT,
    count: Annotated[int, typer.Option("--texts", min=1, help="How many texts.")] = 2000,
    batch: Annotated[int, typer.Option(min=1, help="Texts in a batch of sentence-transformers.")] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens in a batch of fastbert.encode.")] = TOKENS,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: the GPU if there is one.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every contender.")] = 5,
    json_file: Annotated[Path, typer.Option("--json", help="Where the results go.")] = Path("bench-output/embed.json"),
) -> None:
    """Time `encode` of sentence-transformers, with its BERT fused, and of fastbert. Exit code 1: embeddings differ."""
    on = parse_device(device)
    texts = sentences(count)
    memory = {name: peak_memory(name, model, on, batch, tokens, count) for name in CONTENDERS}
    runs = {name: make(model, on, batch, tokens) for name, make in CONTENDERS.items()}
    embedded = {name: np.asarray(run(texts)) for name, run in runs.items()}
    expected = embedded["sentence-transformers, eager"]
    cosines = {name: least_cosine(found, expected) for name, found in embedded.items()}
    right = {name: cosine >= COSINE for name, cosine in cosines.items()}
    times = interleaved(
        {name: lambda run=run: run(texts) for name, run in runs.items() if right[name]},  # type: ignore[misc]
        on,
        seconds=0,
        rounds=(rounds, rounds),
    )
    lengths = [len(ids) for batch in runs[OURS].batches(texts) for ids in batch.ids]  # type: ignore[attr-defined]
    about = facts(on) | {
        "texts": count,
        "lengths": dict(zip(("min", "median", "mean", "max"), _summary(lengths), strict=True)),
        "batch": batch,
        "tokens": tokens,
    }
    rows = [
        {
            "contender": name,
            "least_cosine": cosines[name],
            "texts_per_second": count / times[name].median if right[name] else None,
            "times": asdict(times[name]) if right[name] else None,
            "peak_bytes": memory[name],
        }
        for name in runs
    ]
    save_json(json_file, {"facts": about, "rows": rows})
    _show(times, cosines, memory, count)
    typer.echo(f"{about['device']}; tokens a text: {about['lengths']}; {json_file}")
    if not all(right.values()):
        raise typer.Exit(1)


def _summary(lengths: list[int]) -> list[float]:
    return [min(lengths), float(np.median(lengths)), round(float(np.mean(lengths)), 1), max(lengths)]


def _show(times: dict[str, Times], cosines: dict[str, float], memory: dict[str, int], count: int) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("contender", no_wrap=True)
    for name in ("texts/s", "20-80%", f"{OURS} over it", "least cosine", "peak MB"):
        table.add_column(name, justify="right")
    for name, cosine in cosines.items():
        last = f"{cosine:.7f}", f"{memory[name] / 1e6:.0f}"
        if name not in times:
            table.add_row(name, "-", "-", "wrong: not timed", *last)
            continue
        taken = times[name]
        ratio = f"{taken.median / times[OURS].median:.2f}x" if OURS in times else "-"
        spread = f"{count / taken.q80:.0f}-{count / taken.q20:.0f}"
        table.add_row(name, f"{count / taken.median:.0f}", spread, ratio, *last)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)

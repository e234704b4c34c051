"""A user's model on a user's lengths: what `fastbert bench` measures."""

import csv
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbert.families import head_of, longest_text
from fastbert.inputs import InputError, check_backend, load, parse_device, parse_dtype, tokenize

from .contenders import named as named_contenders
from .measure import Field
from .provenance import facts
from .results import Results
from .workloads import CPU_WORKLOADS, GPU_WORKLOADS, Workload
from .workloads import named as named_workloads

#: Without --workload, where the lengths are not the user's.
_DEFAULT = {"cpu": ("full", "ragged", "finetune-ragged"), "cuda": ("full-512", "ragged-384", "one-128", "finetune-128")}
_PEERS = {
    "cpu": ("fastbert", "eager", "sdpa", "compile", "onnxruntime"),
    "cuda": ("fastbert", "eager", "sdpa", "flash", "compile"),
}


def measure(
    model: str,
    workloads: Sequence[str] = (),
    *,
    texts: Sequence[str] = (),
    histogram: Path | None = None,
    batch: int = 32,
    peers: Sequence[str] = (),
    dtype: str | None = None,
    device: str | None = None,
    seconds: float = 5.0,
    tell: Callable[[str], object] = lambda message: None,
) -> Results:
    """Time a checkpoint and its peers.

    Args:
        model: a checkpoint of one of the families with its tokenizer: a folder, or a name on the Hugging Face hub.
        workloads: names of `workloads.CPU_WORKLOADS` or, on a GPU, `GPU_WORKLOADS`; with `texts` or a `histogram` also
            "yours" and "yours-finetune". Default: those two, or without them a few of the rest.
        texts: what a batch is drawn from: rows at equal steps of their sorted lengths, so that it is as ragged as they.
        histogram: a file with lines of tokens,count, to draw from likewise.
        batch: rows of such a batch.
        peers: names of `contenders.CONTENDERS`; default: those of the device. fastbert is always there.
        dtype: the working dtype; default bfloat16 on a GPU, else float32.
        device: where to run; default the GPU if there is one.
        seconds: for each workload.
        tell: called with what is going on, for people.

    Raises:
        InputError: for what cannot be used; the message says the way out.
    """
    where = parse_device(device)
    working = parse_dtype(dtype or ("bfloat16" if where.type == "cuda" else "float32"))
    known = dict(CPU_WORKLOADS if where.type == "cpu" else GPU_WORKLOADS)
    try:
        contenders = named_contenders(("fastbert", *(peers or _PEERS[where.type])))
        if histogram is None and not texts:
            chosen = named_workloads(workloads or _DEFAULT[where.type], known)
    except ValueError as error:
        raise InputError(str(error)) from error
    check_backend(working, where)
    tell(f"loading {model}")
    bert, tokenizer = load(model, dropout=True)
    longest = longest_text(bert)
    own_batch: dict[str, Tensor] | None = None
    if texts or histogram is not None:
        if texts:
            own_batch, own = _text_batch(tokenizer, texts, batch, longest)
        else:
            assert histogram is not None
            own = _spread(_read_histogram(histogram), batch)
        known |= {
            "yours": Workload("yours", own, "forward"),
            "yours-finetune": Workload("yours-finetune", own, "finetune"),
        }
        try:
            chosen = named_workloads(workloads or ("yours", "yours-finetune"), known)
        except ValueError as error:
            raise InputError(str(error)) from error
    for workload in chosen:
        if workload.seq > longest:
            raise InputError(
                f"workload {workload.name!r} has {workload.seq} tokens in a row, {model!r} takes {longest}: "
                "choose another, or shorter lengths"
            )
    results = Results(facts(where))
    fields: dict[bool, Field] = {}
    for workload in chosen:
        step = workload.task == "finetune"
        if step not in fields:
            source = _with_classifier(bert) if step else bert
            fields[step] = Field(Path(model).name, source, contenders, dtype=working, device=where)
        inputs = None
        if own_batch is not None and workload.name.startswith("yours"):
            inputs = {name: tensor.to(where) for name, tensor in own_batch.items()}
        results.rows += fields[step].measure(workload, inputs, seconds=seconds, tell=tell)
    results.finished = True
    return results


def _with_classifier(encoder: Any) -> Any:
    """The same encoder under a sequence classifier with fixed random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier: Any = head_of(type(encoder), "ForSequenceClassification")(encoder.config)
    weights = encoder.state_dict()
    wanted = classifier.base_model.state_dict().keys()  # without a pooler where the head has none
    classifier.base_model.load_state_dict({name: weights[name] for name in wanted})
    return classifier.eval()


def _text_batch(
    tokenizer: Any, texts: Sequence[str], batch: int, longest: int
) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """A batch of texts as ragged as all of them, and its lengths."""
    by_length = sorted(texts, key=len)
    picked = [by_length[i] for i in _steps(len(by_length), batch)]
    encoded = tokenize(tokenizer, picked, None, longest)
    return encoded.inputs, tuple(encoded.mask.sum(1).tolist())


def _spread(counts: dict[int, int], batch: int) -> tuple[int, ...]:
    """Lengths at equal steps of a histogram."""
    ends = list(itertools.accumulate(counts[length] for length in sorted(counts)))
    lengths = sorted(counts)
    return tuple(next(n for n, end in zip(lengths, ends, strict=True) if i < end) for i in _steps(ends[-1], batch))


def _steps(count: int, batch: int) -> list[int]:
    """`batch` indices at equal steps of 0 .. count - 1, in a fixed mixed order; repeated if there are few."""
    even = [int((i + 0.5) * count / batch) for i in range(batch)]
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(0)).tolist()
    return [even[i] for i in order]


def _read_histogram(path: Path) -> dict[int, int]:
    """Length -> how many texts have it."""
    wanted = "write lines of tokens,count, such as 37,120"
    try:
        lines = [row for row in csv.reader(path.read_text(encoding="utf-8").splitlines()) if row]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"cannot read --lengths {str(path)!r} ({reason}): {wanted}") from error
    counts: dict[int, int] = {}
    for number, row in enumerate(lines, 1):
        try:
            length, count = (int(cell) for cell in row)
        except ValueError:
            if number == 1 and not row[0].strip().isdigit():  # a heading
                continue
            raise InputError(f"--lengths {str(path)!r}, line {number}: {','.join(row)!r}: {wanted}") from None
        if length < 1 or count < 0:
            raise InputError(f"--lengths {str(path)!r}, line {number}: {','.join(row)!r} is not positive: {wanted}")
        counts[length] = counts.get(length, 0) + count
    if not sum(counts.values()):
        raise InputError(f"--lengths {str(path)!r} counts no texts: {wanted}")
    return {length: count for length, count in counts.items() if count}

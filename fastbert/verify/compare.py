"""Is fastbert right, and how long does it take: one comparison with Hugging Face, judged by float64.

Three models carry the same weights: Hugging Face's eager model in float64 on the CPU, which is the truth; the same in
the working dtype, which shows the error that dtype costs anyone; and fastbert in the working dtype. All three see the
weights rounded to the working dtype, so that only arithmetic differs.

Nothing here prints: `compare` returns a `Report`.
"""

import copy
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastbert import fusing
from fastbert.benchmark.provenance import device_name, versions
from fastbert.benchmark.timing import interleaved
from fastbert.families import longest_text
from fastbert.inputs import SENTENCES, InputError, Tokenized, check_backend, load, parse_device, parse_dtype, tokenize
from fastbert_kernels import backend as use_backend
from fastbert_kernels.backend import INTERPRETED

from .report import Check, Report, Timing

#: float32: the absolute error allowed of an output, and the relative one of a gradient.
OUTPUT_BOUND = 1e-5
GRADIENT_BOUND = 1e-4
#: Half precision: the multiple of Hugging Face's own error allowed, and what is allowed on top.
HALF_RATIO = 2.0
HALF_SLACK = 1e-5
#: A gradient this much smaller than the largest of its layer is zero in exact arithmetic. The key bias's always is:
#: it moves all scores of a row alike, which softmax does not see.
VANISHING = 1e-9

#: What a report calls Triton's kernels in its interpreter.
_INTERPRETED = "triton, interpreted"

Fuse = Callable[..., PreTrainedModel]


def compare(
    model: str | os.PathLike[str],
    sentences: Sequence[str] = SENTENCES,
    *,
    dtype: str | torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    backend: str = "auto",
    train: bool = False,
    repeats: int = 5,
    max_length: int | None = None,
    packing: bool = True,
    fuse: Fuse | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Report:
    """Check fastbert against Hugging Face on one batch, then time both.

    Only tokens are compared: with packing, what fastbert returns at padding must be exactly zero; without, padding is
    compared like everything else.

    Args:
        model: a checkpoint of one of the families with its tokenizer: a folder, or a name on the Hugging Face hub.
        sentences: the batch, one sentence a row.
        dtype: the working dtype: float32, float16 or bfloat16 (fp32, fp16, bf16).
        device: where fastbert and Hugging Face run; None: the GPU if there is one.
        backend: `"auto"`, `"torch"` or `"triton"`: what runs the ops that are checked.
        train: also compare every parameter's gradient, with all four outputs in the loss and dropout at 0.
        repeats: timed repetitions, of which the median counts; 0 for no timing.
        max_length: the length to cut sentences to; None: the model's own limit.
        packing: handed to `fuse`.
        fuse: called as `fuse(model, packing=packing)`; None: `fastbert.fuse`.
        progress: told, in a few words, what runs now.

    Raises:
        InputError: for a model, text, dtype, device or backend that cannot be used.
    """
    dtype, device = parse_dtype(dtype), parse_device(device)
    if backend not in ("auto", "torch", "triton"):
        raise InputError(f"unknown backend {backend!r}: use auto, torch or triton")
    if repeats < 0:
        raise InputError(f"cannot repeat {repeats} times: repeats is 0 (no timing) or more")
    progress("loading the model")
    hf: Any  # transformers wraps `to` in a way that type checkers misread
    hf, tokenizer = load(model)
    batch = tokenize(tokenizer, sentences, max_length, longest_text(hf))
    hf = hf.to(dtype).eval()
    truth = copy.deepcopy(hf).double()
    hf = hf.to(device)
    with use_backend(backend):
        ran = _backend_here(dtype, device)
        fused = (fuse or fusing.fuse)(copy.deepcopy(hf), packing=packing)
        trio = _Trio(truth, hf, fused, batch, packing)
        report = Report(_provenance(str(model), trio, ran), [], [], fused, [], batch.tokens)
        report.outputs, report.attentions = _check_outputs(trio, progress)
        if train:
            report.gradients = _check_gradients(trio, progress)
        report.timing_skipped = _why_not_timed(report, repeats, ran)
        if report.timing_skipped is None:
            progress("timing")
            report.timings = _time(trio, train, repeats)
    return report


@dataclass(frozen=True)
class _Trio:
    """Three models with the same weights, and the batch that all of them read.

    Attributes:
        truth: Hugging Face eager in float64 on the CPU.
        hf: Hugging Face eager in the working dtype, on the device.
        fused: fastbert, likewise.
        batch: on the CPU.
        packing: whether fastbert drops padding.
    """

    truth: PreTrainedModel
    hf: PreTrainedModel
    fused: PreTrainedModel
    batch: Tokenized
    packing: bool

    @property
    def compared(self) -> Tensor:
        """bool (batch, seq), True where outputs are compared with the truth."""
        return self.batch.mask if self.packing else torch.ones_like(self.batch.mask)


def _backend_here(dtype: torch.dtype, device: torch.device) -> str:
    """What runs the ops of such tensors, in words; InputError where nothing can."""
    if not check_backend(dtype, device):
        return "torch"
    return _INTERPRETED if INTERPRETED else "triton, compiled"


def _why_not_timed(report: Report, repeats: int, ran: str) -> str | None:
    if repeats == 0:
        return "no repeats asked for"
    if not report.ok:
        return "a result is out of bounds, and the speed of a wrong answer means nothing"
    if ran == _INTERPRETED:
        return "Triton's interpreter runs the kernels, and its time says nothing about a GPU's"
    return None


def gradient_group(parameter: str) -> str:
    """The part of the model a parameter belongs to, e.g. `"layer 3 attention"`, `"layer 3 mlp"`."""
    match = re.match(r"(?:encoder|transformer)\.layer\.(\d+)\.(attention\.|sa_)?", parameter)
    if match is None:
        return parameter.split(".")[0]
    return f"layer {match[1]} {'attention' if match[2] else 'mlp'}"


def _check_outputs(trio: _Trio, progress: Callable[[str], None]) -> tuple[list[Check], list[Tensor]]:
    """A check for each output, and fastbert's maps."""
    with torch.no_grad():
        progress("Hugging Face eager in float64, the truth")
        true = _run(trio.truth, trio.batch)
        progress("Hugging Face eager in the working dtype")
        theirs = _run(trio.hf, trio.batch)
        progress("fastbert")
        ours = _run(trio.fused, trio.batch)
    maps = [layer.float().cpu() for layer in ours.attentions or () if isinstance(layer, Tensor)]

    checks = []
    if not isinstance(ours, type(theirs)):
        wrong = f"is a {type(ours).__name__} instead of a {type(theirs).__name__}"
        checks.append(Check("the output", (), math.nan, 0.0, 0.0, wrong))
    got, expected = dict(_named(ours)), dict(_named(theirs))
    exact = dict(_named(true))
    for name, want in expected.items():
        visible = _visible(name, trio.compared)
        problem = _problem(got.get(name), want, visible)
        error, rms = (math.nan, math.nan) if problem else _errors(got[name], exact[name], visible)
        hf_error, hf_rms = _errors(want, exact[name], visible)
        bound = OUTPUT_BOUND if want.dtype == torch.float32 else HALF_RATIO * hf_error + HALF_SLACK
        checks.append(Check(name, tuple(want.shape), error, hf_error, bound, problem, rms, hf_rms))
    for name in got.keys() - expected.keys():
        checks.append(Check(name, (), math.nan, 0.0, 0.0, "Hugging Face returns no such output"))
    return checks, maps


def _check_gradients(trio: _Trio, progress: Callable[[str], None]) -> list[Check]:
    dtype = trio.hf.dtype
    progress("gradients of the truth")
    true = _gradients(trio.truth, trio, dtype)
    progress("gradients of Hugging Face eager")
    theirs = _gradients(trio.hf, trio, dtype)
    progress("gradients of fastbert")
    ours = _gradients(trio.fused, trio, dtype)

    largest = {name: float(grad.abs().max()) for name, grad in true.items()}
    of_group: dict[str, float] = {}
    for name, value in largest.items():
        of_group[gradient_group(name)] = max(of_group.get(gradient_group(name), 0.0), value)
    everywhere = torch.ones((), dtype=torch.bool)
    checks = []
    hf_errors = {name: _errors(theirs[name], want, everywhere) for name, want in true.items()}
    for name, want in true.items():
        group = of_group[gradient_group(name)]
        scale = (largest[name] if largest[name] > VANISHING * group else group) or 1.0
        hf_error, hf_rms = (error / scale for error in hf_errors[name])
        got = ours.get(name)
        problem = "no gradient" if got is None else None
        if got is not None and got.shape != want.shape:
            problem = f"has shape {tuple(got.shape)} instead of {tuple(want.shape)}"
        elif got is not None and not got.isfinite().all():
            problem = "not finite"
        error, rms = math.nan, math.nan
        if got is not None and problem is None:
            error, rms = (error / scale for error in _errors(got, want, everywhere))
        # A vanishing gradient is rounding noise in both. How Hugging Face's fell in this one tensor is no bound for
        # ours; its largest error in the group, on the same scale, is.
        vanishes = largest[name] <= VANISHING * group
        peers = [n for n in true if gradient_group(n) == gradient_group(name)] if vanishes else [name]
        allowed = max(hf_errors[n][0] / scale for n in peers)
        bound = GRADIENT_BOUND if dtype == torch.float32 else HALF_RATIO * allowed + HALF_SLACK
        checks.append(Check(name, tuple(want.shape), error, hf_error, bound, problem, rms, hf_rms))
    return checks


def _run(model: PreTrainedModel, batch: Tokenized, everything: bool = True) -> Any:
    inputs = {name: tensor.to(model.device) for name, tensor in batch.inputs.items()}
    return model(**inputs, output_hidden_states=everything, output_attentions=everything)


def _named(output: Any) -> Iterator[tuple[str, Any]]:
    """The four outputs, one name a tensor; some families have no pooler."""
    yield "last_hidden_state", output.last_hidden_state
    if "pooler_output" in output:
        yield "pooler_output", output.pooler_output
    for name in ("hidden_states", "attentions"):
        for i, tensor in enumerate(getattr(output, name) or ()):
            yield f"{name}[{i}]", tensor


def _visible(name: str, mask: Tensor) -> Tensor:
    """Where an output belongs to tokens: bool, broadcastable to its shape."""
    if name.startswith("attentions"):
        return mask[:, None, :, None] & mask[:, None, None, :]
    return mask[:, :1] if name == "pooler_output" else mask[:, :, None]


def _problem(got: Any, want: Tensor, visible: Tensor) -> str | None:
    if not isinstance(got, Tensor):
        return "missing" if got is None else f"is a {type(got).__name__}"
    if got.shape != want.shape:
        return f"has shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    if got.dtype != want.dtype or got.device != want.device:
        return f"is {got.dtype} on {got.device} instead of {want.dtype} on {want.device}"
    visible = visible.to(got.device)
    if not got.masked_fill(~visible, 0.0).isfinite().all():
        return "not finite"
    if got.masked_fill(visible, 0.0).count_nonzero() > 0:
        return "not zero at padding"
    return None


def _errors(got: Tensor, exact: Tensor, visible: Tensor) -> tuple[float, float]:
    """The largest error where an output is visible, and the root mean square there."""
    error = (got.double().cpu() - exact)[visible.expand_as(exact)]
    return float(error.abs().max()), float(error.square().mean().sqrt())


def _cotangents(output: Any, mask: Tensor, dtype: torch.dtype, everything: bool = True) -> dict[str, Tensor]:
    """The gradient of one loss at each output: the same noise for every model, zero at padding.

    Rounded to the working dtype for the truth as well, so that all start from the same numbers.
    """
    generator = torch.Generator().manual_seed(0)
    cotangents = {}
    for name, tensor in _named(output):
        noise = torch.randn(tensor.shape, generator=generator) * _visible(name, mask)
        if everything or name in ("last_hidden_state", "pooler_output"):
            cotangents[name] = noise.to(dtype).to(tensor)
    return cotangents


def _backward(output: Any, cotangents: dict[str, Tensor]) -> None:
    """Backward through every output that has a graph. One that lost it shows in the gradients."""
    roots = [(name, out) for name, out in _named(output) if name in cotangents and out.requires_grad]
    torch.autograd.backward([out for _, out in roots], [cotangents[name] for name, _ in roots])


def _gradients(model: PreTrainedModel, trio: _Trio, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every parameter's gradient, float64 on the CPU. The model is in train mode only meanwhile."""
    model.train()
    model.zero_grad(set_to_none=True)
    output = _run(model, trio.batch)
    _backward(output, _cotangents(output, trio.compared, dtype))
    gradients = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    model.eval()
    return gradients


def _time(trio: _Trio, train: bool, repeats: int) -> list[Timing]:
    """Forward, and with `train` forward and backward, each without and with hidden states and attentions."""
    hf, fused, mask = trio.hf, trio.fused, trio.batch.mask
    sdpa = copy.deepcopy(hf)
    sdpa.set_attn_implementation("sdpa")
    batch = replace(trio.batch, inputs={name: t.to(hf.device) for name, t in trio.batch.inputs.items()})

    def forward(model: PreTrainedModel, everything: bool) -> None:
        with torch.no_grad():
            _run(model, batch, everything)

    def step(model: PreTrainedModel, everything: bool) -> None:
        _backward(_run(model, batch, everything), cotangents[everything])
        model.zero_grad(set_to_none=True)

    def turn(what: str, work: Callable[[PreTrainedModel, bool], None]) -> list[Timing]:
        few = _medians(what, work, {"fastbert": fused, "hf_eager": hf, "hf_sdpa": sdpa}, False, repeats)
        # sdpa has no attentions to give.
        every = _medians(f"{what}, all outputs", work, {"fastbert": fused, "hf_eager": hf}, True, repeats)
        return [few, every]

    timings = turn("forward", forward)
    if not train:
        return timings
    with torch.no_grad():
        output = _run(hf, batch)
    cotangents = {every: _cotangents(output, mask, hf.dtype, every) for every in (False, True)}
    for model in (hf, fused, sdpa):
        model.train()
    timings += turn("forward+backward", step)
    for model in (hf, fused, sdpa):
        model.eval()
    return timings


def _medians(
    what: str,
    work: Callable[[PreTrainedModel, bool], None],
    models: dict[str, PreTrainedModel],
    everything: bool,
    repeats: int,
) -> Timing:
    """Median seconds of `work` per model, the models taking turns so that a busy machine slows all alike."""
    runs = {name: partial(work, model, everything) for name, model in models.items()}
    for run in runs.values():
        run()
    times = interleaved(runs, models["hf_eager"].device, seconds=0.0, rounds=(repeats, repeats))
    medians = {name: taken.median for name, taken in times.items()}
    return Timing(what, medians["fastbert"], medians["hf_eager"], medians.get("hf_sdpa"))


def _provenance(model: str, trio: _Trio, ran: str) -> dict[str, Any]:
    batch, hf = trio.batch, trio.hf
    rows, seq = batch.mask.shape
    tokens = int(batch.mask.sum())
    return {
        "model": model,
        "layers": hf.config.num_hidden_layers,
        "heads": hf.config.num_attention_heads,
        "hidden_size": hf.config.hidden_size,
        "device": device_name(hf.device),
        "device_type": hf.device.type,
        "threads": torch.get_num_threads(),
        "dtype": str(hf.dtype).removeprefix("torch."),
        "backend": ran,
        "versions": versions(),
        "sentences": rows,
        "seq": seq,
        "tokens": tokens,
        "fill": tokens / (rows * seq),
        "truncated": batch.truncated,
    }

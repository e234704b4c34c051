"""The contenders: fastbert, and what a user would pick instead of it."""

import contextlib
import copy
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.fusing import fuse
from fastbert.graphs.buckets import TOKENS
from fastbert.graphs.inference import graphed

from .workloads import Task

#: A contender that runs: called as a Hugging Face model is.
Model = Callable[..., Any]

#: Buckets of CUDA graphs, and how many sequences the largest has room for: as who has large batches would set them.
BUCKETS = (*TOKENS, 6144, 8192, 12288, 16384, 24576, 32768)
MAX_SEQUENCES = 256

#: More than a run compiles.
RECOMPILE_LIMIT = 1000

#: Runtimes of ONNX graphs, and what each needs.
_ONNX_RUNTIMES = {
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino", "onnx", "onnxscript"),
}

#: Hugging Face's own attentions, by contender.
_ATTENTIONS = {"sdpa": "sdpa", "flash": "flash_attention_2", "flex": "flex_attention"}

#: What each name stands for. "fastbert" drops padding (`packing=True`), as people choose who read tokens only; as it
#: comes (`packing="auto"`) it drops padding where nobody reads its rows, so a bare encoder keeps it.
CONTENDERS = {
    "fastbert": "fastbert",
    "fastbert-auto": "fastbert as it comes",
    "eager": "HF eager",
    "sdpa": "HF sdpa",
    "flash": "HF flash_attention_2",
    "flex": "HF flex_attention",
    "compile": "torch.compile",
    "compile-graphs": "torch.compile in CUDA graphs",
    "compile-max": "torch.compile max-autotune",
    "compile-freezing": "torch.compile freezing",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "fastbert-graphed": "fastbert in CUDA graphs",
}


def named(names: Sequence[str]) -> list[str]:
    """These names, checked; ValueError for an unknown one, which lists the known."""
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        raise ValueError(f"unknown peer {', '.join(map(repr, unknown))}: choose from {', '.join(CONTENDERS)}")
    return list(dict.fromkeys(names))


def missing(name: str, *, task: Task, attentions: bool, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a contender cannot take part, for people; None when it can.

    Args:
        name: a key of `CONTENDERS`.
        task: what it would do.
        attentions: whether attention maps are wanted.
        dtype: the working dtype.
        device: where it would run.
    """
    if attentions and name in _ATTENTIONS:
        return "returns no attention maps"
    if name == "fastbert-graphed":
        if device.type != "cuda":
            return "needs a GPU"
        if attentions:
            return "replays no attention maps"
        if task == "backward":
            return "replays whole training steps only"
    if name in ("flex", "compile-graphs") and device.type != "cuda":
        return "needs a GPU"
    if name == "flex" and task != "forward":
        return "trains without dropout only"
    if name == "flash":
        if device.type != "cuda":
            return "needs a GPU"
        if importlib.util.find_spec("flash_attn") is None:
            return "flash-attn is not installed"
        if dtype == torch.float32:
            return "takes no float32"
    if name == "compile-freezing" and task != "forward":
        return "does not train"
    if name in _ONNX_RUNTIMES:
        absent = [package for package in _ONNX_RUNTIMES[name] if not importlib.util.find_spec(package)]
        if absent:
            return f"{', '.join(absent)} not installed: pip install {' '.join(absent)}"
        if device.type != "cpu":
            return "compared on a CPU only"
        if task != "forward":
            return "does not train"
        if dtype != torch.float32:
            return "compared in float32 only"
    return None


def build(
    name: str, source: nn.Module, *, attentions: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Model, nn.Module]:
    """A contender with its own copy of the source's weights.

    Args:
        name: a key of `CONTENDERS` that is not `missing`.
        source: a Hugging Face BERT, with or without a head, whose attention is eager.
        attentions: whether it will be asked for attention maps.
        dtype: of its weights.
        device: where it runs.

    Returns:
        What to call, and the module that holds the parameters (the source's copy, in eval mode).
    """
    module: Any = copy.deepcopy(source).to(device=device, dtype=dtype).eval()
    if name in _ONNX_RUNTIMES:
        return _onnx(name, module, attentions), module
    if name == "fastbert":
        return fuse(module, packing=True), module
    if name == "fastbert-auto":
        return fuse(module), module
    if name == "fastbert-graphed":
        return graphed(fuse(module, packing=True), BUCKETS, MAX_SEQUENCES), module
    if name != "eager" and not attentions:  # only eager attention returns its maps
        module.set_attn_implementation(_ATTENTIONS.get(name, "sdpa"))
    if name.startswith("compile"):
        # One function of torch's counts the models compiled in a run; over its limit the rest would run as they are.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    if name == "compile":
        return torch.compile(module, dynamic=False), module
    if name == "compile-graphs":
        return torch.compile(module, dynamic=False, mode="reduce-overhead"), module
    if name == "compile-max":
        return torch.compile(module, dynamic=False, mode="max-autotune"), module
    if name == "compile-freezing":  # weights become constants, which are laid out for the products once
        return torch.compile(module, dynamic=False, options={"freezing": True}), module
    return module, module


def _onnx(name: str, module: Any, attentions: bool) -> Model:
    """A runtime of ONNX graphs on as many threads as torch has, for any batch and length."""
    module.config.output_attentions = attentions
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    example = {"input_ids": mask.clone(), "attention_mask": mask}
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")}
    with tempfile.TemporaryDirectory() as folder, _silent():
        path = Path(folder) / "model.onnx"
        program: Any = torch.onnx.export(
            module,
            (),
            kwargs=example,
            dynamic_shapes=dict.fromkeys(example, axes),
            dynamo=True,
            verbose=False,
        )
        program.save(path)
        run = _onnxruntime(path) if name == "onnxruntime" else _openvino(path)

    def call(*, output_attentions: bool = False, **batch: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(o) for o in run({name: t.numpy() for name, t in batch.items()}))

    return call


def _onnxruntime(path: Path) -> Callable[[dict[str, Any]], Iterable[Any]]:
    """Arrays by the name of their input to the outputs, by ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # into the next contender's turn
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda arrays: session.run(None, arrays)


def _openvino(path: Path) -> Callable[[dict[str, Any]], Iterable[Any]]:
    """The same by OpenVINO."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # or it computes in bfloat16 where the processor can
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    return lambda arrays: request.infer(arrays).to_tuple()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The exporter prints and logs what it does; errors are raised all the same."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

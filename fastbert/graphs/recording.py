"""What records, what recordings rely on, and what every model that is replayed from them has."""

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from fastbert.batch.layout import Layout
from fastbert.families import MODELS
from fastbert.fusing import explain
from fastbert.modules.attention import FusedSelfAttention
from fastbert.modules.look import forget
from fastbert.modules.model import EncoderModel
from fastbert.modules.swap import is_decoder
from fastbert.notices import warn_once
from fastbert_kernels.backend import allows_tf32, check_mode, get_backend, why_no_kernels

from .buckets import Arrays, make_buckets

Work = Callable[[], torch.Tensor]


class Recorder(Protocol):
    """What records a function of no arguments that reads and writes tensors at fixed places."""

    device: torch.device

    def record(self, run: Work) -> Work:
        """A function that does again what `run` does, and returns the tensor that holds the result until any recording
        of this recorder is replayed. Recording itself does nothing of it; `run` was called before, so that all is
        compiled and made that lasts."""

    def follow(self) -> None:
        """Let what the caller does next wait for what callers of replays did before, on whatever stream."""

    def forget(self) -> None:
        """Wait for the replays under way, and let go of the memory of all recordings: none will be replayed again."""


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory, so that only one of them may be under way.

    Raises:
        RuntimeError: for a device that is no GPU.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise RuntimeError(
                f"CUDA graphs need a GPU, and the model is on {device}: move it with model.to('cuda'), or call the "
                "model itself"
            )
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        # Of its own: cuBLAS keeps a workspace for each stream, and this one's is to lie in the pool.
        self._capturing = torch.cuda.Stream(device)
        self._latest: torch.cuda.Stream | None = None

    def record(self, run: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        mode = "thread_local"  # other threads may allocate meanwhile, as those of a server do
        with (
            torch.cuda.device(self.device),
            torch.cuda.graph(graph, pool=self._pool, stream=self._capturing, capture_error_mode=mode),
        ):
            output = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay

    def follow(self) -> None:
        current = torch.cuda.current_stream(self.device)
        if self._latest is not None and self._latest != current:
            current.wait_stream(self._latest)
        self._latest = current

    def forget(self) -> None:
        torch.cuda.synchronize(self.device)
        self._pool = torch.cuda.graph_pool_handle()  # torch refuses a pool whose graphs are all gone


class Watch:
    """What recordings of a model rely on, as it is when this is made.

    Args:
        bert: the model.
        modules: those that are recorded.
        called: those of them that are called within a recording.
    """

    def __init__(self, bert: EncoderModel, modules: list[nn.Module], called: list[nn.Module]) -> None:
        self._bert = bert
        self._modules = modules
        self._called = called
        self._parameters = [module._parameters for module in modules if module._parameters]
        self._attentions = [module for module in modules if isinstance(module, FusedSelfAttention)]
        self._then = self.addresses(), self.parts()

    def addresses(self) -> list[Any]:
        """Where lies what is read and written."""
        return [p.data_ptr() for own in self._parameters for p in own.values() if p is not None]

    def parts(self) -> list[Any]:
        """What a recording is made of besides."""
        return [
            self._bert.packing,
            allows_tf32(),  # float32 attention's products, and cuBLAS's
            [a.watcher for a in self._attentions],
            [(m.__class__, m.training, *m._modules.values()) for m in self._modules],
            [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__) for m in self._called],
        ]

    def moved(self) -> bool:
        """Whether a parameter lies elsewhere now. While none does, a replay reads no memory that is not the model's."""
        return self.addresses() != self._then[0]

    def changed(self) -> bool:
        """Whether a module was replaced, hooked, watched or put into another mode, or torch told of TF32."""
        return self.parts() != self._then[1]


def why_unrecordable(bert: EncoderModel, called: list[nn.Module]) -> str | None:
    """Why a model, as it is, cannot be recorded with these modules called within."""
    if bert.packing is False:
        return "its padding is kept (packing=False)"
    if any(m.watcher is not None for m in bert.modules() if isinstance(m, FusedSelfAttention)):
        return "distill.capture looks on"
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in called):
        return "modules in it have forward hooks, which a replay would not call"
    for part in explain(bert).parts:
        if part.reason is not None:  # what is called as a module may do something else next time
            where = part.name if part.layer is None else f"layer {part.layer} {part.name}"
            return f"not all of it is fused: {where}: {part.reason}"
    return None


def why_not_in_columns(bert: EncoderModel, layout: Layout) -> str | None:
    """Why a batch whose tokens have gaps before or between them cannot be replayed: a recording knows no columns."""
    if layout.columns is None or bert.score_bias is None:
        return None
    return "padding is not at the end of every row, and the bias of its scores counts columns"


def why_not_here(device: torch.device) -> str | None:
    """Why nothing can be replayed, or recorded, in the midst of what the caller does."""
    if device.type != "cuda":
        return None
    if torch.cuda.is_current_stream_capturing():
        return "the call is being captured"
    if check_mode():
        return "FASTBERT_CHECK=1 makes the GPU wait"
    if get_backend() == "torch":
        return "FASTBERT_BACKEND=torch makes the GPU wait"
    reason = why_no_kernels(device.index or 0)
    return None if reason is None else f"plain PyTorch makes the GPU wait: {reason}"


def find_bert(model: nn.Module) -> EncoderModel:
    """The fused encoder that is `model`, or that one of Hugging Face's heads holds.

    Raises:
        ValueError: when there is none.
    """
    bert = model if isinstance(model, MODELS) else getattr(model, "base_model", None)
    if not isinstance(model, PreTrainedModel) or not isinstance(bert, MODELS):
        raise ValueError(
            f"{type(model).__name__} is neither a BertModel nor one of Hugging Face's heads on one: pass the model "
            "inside of it"
        )
    if not isinstance(bert, EncoderModel) or is_decoder(bert):
        raise ValueError(f"{type(bert).__name__} is a decoder or not fused: pass an encoder to fastbert.fuse first")
    return bert


class Replayed:
    """A fused model, or its training step, replayed from recordings of it.

    Args:
        what: is replayed, in words.
        model: a fused encoder or a head on one.
        tokens, max_sequences: of the buckets.
        recorder: makes what records, on a device.
        token_labels, sequence_labels: what a batch has besides ids.

    Attributes:
        model: the model itself, to be called where nothing shall be replayed.
        buckets: smallest first.
        captures: how many recordings were made.
        replays: how many calls were replayed.
        plain: why others were not, and how many for each reason.
    """

    def __init__(
        self,
        what: str,
        model: nn.Module,
        tokens: Iterable[int],
        max_sequences: int,
        recorder: Callable[[torch.device], Recorder],
        token_labels: tuple[str, ...] = (),
        sequence_labels: tuple[str, ...] = (),
    ) -> None:
        bert = find_bert(model)
        self.model: Any = model
        self.buckets = make_buckets(tokens, max_sequences, bert.longest)
        self.captures = self.replays = 0
        self.plain: Counter[str] = Counter()
        self._what = what
        self._bert = bert
        self._labels = token_labels, sequence_labels
        self._make_recorder = recorder
        self._lock = threading.RLock()
        self._recorder = recorder(bert.device)
        self._looked: tuple[Watch, str | None] | None = None
        self._start()

    def _start(self) -> None:
        """Forget all recordings, and make what they share on the device where the model is now."""
        self._recorder.forget()  # waits for the recordings that are under way
        self._recordings: dict[Hashable, Work] = {}
        if self._recorder.device != self._bert.device:
            self._recorder = self._make_recorder(self._bert.device)
        self._recorder.follow()
        self._watch: Watch | None = None
        with torch.inference_mode(False):
            self._arrays = Arrays(self._bert, self.buckets, *self._labels)

    def _make_watch(self) -> Watch:
        raise NotImplementedError

    def _why_unrecordable(self) -> str | None:
        raise NotImplementedError

    def _settle(self) -> str | None:
        """Look at the whole model: say why it cannot be recorded, or forget recordings of what it no longer is."""
        if self._looked is None or self._looked[0].moved() or self._looked[0].changed():
            for module in self._bert.modules():  # not in a forward pass: nothing may move from here on
                forget(module)
            for module in self._bert.modules():
                if isinstance(module, FusedSelfAttention):
                    module.rehome()
            self._looked = self._make_watch(), self._why_unrecordable()
        watch, reason = self._looked
        if reason is None and not self._is_intact():
            self._start()
            self._watch = watch
        return reason

    def _is_intact(self) -> bool:
        """Whether what was recorded is as it was."""
        return self._watch is not None and not self._watch.moved() and not self._watch.changed()

    def _record(self, key: Hashable, run: Work) -> None:
        self._recordings[key] = self._recorder.record(run)
        self.captures += 1

    def _count_plain(self, reason: str) -> None:
        self.plain[reason] += 1
        warn_once(f"fastbert: {self._what} {type(self.model).__name__} is not replayed: {reason}")

    def _over(self) -> str:
        """The reason for a batch that fits no bucket."""
        most = self.buckets[-1]
        return (
            f"a batch is over the largest bucket of {most.tokens} tokens in {most.sequences} sequences of at most "
            f"{most.longest}"
        )

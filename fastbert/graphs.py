"""Inference in CUDA graphs: one recording for each bucket of tokens, replayed for every batch that fits it.

Both doors stay outside. A batch is checked and packed as always; its tokens are laid into arrays that never move,
padding tokens after them in sequences of their own, and empty sequences after those. Embeddings and layers are recorded
on these arrays, once a bucket, whatever the batch and its lengths. What comes out is unpacked into fresh memory, where
pooler and head run as always.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers.models.bert import modeling_bert as hf

from fastbert_kernels.backend import check_mode, get_backend

from .fusing import explain
from .modeling import BertModel, _Batch
from .modules import FusedSelfAttention
from .notices import warn_once
from .packing import Layout

#: Buckets by default: so close that a batch which is over one fills the next by two thirds.
TOKENS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)

#: A bucket has room for one sequence for so many tokens: each costs every attention launch programs that find it empty.
_TOKENS_OF_A_SEQUENCE = 16


@dataclass(frozen=True)
class Bucket:
    """What one recording takes.

    Attributes:
        tokens: in all sequences together.
        sequences: how many, empty ones included.
        longest: tokens of one.
    """

    tokens: int
    sequences: int
    longest: int

    @property
    def slots(self) -> int:
        """Sequences of the recording: those of a batch, and as many as padding alone would take."""
        return self.sequences + -(-self.tokens // self.longest)

    def bounds(self, device: torch.device) -> torch.Tensor:
        """Where sequences of padding end, wherever it starts: int32. After n tokens, those from n // longest on do."""
        ends = [min(end, self.tokens) for end in range(self.longest, self.tokens + self.longest, self.longest)]
        return torch.tensor(ends + [self.tokens] * self.slots, dtype=torch.int32, device=device)


def make_buckets(tokens: Iterable[int], max_sequences: int, longest: int) -> list[Bucket]:
    """The buckets of so many tokens, smallest first; the largest has room for all of `max_sequences`.

    Raises:
        ValueError: for no bucket, or a number under 1.
    """
    sizes = sorted(set(tokens))
    if not sizes or sizes[0] < 1 or max_sequences < 1:
        raise ValueError(f"buckets need tokens and max_sequences of at least 1, got {sizes} and {max_sequences}")
    rooms = [min(max_sequences, max(1, size // _TOKENS_OF_A_SEQUENCE)) for size in sizes[:-1]]
    return [Bucket(t, room, min(t, longest)) for t, room in zip(sizes, [*rooms, max_sequences], strict=True)]


def choose_bucket(buckets: list[Bucket], tokens: int, sequences: int, longest: int) -> Bucket | None:
    """The smallest bucket with room for so many tokens in so many sequences, None where there is none."""
    fits = (b for b in buckets if tokens <= b.tokens and sequences <= b.sequences and longest <= b.longest)
    return next(fits, None)


class Recorder(Protocol):
    """What records a function of no arguments that reads and writes tensors at fixed places."""

    device: torch.device

    def record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """A function that does again what `run` did, and returns the tensor that holds the result until any recording
        of this recorder is replayed."""

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
        self._capturing = torch.cuda.Stream(device)
        self._latest: torch.cuda.Stream | None = None

    def record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            # Compiles what has to be. Not on the capturing stream: cuBLAS keeps a workspace for each stream, and that
            # one's is to lie in the pool.
            run()
            # Other threads may allocate meanwhile, as those of a server do.
            mode = "thread_local"
            with torch.cuda.graph(graph, pool=self._pool, stream=self._capturing, capture_error_mode=mode):
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


def _inner_modules(bert: BertModel) -> list[nn.Module]:
    """A model and the modules that run between its doors."""
    return [module for name, module in bert.named_modules() if not name.startswith("pooler")]


class _Watch:
    """What recordings of a model rely on, as it is when this is made."""

    def __init__(self, bert: BertModel) -> None:
        self._bert = bert
        self._modules = _inner_modules(bert)
        self._parameters = [module._parameters for module in self._modules if module._parameters]
        self._attentions = [module for module in self._modules if isinstance(module, FusedSelfAttention)]
        self._then = self._addresses(), self._parts()

    def _addresses(self) -> list[int]:
        return [p.data_ptr() for own in self._parameters for p in own.values() if p is not None]

    def _parts(self) -> list[Any]:
        return [
            self._bert.packing,
            [a.watcher for a in self._attentions],
            [(m.__class__, m.training, *m._modules.values()) for m in self._modules],
            [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__) for m in self._modules[1:]],
        ]

    def moved(self) -> bool:
        """Whether a parameter lies elsewhere now. While none does, a replay reads no memory that is not the model's."""
        return self._addresses() != self._then[0]

    def changed(self) -> bool:
        """Whether a module was replaced, hooked, watched or put into another mode."""
        return self._parts() != self._then[1]


def _why_unrecordable(bert: BertModel) -> str | None:
    """Why the layers of a model, as they are, cannot be recorded."""
    modules = _inner_modules(bert)
    if any(module.training for module in modules if not isinstance(module, nn.ModuleList)):
        return "the model is in training mode: call model.eval()"
    if not bert.packing:
        return "its padding is kept (packing=False)"
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in modules[1:]):
        return "modules in it have forward hooks, which a replay would not call"
    if any(m.watcher is not None for m in modules if isinstance(m, FusedSelfAttention)):
        return "distill.capture looks on"
    for part in explain(bert).parts:
        if part.reason is not None:  # what is called as a module may do something else next time
            where = part.name if part.layer is None else f"layer {part.layer} {part.name}"
            return f"not all of it is fused: {where}: {part.reason}"
    return None


class Graphed:
    """A fused model whose inference is replayed. `graphed` makes them.

    Attributes:
        model: the model itself, to be called where nothing shall be replayed.
        buckets: smallest first.
        captures: how many recordings were made.
        replays: how many calls were replayed.
        plain: why the other calls were not, and how many for each reason.
    """

    def __init__(
        self, model: nn.Module, tokens: Iterable[int], max_sequences: int, recorder: Callable[[torch.device], Recorder]
    ) -> None:
        bert = model if isinstance(model, hf.BertModel) else getattr(model, "bert", None)
        if not isinstance(model, hf.BertPreTrainedModel) or not isinstance(bert, hf.BertModel):
            raise ValueError(
                f"{type(model).__name__} is neither a BertModel nor one of Hugging Face's heads on one: pass the model "
                "inside of it"
            )
        if not isinstance(bert, BertModel) or bert.config.is_decoder:
            raise ValueError(f"{type(bert).__name__} is a decoder or not fused: pass an encoder to fastbert.fuse first")
        self.model = model
        self.buckets = make_buckets(tokens, max_sequences, bert.config.max_position_embeddings)
        self.captures = self.replays = 0
        self.plain: Counter[str] = Counter()
        self._bert = bert
        self._make_recorder = recorder
        self._lock = threading.RLock()
        self._recorder = recorder(bert.device)
        self._looked: tuple[_Watch, str | None] | None = None
        self._reached = False
        self._start()

    def _start(self) -> None:
        """Forget all recordings, and make what they share on the device where the model is now."""
        largest, device = self.buckets[-1], self._bert.device
        self._recorder.forget()  # waits for the recordings that are under way
        self._recordings: dict[Bucket, Callable[[], torch.Tensor]] = {}
        if self._recorder.device != device:
            self._recorder = self._make_recorder(device)
        self._recorder.follow()
        with torch.inference_mode(False):
            self._watch: _Watch | None = None
            self._ids = torch.zeros(3 * largest.tokens, dtype=torch.int64, device=device)
            self._zeros = torch.zeros(largest.tokens, dtype=torch.int64, device=device)
            self._bounds = {bucket: bucket.bounds(device) for bucket in self.buckets}
            slots = max(bucket.slots for bucket in self.buckets)
            self._cu_seqlens = torch.zeros(slots + 1, dtype=torch.int32, device=device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own call, with its arguments, outputs and errors."""
        if not isinstance(self._bert, BertModel):
            self._go_plain("the model is no longer fused")
            return self.model(*args, **kwargs)
        output = self.model(*args, graphs=self, **kwargs)
        if not self._reached:
            raise RuntimeError(
                f"{type(self.model).__name__} does not pass its keywords on to its bert, or is compiled: call it itself"
            )
        return output

    def warm_up(self, progress: bool = False) -> "Graphed":
        """Record every bucket that is not recorded yet, largest first, so that the others fit into its memory.

        Args:
            progress: draw a bar.

        Raises:
            RuntimeError: when the model cannot be recorded as it is; the message says why.
        """
        from rich.progress import track

        with self._lock, torch.no_grad():
            self._recorder.follow()
            reason = self._settle() or self._why_not_here()
            if reason is not None:
                raise RuntimeError(f"nothing can be recorded: {reason}")
            empty = Layout(0, 1, self._zeros[:0], self._cu_seqlens.new_zeros(1), 1, None)
            none = {"input_ids": self._zeros[:0], "position_ids": self._zeros[:0], "token_type_ids": None}
            for bucket in track(self.buckets[::-1], "Recording", disable=not progress):
                if bucket not in self._recordings:
                    self._fill(bucket, none, empty)
                    self._record(bucket)
        return self

    def encode(
        self,
        bert: BertModel,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        asked: dict[str, Any],
    ) -> tuple[_Batch | None, torch.Tensor | None]:
        """`BertModel.forward` up to its last hidden state.

        Args:
            bert: the model called.
            input_ids, attention_mask, token_type_ids, position_ids: of that call.
            asked: its other arguments by name. One that is not None is not for a replay.

        Returns:
            The batch, if it was checked, and `last_hidden_state` (batch, seq, hidden), if a replay gave it.
        """
        self._reached = True
        named = [name for name, value in asked.items() if value is not None]
        reason = self._why_not_here()
        if named:
            reason = f"the call has {', '.join(named)}"
        elif attention_mask is not None and attention_mask.dim() != 2:
            reason = "attention_mask has more than two dimensions"
        elif bert is not self._bert:
            reason = "its bert was replaced"
        if reason is not None:
            return self._go_plain(reason)
        batch = bert._check_in(input_ids, attention_mask, token_type_ids, position_ids, None, None, {}, 0, packs=True)
        layout = batch.layout
        count = layout.batch * layout.seq if layout.indices is None else layout.indices.shape[0]
        bucket = choose_bucket(self.buckets, count, layout.batch, layout.max_seqlen)
        with self._lock:
            self._recorder.follow()
            hidden = None
            in_place = self._watch is not None and not self._watch.moved()
            if in_place and bucket in self._recordings:
                self._fill(bucket, batch.embeddings, layout)
                hidden = self._recordings[bucket]()
            # The rest can be looked at while the GPU works: at worst the result is thrown away.
            if not in_place or self._watch is None or self._watch.changed():
                hidden = None
                reason = self._settle()
                if reason is not None:
                    return self._go_plain(reason)
            if bucket is None:
                most = self.buckets[-1]
                self._go_plain(
                    f"a batch is over the largest bucket of {most.tokens} tokens in {most.sequences} sequences of at "
                    f"most {most.longest}"
                )
                return batch, None
            if hidden is None:
                self._fill(bucket, batch.embeddings, layout)
                if bucket not in self._recordings:
                    self._record(bucket)
                hidden = self._recordings[bucket]()
            self.replays += 1
            tokens = hidden[:, :count]
            if layout.indices is None:
                return batch, tokens.reshape(layout.batch, layout.seq, -1).clone()
            return batch, layout.unpack(tokens)

    def _go_plain(self, reason: str) -> tuple[None, None]:
        self.plain[reason] += 1
        warn_once(f"fastbert: a call of a graphed {type(self.model).__name__} is not replayed: {reason}")
        return None, None

    def _why_not_here(self) -> str | None:
        """Why nothing can be replayed, or recorded, in the midst of what the caller does."""
        if torch.is_grad_enabled():
            return "gradients are on: call it under torch.inference_mode()"
        if torch.is_autocast_enabled(self._zeros.device.type):
            return "autocast is on: cast the model"
        if self._zeros.device.type != "cuda":
            return None
        if torch.cuda.is_current_stream_capturing():
            return "the call is being captured"
        if check_mode():
            return "FASTBERT_CHECK=1 makes the GPU wait"
        return "FASTBERT_BACKEND=torch makes the GPU wait" if get_backend() == "torch" else None

    def _settle(self) -> str | None:
        """Look at the whole model: say why it cannot be recorded, or forget recordings of what it no longer is."""
        if self._looked is None or self._looked[0].moved() or self._looked[0].changed():
            for module in self._bert.modules():  # not in a forward pass: nothing may move from here on
                if isinstance(module, FusedSelfAttention):
                    module.rehome()
            self._looked = _Watch(self._bert), _why_unrecordable(self._bert)
        watch, reason = self._looked
        if reason is None and (self._watch is None or self._watch.moved() or self._watch.changed()):
            self._start()
            self._watch = watch
        return reason

    def _fill(self, bucket: Bucket, embeddings: dict[str, torch.Tensor | None], layout: Layout) -> None:
        """Lay a batch into the arrays: every element that the bucket's recording reads is written."""
        words = embeddings["input_ids"].reshape(-1)  # type: ignore[union-attr]
        positions, types = embeddings["position_ids"], embeddings["token_type_ids"]
        count = words.shape[0]
        if positions is None:
            positions = self._bert.embeddings.position_ids[:, : layout.seq].expand(layout.batch, layout.seq)
        types = self._zeros[:count] if types is None else types.reshape(-1)
        rest = self._zeros[: bucket.tokens - count]
        torch.cat([words, rest, positions.reshape(-1), rest, types, rest], out=self._ids[: 3 * bucket.tokens])
        cu_seqlens = layout.cu_seqlens
        if cu_seqlens is None:
            cu_seqlens = torch.arange(0, count + 1, layout.seq, dtype=torch.int32, device=words.device)
        padding = self._bounds[bucket][count // bucket.longest :][: bucket.slots - layout.batch]
        torch.cat([cu_seqlens, padding], out=self._cu_seqlens[: bucket.slots + 1])

    def _record(self, bucket: Bucket) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._recordings[bucket] = self._recorder.record(lambda: self._forward(bucket))
        self.captures += 1

    def _forward(self, bucket: Bucket) -> torch.Tensor:
        """Embeddings and layers on the arrays: (1, tokens, hidden)."""
        words, positions, types = self._ids[: 3 * bucket.tokens].view(3, 1, bucket.tokens)
        cu_seqlens = self._cu_seqlens[: bucket.slots + 1]
        encoder = self._bert.encoder
        return encoder(
            self._bert.embeddings(input_ids=words, token_type_ids=types, position_ids=positions),
            None,
            head_masks=[None] * len(encoder.layer),
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=bucket.longest,
            max_length_k=bucket.longest,
        ).last_hidden_state


def graphed(model: nn.Module, tokens: Iterable[int] = TOKENS, max_sequences: int = 64) -> Graphed:
    """A model whose inference is replayed from CUDA graphs, for batches so small that launching them takes longer than
    running them.

    It is called as the model is and returns what the model returns, in memory of its own. A bucket of tokens is
    recorded at the first call that needs it, or by `warm_up()`, and serves every batch with no more real tokens than
    that, whatever its shape. Values that change in place, as by an optimizer or `load_state_dict`, are seen; after
    anything else that changes the model, its buckets are recorded again. Settings of torch, such as the precision of
    float32 products, count when a bucket is recorded.

    Results are the same bits as the model's own on the tokens of the whole bucket, padding in sequences of its own. On
    a batch that does not fill its bucket the model's own matrix products have fewer rows; cuBLAS may then choose
    another kernel for them, and results agree within rounding.

    The model's own path is taken, and the reason logged once and counted in `plain`, where gradients or autocast are
    on, in training mode, for a batch over the largest bucket, for anything asked for but `last_hidden_state`, pooler
    and head, for masks of more than two dimensions, `inputs_embeds`, `head_mask`, `past_key_values` and batches that
    the caller packed, and while not every part is fused or a module inside is hooked.

    Args:
        model: a fused `BertModel`, or one of Hugging Face's heads on one, on a GPU.
        tokens: the buckets.
        max_sequences: that the largest bucket has room for; a smaller one has room for one in 16 tokens.

    Raises:
        RuntimeError: for a model that is not on a GPU.
        ValueError: for a model that is not fused or holds no `BertModel` in `bert`, and for no buckets.
    """
    return Graphed(model, tokens, max_sequences, CudaRecorder)

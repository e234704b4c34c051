"""Inference in CUDA graphs, replayed for every batch that fits a bucket.

Packing and unpacking stay outside. A batch is checked and packed as always, and laid into arrays that never move.
Embeddings and layers are recorded on these arrays, once a bucket, whatever the batch and its lengths. What comes out is
unpacked into fresh memory, where pooler and head run as always.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fastbert.batch.attend import Attend
from fastbert.batch.batch import Batch, Inputs
from fastbert.modules.call import Outputs, Plan
from fastbert.modules.model import EncoderModel

from .buckets import TOKENS, Bucket, choose_bucket
from .recording import CudaRecorder, Recorder, Replayed, Watch, why_not_here, why_not_in_columns, why_unrecordable


def _inner_modules(bert: EncoderModel) -> list[nn.Module]:
    """A model and the modules that run between packing and unpacking."""
    return [module for name, module in bert.named_modules() if not name.startswith("pooler")]


class Graphed(Replayed):
    """A fused model whose inference is replayed. `graphed` makes them."""

    def __init__(
        self, model: nn.Module, tokens: Iterable[int], max_sequences: int, recorder: Callable[[torch.device], Recorder]
    ) -> None:
        super().__init__("a call of a graphed", model, tokens, max_sequences, recorder)
        self._reached = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own call, with its arguments, outputs and errors."""
        if not isinstance(self._bert, EncoderModel):
            self._count_plain("the model is no longer fused")
            return self.model(*args, **kwargs)
        output = self.model(*args, plan=Plan(replay=self), **kwargs)
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
            for bucket in track(self.buckets[::-1], "Recording", disable=not progress):
                if bucket not in self._recordings:
                    self._arrays.clear(bucket)
                    self._record_bucket(bucket)
        return self

    def takes(self, model: EncoderModel, inputs: Inputs, outputs: Outputs) -> bool:
        """Whether a call may be replayed, as far as one sees before its batch is checked; if not, it is counted."""
        self._reached = True
        if torch.compiler.is_compiling():
            return False
        asked = {name: getattr(inputs, name) for name in ("inputs_embeds", "head_mask", "cache")}
        asked |= {"output_attentions": outputs.wants_maps or None, "output_hidden_states": outputs.wants_states or None}
        named = [name for name, value in (asked | dict(inputs.packed)).items() if value is not None]
        reason = self._why_not_here()
        if named:
            reason = f"the call has {', '.join(named)}"
        elif inputs.attention_mask is not None and inputs.attention_mask.dim() != 2:
            reason = "attention_mask has more than two dimensions"
        elif model is not self._bert:
            reason = "its bert was replaced"
        if reason is not None:
            self._count_plain(reason)
        return reason is None

    def refuse(self, reason: str) -> None:
        """Count a call that is not replayed; what keeps the model from being recorded at all goes before the reason."""
        self._reached = True
        with self._lock:
            self._count_plain(self._settle() or reason)

    def replay(self, batch: Batch) -> torch.Tensor | None:
        """`last_hidden_state` (batch, seq, hidden) of a packed batch; None, and counted, where nothing is replayed."""
        if batch.bias is not None:
            self.refuse("its padding is kept: fuse(model, packing=True) drops it")
            return None
        layout = batch.layout
        reason = why_not_in_columns(self._bert, layout)
        if reason is not None:
            self.refuse(reason)
            return None
        bucket = choose_bucket(self.buckets, layout.tokens, layout.batch, layout.max_seqlen)
        with self._lock:
            self._recorder.follow()
            hidden = None
            in_place = self._watch is not None and not self._watch.moved()
            if in_place and bucket is not None and bucket in self._recordings:
                self._arrays.fill(bucket, batch.embeddings, layout)
                hidden = self._recordings[bucket]()
            # The rest can be looked at while the GPU works: at worst the result is thrown away.
            if not in_place or self._watch is None or self._watch.changed():
                hidden = None
                reason = self._settle()
                if reason is not None:
                    self._count_plain(reason)
                    return None
            if bucket is None:
                self._count_plain(self._over())
                return None
            if hidden is None:
                self._arrays.fill(bucket, batch.embeddings, layout)
                if bucket not in self._recordings:
                    self._record_bucket(bucket)
                hidden = self._recordings[bucket]()
            self.replays += 1
            tokens = hidden[:, : layout.tokens]
            if layout.indices is None:
                return tokens.reshape(layout.batch, layout.seq, -1).clone()
            return layout.unpack(tokens)

    def _why_not_here(self) -> str | None:
        if torch.is_grad_enabled():
            return "gradients are on: call it under torch.inference_mode()"
        if torch.is_autocast_enabled(self._arrays.device.type):
            return "autocast is on: cast the model"
        return why_not_here(self._arrays.device)

    def _make_watch(self) -> Watch:
        modules = _inner_modules(self._bert)
        return Watch(self._bert, modules, modules[1:])

    def _why_unrecordable(self) -> str | None:
        modules = _inner_modules(self._bert)
        if any(module.training for module in modules if not isinstance(module, nn.ModuleList)):
            return "the model is in training mode: call model.eval()"
        return why_unrecordable(self._bert, modules[1:])

    def _record_bucket(self, bucket: Bucket) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._forward(bucket)
            self._record(bucket, lambda: self._forward(bucket))

    def _forward(self, bucket: Bucket) -> torch.Tensor:
        """Embeddings and layers on the arrays: (1, tokens, hidden)."""
        ids, cu_seqlens = self._arrays.read(bucket)
        attend = Attend(cu_seqlens, bucket.longest)
        return self._bert.encoder(self._bert.embed(ids), None, attend=attend).last_hidden_state


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
    and head, for masks of more than two dimensions, `inputs_embeds`, `head_mask`, a cache, batches that the caller
    packed or whose padding is kept, MPNet's whose padding is not at the end, and while not every part is fused or a
    module inside is hooked.

    Args:
        model: a fused encoder, as `BertModel`, or one of Hugging Face's heads on one, on a GPU.
        tokens: the buckets.
        max_sequences: that the largest bucket has room for; a smaller one has room for one in 16 tokens.

    Raises:
        RuntimeError: for a model that is not on a GPU.
        ValueError: for a model that is not fused or is no head on a fused encoder, and for no buckets.
    """
    return Graphed(model, tokens, max_sequences, CudaRecorder)

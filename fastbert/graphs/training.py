"""Training steps in CUDA graphs, replayed for every batch that fits a bucket.

Packing stays outside: a batch is checked and packed as always, and laid into arrays that never move, labels too.
Recorded on these arrays are the forward pass of the head's own class with its loss, the backward pass, clipping and the
optimizer's step. Padding of a bucket has the label -100, so that a loss is the mean over the labels of the batch.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fastbert.batch.batch import UNLABELLED, Inputs, Padding, check_in
from fastbert.batch.layout import Layout
from fastbert.families import HEADS
from fastbert.modules.call import Plan
from fastbert.modules.model import EncoderModel
from fastbert_kernels.backend import check_same_device

from .buckets import TOKENS, Bucket, choose_bucket
from .recording import CudaRecorder, Recorder, Replayed, Watch, why_not_here, why_not_in_columns, why_unrecordable

#: What a step takes besides labels.
_IDS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")

_ITSELF = "call the model itself, then loss.backward() and optimizer.step()"


def _find_labels(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The labels that a head's loss needs.

    Raises:
        ValueError: for a model whose loss no step can be recorded of.
    """
    for head, ours in HEADS.items():
        labels = ours.token_labels, ours.sequence_labels
        if labels != ((), ()) and _has_forward_of(model, head):
            return labels
    known = ", ".join(head.__name__ for head, ours in HEADS.items() if ours.token_labels or ours.sequence_labels)
    raise ValueError(
        f"no step of {type(model).__name__} can be recorded, only of {known} with the forward of Hugging Face's class: "
        f"{_ITSELF}"
    )


def _has_forward_of(model: nn.Module, head: type[Any]) -> bool:
    return isinstance(model, head) and inspect.unwrap(type(model).forward) is inspect.unwrap(head.forward)


def _why_no_mean(model: Any) -> str | None:
    """Why a model's loss is not a mean over labels other than -100."""
    if not any(isinstance(model, head) and ours.loss_by_problem_type for head, ours in HEADS.items()):
        return None
    kind = model.config.problem_type
    if kind is None:
        kind = "regression" if model.num_labels == 1 else "single_label_classification"
    return None if kind == "single_label_classification" else f"its loss ({kind}) would count the padding of a bucket"


def _why_unrecordable_optimizer(optimizer: torch.optim.Optimizer) -> str | None:
    """Why an optimizer's step cannot be recorded."""
    name = type(optimizer).__name__
    if not (
        isinstance(optimizer, torch.optim.Optimizer) and type(optimizer).step.__module__.startswith("torch.optim.")
    ):
        return f"{name} is not one of torch's own optimizers"
    for group in optimizer.param_groups:
        option = next((option for option in ("capturable", "fused") if option in group), None)
        if option is None:
            return f"{name} makes the GPU wait: use an optimizer that is capturable, as torch.optim.AdamW can be"
        if not group[option]:
            return f"{name} makes the GPU wait unless it is made with {option}=True"
    step: Any = vars(optimizer).get("step")
    if step is not None and not hasattr(step, "_wrapped_by_lr_sched"):
        return f"the step of {name} was replaced"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return f"{name} has hooks, which a replay would not call"
    return None


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


class _StepWatch(Watch):
    """What recordings of a training step rely on."""

    def __init__(self, bert: EncoderModel, model: Any, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        modules = list(model.modules())
        super().__init__(bert, modules, modules)

    def addresses(self) -> list[Any]:
        held = [*_parameters(self._optimizer), *(group["lr"] for group in self._optimizer.param_groups)]
        held += [value for state in self._optimizer.state.values() for value in state.values()]
        return [*super().addresses(), *(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in held)]

    def parts(self) -> list[Any]:
        optimizer = self._optimizer
        return [
            *super().parts(),
            [(m.__dict__.get("p"), m.__dict__.get("gradient_checkpointing")) for m in self._modules],
            [(len(m._backward_hooks), len(m._backward_pre_hooks), m._compiled_call_impl) for m in self._modules],
            [(p.requires_grad, _is_hooked(p)) for own in self._parameters for p in own.values() if p is not None],
            [[group.get(name) for name in optimizer.defaults if name != "lr"] for group in optimizer.param_groups],
            _why_unrecordable_optimizer(optimizer),
        ]


def _is_hooked(parameter: nn.Parameter) -> bool:
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


class GraphedStep(Replayed):
    """A training step that is replayed. `graphed_step` makes them.

    Attributes:
        optimizer: whose learning rates are tensors on the device.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        tokens: Iterable[int],
        max_sequences: int,
        max_grad_norm: float | None,
        recorder: Callable[[torch.device], Recorder],
    ) -> None:
        labels = _find_labels(model)
        reason = _why_no_mean(model) or _why_unrecordable_optimizer(optimizer)
        if reason is not None:
            raise ValueError(f"no step of {type(model).__name__} can be recorded: {reason}; or {_ITSELF}")
        if {id(p) for p in model.parameters()}.isdisjoint(id(p) for p in _parameters(optimizer)):
            raise ValueError(f"{type(optimizer).__name__} has no parameter of the model: make it of model.parameters()")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be over 0, or None for no clipping, got {max_grad_norm}")
        self.optimizer: Any = optimizer
        self._max_grad_norm = max_grad_norm
        self._rates: dict[int, torch.Tensor] = {}
        super().__init__("a step of a", model, tokens, max_sequences, recorder, *labels)
        with torch.inference_mode(False):
            self._hold_rates()
        self.optimizer._warned_capturable_if_run_uncaptured = True  # the first step of each bucket is

    def __call__(self, **batch: Any) -> torch.Tensor:
        """Train on a batch.

        Args:
            batch: the arguments of the model's own call, by name, int64 labels among them.

        Returns:
            The loss, a detached scalar.

        Raises:
            RuntimeError: in evaluation mode, and with gradients off.
            ValueError: for missing labels, gradients that are there already, and inputs that contradict each other.
        """
        batch.pop("return_dict", None)
        with self._lock:
            self._check(batch)
            self._recorder.follow()
            self._hold_rates()
            # Before the batch is looked at, which makes the CPU wait for the step before this one.
            reason = self._why_not(batch)
            if reason is None and not self._is_intact():
                reason = self._settle()
            if reason is not None:
                return self._go_plain(reason, batch)
            values, layout = self._pack(batch)
            bucket = choose_bucket(self.buckets, layout.tokens, layout.batch, layout.max_seqlen)
            if bucket is None:
                return self._go_plain(self._over(), batch)
            if layout.columns is not None and self._labels[1]:
                return self._go_plain("padding is not at the end of every row, whose first column is read", batch)
            reason = why_not_in_columns(self._bert, layout)
            if reason is not None:
                return self._go_plain(reason, batch)
            self._arrays.fill(bucket, values, layout)
            key = bucket, self._autocast_dtype()
            if key in self._recordings:
                self.replays += 1
                self.optimizer._opt_called = True  # what a scheduler looks at
                return self._recordings[key]().clone()
            loss = self._step(lambda: self._forward(bucket))
            if not self._recordings:
                self._watch = self._make_watch()  # the optimizer may have made its state just now
            self._record(key, lambda: self._step(lambda: self._forward(bucket)))
            return loss

    def _check(self, batch: dict[str, Any]) -> None:
        name = type(self.model).__name__
        if not self.model.training:
            raise RuntimeError(f"{name} is in evaluation mode: call model.train() before a step")
        if not torch.is_grad_enabled():
            raise RuntimeError("gradients are off: call a step outside of torch.no_grad() and torch.inference_mode()")
        for label in (*self._labels[0], *self._labels[1]):
            value = batch.get(label)
            if not isinstance(value, torch.Tensor) or value.dtype != torch.int64:
                got = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
                raise ValueError(f"a step of {name} needs {label}, an int64 tensor, got {got}")
        if any(p.grad is not None for p in _parameters(self.optimizer)):
            raise ValueError(
                "there are gradients already, which a step would discard: call optimizer.zero_grad() before; to "
                f"accumulate gradients, {_ITSELF}"
            )

    def _why_not(self, batch: dict[str, Any]) -> str | None:
        """Why this batch, or any here and now, cannot be replayed."""
        if not isinstance(self._bert, EncoderModel):
            return "the model is no longer fused"
        if self.model.base_model is not self._bert:
            return "its bert was replaced"
        config = self._bert.config
        asked = {"output_attentions": config.output_attentions, "output_hidden_states": config.output_hidden_states}
        taken = (*_IDS, *self._labels[0], *self._labels[1])
        asked = {name: value for name, value in (asked | batch).items() if name not in taken}
        named = [name for name, value in asked.items() if value is not None and value is not False]
        if named:
            return f"the call has {', '.join(named)}"
        if batch.get("attention_mask") is not None and batch["attention_mask"].dim() != 2:
            return "attention_mask has more than two dimensions"
        return why_not_here(self._bert.device)

    def _make_watch(self) -> Watch:
        return _StepWatch(self._bert, self.model, self.optimizer)

    def _why_unrecordable(self) -> str | None:
        modules: list[Any] = list(self.model.modules())
        if any(getattr(m, "gradient_checkpointing", False) for m in modules):
            return "gradient checkpointing is on"
        if any(m._compiled_call_impl is not None for m in modules):
            return "modules in it are compiled"
        if any(m._backward_hooks or m._backward_pre_hooks for m in modules) or any(
            _is_hooked(p) for p in self.model.parameters()
        ):
            return "modules or parameters in it have backward hooks, which a replay would not call"
        bias = self._bert.score_bias
        if bias is not None and any(p.requires_grad for p in bias.parameters()):
            (name,) = [name for name, module in self._bert.named_modules() if module is bias]
            return f"{name} is trained, in plain PyTorch, which makes the GPU wait: freeze it (requires_grad_(False))"
        return why_unrecordable(self._bert, modules) or _why_unrecordable_optimizer(self.optimizer)

    def _hold_rates(self) -> None:
        """Have every learning rate in a tensor on the device: a number in the place of one is written into it."""
        device = self._bert.device
        for i, group in enumerate(self.optimizer.param_groups):
            rate, held = group["lr"], self._rates.get(i)
            if isinstance(rate, torch.Tensor) and rate.device == device:
                held = rate
            elif held is None or held.device != device:
                held = torch.tensor(float(rate), device=device)
            else:
                held.fill_(float(rate))
            group["lr"] = self._rates[i] = held

    def _pack(self, batch: dict[str, Any]) -> tuple[dict[str, torch.Tensor | None], Layout]:
        """Check a batch, and bring its ids and labels into its layout."""
        token_labels, sequence_labels = self._labels
        words, mask, types, positions = map(batch.get, _IDS)
        inputs = Inputs(words, mask, types, positions)
        checked = check_in(inputs, self._bert.encoder_shape(), Padding(lambda mask: True))
        layout = checked.layout
        labels = {name: batch[name] for name in (*token_labels, *sequence_labels)}
        check_same_device("a step", input_ids=words, **labels)
        for name, value in labels.items():
            wanted = (layout.batch, layout.seq) if name in token_labels else (layout.batch,)
            if value.shape != wanted and (name in token_labels or value.shape != (layout.batch, 1)):
                raise ValueError(f"{name} must have shape {wanted} for this batch, got {tuple(value.shape)}")
            if name in token_labels:
                labels[name] = layout.pack(value)
        return checked.embeddings | labels, layout

    def _autocast_dtype(self) -> torch.dtype | None:
        """What autocast casts to where the step is called; None where it is off."""
        device = self._bert.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def _forward(self, bucket: Bucket) -> Any:
        """The model's own call on the arrays."""
        values, cu_seqlens = self._arrays.read(bucket)
        return self.model(
            **values,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=bucket.longest,
            max_length_k=bucket.longest,
            plan=Plan(pools_each=True),
            read_rows="all",  # how many are labelled depends on the batch
            return_dict=True,
        )

    def _step(self, forward: Callable[[], Any]) -> torch.Tensor:
        """A whole step on the output of a forward pass; its loss. There are no gradients before or after."""
        device, dtype = self._bert.device.type, self._autocast_dtype()
        try:
            # A cast weight that is kept would be the old one in the next step.
            with torch.autocast(device, dtype=dtype, enabled=dtype is not None, cache_enabled=False):
                loss = forward().loss
            with torch.autocast(device, enabled=False):
                loss.backward()
                if self._max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(self.model.parameters(), self._max_grad_norm)
                self.optimizer.step()
            return loss.detach()
        finally:
            self.model.zero_grad()
            self.optimizer.zero_grad()

    def _go_plain(self, reason: str, batch: dict[str, Any]) -> torch.Tensor:
        """The same step, not replayed."""
        self._count_plain(reason)
        mask = batch.get("attention_mask")
        for name in self._labels[0]:
            if mask is not None and mask.shape == batch[name].shape:
                batch[name] = batch[name].masked_fill(~mask.bool(), UNLABELLED)
        return self._step(lambda: self.model(**batch, return_dict=True))


def graphed_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokens: Iterable[int] = TOKENS,
    max_sequences: int = 64,
    max_grad_norm: float | None = None,
) -> GraphedStep:
    """A whole training step that is replayed from CUDA graphs, for batches so small that launching them takes longer
    than running them: `loss = step(input_ids=..., attention_mask=..., labels=...)`.

    A step is the model's forward pass with its loss, the backward pass, clipping, and `optimizer.step()`. There are no
    gradients before it and none after it. The first batch of a bucket of tokens takes its step as ever, then the step
    is recorded, and replayed for every batch with no more real tokens than that, whatever its shape. Each replay draws
    its own dropout from torch's generator. The losses and the parameters are those of training with the model itself,
    within rounding.

    Learning rates of the optimizer become float32 tensors on the device, which schedulers made before or after fill in
    place; a number put in the place of one is written into it. Each time another hyperparameter changes (`OneCycleLR`
    wants `cycle_momentum=False`), the optimizer's state is loaded, or the model changes otherwise than in its values,
    buckets are recorded again. A step under autocast is recorded for each dtype; its backward pass and the optimizer
    run outside of it.

    All rows are computed in a recording, whatever `skip_unread` says. Labels of tokens count where `attention_mask` is
    1 only.

    The same step is taken without a replay, and the reason logged once and counted in `plain`, for a batch over the
    largest bucket, for anything but ids, labels and masks of two dimensions, for classifiers of sequences, and for
    MPNet, where padding is not at the end, while MPNet's position bias is trained, with gradient checkpointing, and
    while not every part is fused or a module, a parameter or the optimizer is hooked. Gradient accumulation and
    `GradScaler` need steps of your own.

    Args:
        model: fused, one of Hugging Face's heads for masked language modelling, BERT's pretraining, next sentence
            prediction, and classification of tokens or, with one label each, of sequences. On a GPU, and in training
            mode when the step is called.
        optimizer: of torch's own, with `capturable=True`; SGD with `fused=True`.
        tokens: the buckets.
        max_sequences: that the largest bucket has room for; a smaller one has room for one in 16 tokens.
        max_grad_norm: clip the norm of all gradients of the model to this.

    Raises:
        RuntimeError: for a model that is not on a GPU.
        ValueError: for a model or an optimizer whose step cannot be recorded, and for no buckets.
    """
    return GraphedStep(model, optimizer, tokens, max_sequences, max_grad_norm, CudaRecorder)

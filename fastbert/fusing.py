"""`fuse`, `unfuse` and `explain`: the fast path for a model that exists already.

Classes are swapped on the instances of one model. Nothing global changes: another model of the same class stays as
it is.
"""

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.models.bert import modeling_bert as hf

from .heads import BertForMaskedLM, BertForPreTraining, FusedHead, FusedMaskedLM
from .modeling import BertModel
from .modules import FUSED, FusedLayer, FusedSelfAttention, fuse_modules
from .notices import warn_once
from .plain import as_if_gathered

Model = TypeVar("Model", bound=nn.Module)

_UNFUSED: dict[type[nn.Module], type[nn.Module]] = {fused: plain for plain, fused in FUSED.items()}
_UNFUSED[BertModel] = hf.BertModel

#: Where torch.compile and torch's checkpoint_wrapper keep the layer that they stand in front of.
_LAYER_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")

#: The parts of a layer that `explain` speaks of, by their path in it.
_PARTS = ("attention.self", "attention.output", "intermediate", "output")


def _refuse_sharded(model: nn.Module, verb: str) -> None:
    """FSDP2 has put classes of its own on the modules it shards: ours can neither replace them nor be replaced."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for name, module in model.named_modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}) is sharded by FSDP2 already: {verb} the model before "
                "fully_shard, or before accelerator.prepare"
            )


def _berts(model: nn.Module) -> list[hf.BertModel]:
    berts = [module for module in model.modules() if isinstance(module, hf.BertModel)]
    if not berts:
        raise ValueError(f"{type(model).__name__} holds no transformers.BertModel: fastbert fuses BERT encoders")
    return berts


def fuse(model: Model, packing: bool = True) -> Model:
    """Put every `BertModel` inside a model on the fast path, in place.

    Args:
        model: a `transformers.BertModel`, or anything that holds some: a head, a PEFT or sentence-transformers model.
        packing: drop padding inside, which then gives zeros; False keeps every row equal to eager attention.

    Returns:
        The same object.

    Raises:
        ValueError: when there is no `BertModel` inside, or FSDP2 has sharded a module already.
    """
    _refuse_sharded(model, "fuse")
    for bert in _berts(model):
        if bert.config.is_decoder:
            warn_once("fastbert: a decoder stays on Hugging Face's own path")
            continue
        if type(bert) not in (hf.BertModel, BertModel):
            warn_once(f"fastbert: {type(bert).__name__} overrides BertModel and stays as it is")
            continue
        if type(bert) is hf.BertModel:
            bert._unfused_attn_implementation = bert.config._attn_implementation
            bert.__class__ = BertModel
            _set_attn_implementation(model, bert, "eager")
        bert.packing = packing
        fuse_modules(bert)
    return model


def unfuse(model: Model) -> Model:
    """Undo `fuse`, in place: Hugging Face's classes again, every parameter in a storage of its own.

    Also takes fastbert's own classes back to Hugging Face's.

    Raises:
        ValueError: when there is no `BertModel` inside, or one whose class derives from fastbert's, or FSDP2 has
            sharded a module.
    """
    _refuse_sharded(model, "unfuse")
    berts = _berts(model)
    for module in model.modules():
        ours = (BertModel.__module__, FusedHead.__module__)
        if isinstance(module, BertModel | FusedHead) and type(module).__module__ not in ours:
            raise ValueError(
                f"{type(module).__name__} derives from fastbert's class: derive it from transformers' to unfuse"
            )
    for bert in berts:
        for module in bert.modules():
            if isinstance(module, FusedSelfAttention):
                module.separate()
            plain = _UNFUSED.get(type(module))
            if plain is not None:
                module.__class__ = plain
                module.__dict__.pop("dropout_stream", None)
                module.__dict__.pop("packing", None)
                module.__dict__.pop("read_rows", None)
        if "_unfused_attn_implementation" in bert.__dict__:
            _set_attn_implementation(model, bert, bert.__dict__.pop("_unfused_attn_implementation"))
    for module in model.modules():
        if isinstance(module, FusedHead):
            module.__dict__.pop("read_rows", None)
            module.__class__ = next(c for c in type(module).__mro__ if c.__module__ == hf.__name__)
    return model


#: Heads that read the pooled output only; and those whose loss reads labelled rows only, with fastbert's class of each.
_POOLED = (hf.BertForSequenceClassification, hf.BertForNextSentencePrediction, hf.BertForMultipleChoice)
_MASKED_LM = {hf.BertForMaskedLM: BertForMaskedLM, hf.BertForPreTraining: BertForPreTraining}


def skip_unread(model: Model, skip: bool = True) -> Model:
    """Let every fused head inside a model do without the rows that nothing reads, in place. Losses and gradients stay.

    - Sequence classification, next sentence prediction and multiple choice read the pooled output: the last layer
      computes the first position of each sequence only (`BertModel.read_rows = "first"`), unless hidden states or
      attentions are asked for.
    - Masked language modelling and pretraining compute, in training, the logits of labelled positions only
      (`read_rows = "labelled"`); the output's logits are then (labelled positions, vocabulary).

    Args:
        model: one of those heads, fused, or anything that holds some.
        skip: False to compute everything again.

    Returns:
        The same object.

    Raises:
        ValueError: when there is no such head inside, or its `BertModel` is not fused.
    """
    heads: list[Any] = [m for m in model.modules() if isinstance(m, (*_POOLED, *_MASKED_LM))]
    if not heads:
        raise ValueError(
            f"{type(model).__name__} holds no head that leaves rows unread: skip_unread knows "
            f"{', '.join(head.__name__ for head in (*_POOLED, *_MASKED_LM))}; a BertModel has read_rows"
        )
    for head in heads:
        if not isinstance(head.bert, BertModel) or head.bert.config.is_decoder:
            raise ValueError(f"the BertModel in {type(head).__name__} is not fused: call fastbert.fuse(model) first")
        if not isinstance(head, (*_POOLED, FusedMaskedLM)) and type(head) not in _MASKED_LM:
            raise ValueError(f"{type(head).__name__} derives from Hugging Face's class: derive it from fastbert's")
    for head in heads:
        if isinstance(head, _POOLED):
            head.bert.read_rows = "first" if skip else "all"
        else:
            head.__class__ = _MASKED_LM.get(type(head), type(head))
            head.read_rows = "labelled" if skip else "all"
    return model


def _set_attn_implementation(model: nn.Module, bert: hf.BertModel, name: str | None) -> None:
    """Name the attention in the model's configuration, which becomes its own: another model may share the old one."""
    old = bert.config
    new = copy.deepcopy(old)
    new._attn_implementation = name
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new


@dataclass(frozen=True)
class Part:
    """One part of a model and how it runs.

    Attributes:
        layer: the encoder layer, or None for the embeddings.
        name: its path in the layer.
        fused: whether it is on fastbert's path: a kernel on a GPU, the same op in plain PyTorch on a CPU.
        reason: why not, or what inside it is called as a module although it does.
        rows: "all", or "first" where it computes the first row of each sequence only.
    """

    layer: int | None
    name: str
    fused: bool
    reason: str | None
    rows: str = "all"


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; printable."""

    parts: tuple[Part, ...]

    @property
    def fused(self) -> bool:
        """Whether every part is on fastbert's path."""
        return all(part.fused for part in self.parts)

    def __rich__(self) -> Table | str:
        if self.fused and not any(part.reason for part in self.parts):
            layers = len({part.layer for part in self.parts if part.layer is not None})
            short = "; the last one computes first rows only" if any(p.rows == "first" for p in self.parts) else ""
            return f"every part is fused: embeddings and {layers} layers{short}"
        table = Table("layer", "part", "runs", "because")
        for part in self.parts:
            if not part.fused or part.reason:
                layer = "-" if part.layer is None else str(part.layer)
                table.add_row(layer, part.name, "fused" if part.fused else "unfused", part.reason or "")
        return table

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()


def _explain_part(layer: int | None, name: str, module: Any, context: str | None) -> Part:
    if context is not None:
        return Part(layer, name, False, context)
    if not hasattr(module, "unfused_reason"):
        return Part(layer, name, False, f"{type(module).__name__} is not Hugging Face's module or not yet fused")
    reason = module.unfused_reason()
    return Part(layer, name, reason is None, module.note() if reason is None else reason)


def _explain_bert(bert: hf.BertModel) -> Iterator[Part]:
    context = None
    if bert.config.is_decoder:
        context = "a decoder runs on Hugging Face's own path"
    elif not isinstance(bert, BertModel):
        context = f"{type(bert).__name__} is not fused: call fastbert.fuse(model)"
    yield _explain_part(None, "embeddings", bert.embeddings, context)
    for i, wrapped in enumerate(bert.encoder.layer):
        layer: Any = wrapped
        for wrapper in _LAYER_WRAPPERS:
            layer = getattr(layer, wrapper, layer)
        if context is None and not isinstance(layer, FusedLayer):
            yield Part(i, "layer", False, f"{type(layer).__name__} is not Hugging Face's BertLayer")
        else:
            last = context is None and i + 1 == len(bert.encoder.layer)
            rows = bert.read_rows if last and bert._last_layer_computes_all() is None else "all"
            for name in _PARTS:
                yield replace(_explain_part(i, name, layer.get_submodule(name), context), rows=rows)


def explain(model: nn.Module) -> Explanation:
    """Which parts of a model are on the fast path, and why the others are not.

    Args:
        model: a `BertModel`, or anything that holds some.

    Raises:
        ValueError: when there is no `BertModel` inside.
    """
    with as_if_gathered():
        return Explanation(tuple(part for bert in _berts(model) for part in _explain_bert(bert)))

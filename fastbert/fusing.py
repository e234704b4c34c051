"""`fuse`, `unfuse`, `skip_unread` and `explain`: the fast path for a model that exists already.

Classes are swapped on the instances of one model. Nothing global changes: another model of the same class stays as
it is.
"""

import copy
import gc
import sys
from typing import Any, TypeVar

from torch import nn

from . import families
from .modules.attention import FusedSelfAttention
from .modules.explaining import Explanation, describe_backend, explain_encoder
from .modules.heads import FusedHead, FusedMaskedLM
from .modules.model import EncoderModel
from .modules.packing import check_packing, describe_padding, masked_reader
from .modules.readable import as_if_gathered
from .modules.swap import FUSED, fuse_modules, hugging_face_class, is_decoder, is_ours
from .notices import logger, warn_once

Model = TypeVar("Model", bound=nn.Module)

#: What modules of ours keep on themselves while they are.
_ATTRIBUTES = ("dropout_stream", "packing", "reads", "read_rows", "_look", "_zero_types")


def _refuse_sharded(model: nn.Module, verb: str) -> None:
    """FSDP2 has put classes of its own on the modules it shards: ours can neither replace them nor be replaced."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for name, module in model.named_modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}) is sharded by FSDP2 already: {verb} the model before "
                "fully_shard, or before accelerator.prepare"
            )


def _check_model(model: object) -> None:
    """A folder's name, a class or a pipeline is no model, and would end in an AttributeError."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(
            f"a model is needed (a torch.nn.Module), got {what}: pass what from_pretrained returns, or a pipeline's "
            ".model"
        )


def _named_encoders(model: nn.Module) -> dict[str, Any]:
    encoders = {name: module for name, module in model.named_modules() if isinstance(module, families.MODELS)}
    if not encoders:
        known = ", ".join(f"{kind.__name__} ({name})" for name, kind in families.MODEL_TYPES.items())
        raise ValueError(f"{type(model).__name__} holds no encoder that fastbert fuses: it knows {known}")
    return encoders


def _encoders(model: nn.Module) -> list[Any]:
    return list(_named_encoders(model).values())


def _in_words(encoders: dict[str, Any]) -> tuple[str, ...]:
    """Encoders by their place in a model: what each is, and where."""
    return tuple(f"{type(encoder).__name__} in {name or 'itself'}" for name, encoder in encoders.items())


def fuse(model: Model, packing: bool | str = "auto") -> Model:
    """Put every encoder of a known family inside a model on the fast path, in place; the log says at level INFO which.

    Args:
        model: a `transformers.BertModel`, `RobertaModel` or another of `families.MODELS`, or anything that holds some:
            a head, a PEFT or sentence-transformers model.
        packing: "auto" drops padding inside where nobody reads its rows, so that what is handed out equals eager's;
            True drops it everywhere, and gives zeros there; False nowhere.

    Returns:
        The same object.

    Raises:
        TypeError: for what is no model.
        ValueError: for another `packing`; when there is no such encoder inside, or FSDP2 has sharded a module already.
    """
    check_packing(packing)
    _check_model(model)
    _refuse_sharded(model, "fuse")
    encoders = _named_encoders(model)
    for encoder in encoders.values():
        name = type(encoder).__name__
        if is_decoder(encoder):
            warn_once("fastbert: a decoder stays on Hugging Face's own path")
            continue
        fused = FUSED.get(type(encoder))
        if fused is None and not is_ours(encoder):
            warn_once(f"fastbert: {name} overrides {hugging_face_class(type(encoder)).__name__} and stays as it is")
            continue
        if fused is not None:
            encoder._unfused_attn_implementation = encoder.config._attn_implementation
            encoder.__class__ = fused
            _set_attn_implementation(model, encoder, "eager")
        encoder.packing = packing
        fuse_modules(encoder)
    for module in model.modules():
        _tell_readers(module)
    logger.info("fastbert: fuse found %s", ", ".join(_in_words(encoders)))
    return model


def _tell_readers(module: Any) -> None:
    """Let what calls a fused encoder tell it which rows it reads."""
    ours = families.HEADS.get(type(module))
    if ours is not None and is_ours(module.base_model):
        module.__class__ = ours
    encoder = masked_reader(module)
    if isinstance(encoder, EncoderModel):
        encoder.reads = "marked"


def unfuse(model: Model) -> Model:
    """Undo `fuse`, in place: Hugging Face's classes again, every parameter in a storage of its own.

    Also takes fastbert's own classes back to Hugging Face's.

    Raises:
        TypeError: for what is no model.
        ValueError: when there is no encoder of a known family inside, or one whose class derives from fastbert's, or
            FSDP2 has sharded a module.
    """
    _check_model(model)
    _refuse_sharded(model, "unfuse")
    encoders = _encoders(model)
    for module in model.modules():
        if isinstance(module, EncoderModel | FusedHead) and not is_ours(module):
            raise ValueError(
                f"{type(module).__name__} derives from fastbert's class: derive it from transformers' to unfuse"
            )
    for encoder in encoders:
        for module in encoder.modules():
            if is_ours(module):
                _put_back(module)
        if "_unfused_attn_implementation" in encoder.__dict__:
            _set_attn_implementation(model, encoder, encoder.__dict__.pop("_unfused_attn_implementation"))
    for module in model.modules():
        if isinstance(module, FusedHead):
            _put_back(module)
    return model


def _put_back(module: nn.Module) -> None:
    """Give a module of ours Hugging Face's class again."""
    if isinstance(module, FusedSelfAttention):
        module.separate()
    module.__class__ = hugging_face_class(type(module))
    for name in _ATTRIBUTES:
        module.__dict__.pop(name, None)


def skip_unread(model: Model, skip: bool = True) -> Model:
    """Let every fused head inside a model do without the rows that nothing reads, in place. Losses and gradients stay.

    - Sequence classification, next sentence prediction and multiple choice read the pooled output, or the first row:
      the last layer computes the first position of each sequence only (`BertModel.read_rows = "first"`), unless hidden
      states or attentions are asked for.
    - Masked language modelling and pretraining compute, in training, the logits of labelled positions only
      (`read_rows = "labelled"`); the output's logits are then (labelled positions, vocabulary).

    Args:
        model: one of those heads, fused, or anything that holds some.
        skip: False to compute everything again.

    Returns:
        The same object.

    Raises:
        TypeError: for what is no model.
        ValueError: when there is no such head inside, its encoder is not fused, or a head for masked language modelling
            derives from Hugging Face's class.
    """
    _check_model(model)
    heads: list[Any] = [
        m for m in model.modules() if isinstance(m, (*families.POOLED_HEADS, *families.MASKED_LM_HEADS))
    ]
    if not heads:
        known = ", ".join(head.__name__ for head in (*families.POOLED_HEADS, *families.MASKED_LM_HEADS))
        raise ValueError(
            f"{type(model).__name__} holds no head that leaves rows unread: skip_unread knows {known}; a BertModel "
            "has read_rows"
        )
    for head in heads:
        if not isinstance(head.base_model, EncoderModel) or is_decoder(head.base_model):
            name = hugging_face_class(type(head.base_model)).__name__
            raise ValueError(f"the {name} in {type(head).__name__} is not fused: call fastbert.fuse(model) first")
        pooled = isinstance(head, families.POOLED_HEADS)
        if not pooled and not isinstance(head, FusedMaskedLM) and type(head) not in FUSED:
            raise ValueError(f"{type(head).__name__} derives from Hugging Face's class: derive it from fastbert's")
    for head in heads:
        if isinstance(head, families.POOLED_HEADS):
            head.base_model.read_rows = "first" if skip else "all"
        else:
            head.__class__ = FUSED.get(type(head), type(head))
            head.read_rows = "labelled" if skip else "all"
    return model


def _set_attn_implementation(model: nn.Module, encoder: Any, name: str | None) -> None:
    """Name the attention in the encoder's configuration, for whatever follows it. Where another model shares it, which
    wants its own, the model's becomes a copy."""
    config = encoder.config
    if name != config._attn_implementation and _is_shared(config, model, encoder):
        new = copy.deepcopy(config)
        for module in model.modules():
            if getattr(module, "config", None) is config:
                module.config = new
        config = new
    config._attn_implementation = name


def _is_shared(config: Any, model: nn.Module, encoder: nn.Module) -> bool:
    """Whether a module has this configuration that is neither in the model nor around the encoder."""
    inside = {id(module) for module in model.modules()}
    states = (holder for holder in gc.get_referrers(config) if isinstance(holder, dict) and "_modules" in holder)
    holders = [owner for state in states for owner in gc.get_referrers(state) if getattr(owner, "__dict__", 0) is state]
    return any(id(owner) not in inside and all(part is not encoder for part in owner.modules()) for owner in holders)


def explain(model: nn.Module) -> Explanation:
    """Which parts of a model are on the fast path, and why the others are not.

    Args:
        model: a `BertModel` or another of `families.MODELS`, or anything that holds some.

    Raises:
        TypeError: for what is no model.
        ValueError: when there is none inside.
    """
    _check_model(model)
    named = _named_encoders(model)
    encoders = list(named.values())
    heads = {id(module.base_model): module for module in model.modules() if isinstance(module, FusedHead)}
    with as_if_gathered():
        parts = [part for encoder in encoders for part in explain_encoder(encoder, _context(encoder))]
        fused = [encoder for encoder in encoders if _context(encoder) is None]
        backends = [describe_backend(next(encoder.parameters())) for encoder in fused]
        padding = []
        for encoder in fused:
            head = heads.get(id(encoder))
            reads = encoder.what_is_read(None if head is None else head.what_is_read())
            padding.append(describe_padding(encoder, reads))
    return Explanation(tuple(parts), tuple(padding), tuple(backends), _in_words(named))


def _context(encoder: Any) -> str | None:
    """Why no part of an encoder is on the fast path."""
    if is_decoder(encoder):
        return "a decoder runs on Hugging Face's own path"
    if isinstance(encoder, EncoderModel):
        return None
    return f"{type(encoder).__name__} is not fused: call fastbert.fuse(model)"

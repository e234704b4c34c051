"""A class of ours in the place of Hugging Face's, on the instances of one model, and the attention's name there.

Families say which class of theirs stands for which of Hugging Face's (`register`); the modules here know no family.
"""

import copy
import sys
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from fastbert.notices import warn_once

#: Hugging Face's class -> ours, of every family.
FUSED: dict[type[nn.Module], type[nn.Module]] = {}

#: Our classes, each with Hugging Face's and the forward that it had when ours was registered.
_OURS: dict[type[nn.Module], tuple[Any, Any]] = {}


#: The other modules of the files that Hugging Face's heads of a family are in, such as poolers and heads' parts, each
#: with its forward: what they make of one row, or of the first, depends on no other.
_PARTS: dict[type[nn.Module], Any] = {}


def hugging_face_class(ours: type) -> type:
    """The class of Hugging Face's that a class derives from."""
    return next(base for base in ours.__mro__ if is_hugging_faces(base))


def is_hugging_faces(kind: type) -> bool:
    """Whether a class is one of Hugging Face's own."""
    return kind.__module__.startswith("transformers.")


def register(family: str) -> None:
    """Let each class that a family's module defines stand for the one of Hugging Face's that it derives from.

    Args:
        family: the module's name.
    """
    defined = vars(sys.modules[family]).values()
    for ours in [kind for kind in defined if isinstance(kind, type) and kind.__module__ == family]:
        if not any(map(is_hugging_faces, ours.__mro__)):
            continue  # a base of the family's own
        theirs = hugging_face_class(ours)
        for kind in vars(sys.modules[theirs.__module__]).values():
            if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == theirs.__module__:
                _PARTS.setdefault(kind, kind.forward)
        FUSED[theirs] = ours
        _OURS[ours] = theirs, theirs.forward  # type: ignore[attr-defined]
        # Hugging Face keeps, by class, what its own path may record; a model fused in place never passed its
        # constructor.
        if str(theirs) in _CAN_RECORD_REGISTRY or hasattr(theirs, "_can_record_outputs"):
            _CAN_RECORD_REGISTRY.setdefault(str(ours), theirs._can_record_outputs)  # type: ignore[attr-defined]


def is_known_part(kind: type[nn.Module]) -> bool:
    """Whether a class is Hugging Face's, in a file of a family's, as it was."""
    return _PARTS.get(kind) is kind.forward


def unsharded(kind: Any) -> Any:
    """The class that torch derived a module's class from to shard or to replicate it, or that class itself.

    By its bases: the module that torch's names is `abc` where the class is abstract, as that of a wrapper.
    """
    torchs, *theirs = kind.__bases__
    derived = len(theirs) == 1 and torchs.__module__.startswith("torch.distributed.")
    return theirs[0] if derived and kind.__name__.endswith(theirs[0].__name__) else kind


def ours_of(kind: type) -> type[nn.Module] | None:
    """The family's class that a class is, or that FSDP2 derives it from; what a user derives from one is not ours."""
    kind = unsharded(kind)
    return kind if kind in _OURS else None


def model_class(encoder: nn.Module) -> type[Any]:
    """The fused class of an encoder model's family, whether it is of that class, of Hugging Face's, or of one that
    derives from these."""
    return next(FUSED[base] for base in type(encoder).__mro__ if base in FUSED)


def is_ours(module: nn.Module) -> bool:
    """Whether a module is exactly of a family's class, and Hugging Face's class is as it was: it may be read."""
    return type(module) in _OURS and not is_patched(module)


def is_patched(module: nn.Module) -> bool:
    """Whether someone replaced the forward of Hugging Face's class that a module of ours derives from."""
    ours = ours_of(type(module))
    if ours is None:
        return False
    theirs, forward = _OURS[ours]
    return theirs.forward is not forward


def is_decoder(encoder: Any) -> bool:
    """Whether an encoder model of Hugging Face's is made to be a decoder, where its family has such."""
    return bool(getattr(encoder.config, "is_decoder", False))


def fuse_modules(encoder: Any) -> None:
    """Swap the classes of the modules inside one encoder model, unless it is a decoder, which stays as it is."""
    if is_decoder(encoder):
        return
    for module in encoder.modules():
        fused = FUSED.get(type(module))
        if fused is not None and module is not encoder:
            module.__class__ = fused
    stream = 0
    for module in encoder.modules():
        if hasattr(type(module), "dropout_stream"):
            module.dropout_stream = stream
            stream += 1
        if hasattr(type(module), "rehome") and is_ours(module):
            module.rehome()


def own_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration whose attention name we may set: another model may share this one and want its own."""
    return config if config._attn_implementation in (None, "eager") else copy.deepcopy(config)


def eager_semantics(requested: str | None) -> str:
    """The attention name our models carry: their semantics are eager's, and only under that name does Hugging Face
    allow attentions."""
    if requested not in (None, "eager"):
        warn_once(f"fastbert: attn_implementation={requested!r} is not used: attention runs on fastbert's own kernels")
    return "eager"

"""A drop-in Hugging Face `BertModel` on fused Triton kernels, forward and backward, attentions included."""

import importlib
from typing import TYPE_CHECKING, Any

from .namesake import warn_of_namesake

if TYPE_CHECKING:
    from . import attribution as attribution
    from . import distill as distill
    from . import encode as encode
    from .families.bert import BertForMaskedLM as BertForMaskedLM
    from .families.bert import BertForMultipleChoice as BertForMultipleChoice
    from .families.bert import BertForNextSentencePrediction as BertForNextSentencePrediction
    from .families.bert import BertForPreTraining as BertForPreTraining
    from .families.bert import BertForQuestionAnswering as BertForQuestionAnswering
    from .families.bert import BertForSequenceClassification as BertForSequenceClassification
    from .families.bert import BertForTokenClassification as BertForTokenClassification
    from .families.bert import BertLMHeadModel as BertLMHeadModel
    from .families.bert import BertModel as BertModel
    from .fusing import explain as explain
    from .fusing import fuse as fuse
    from .fusing import skip_unread as skip_unread
    from .fusing import unfuse as unfuse
    from .graphs.inference import Graphed as Graphed
    from .graphs.inference import graphed as graphed
    from .graphs.training import GraphedStep as GraphedStep
    from .graphs.training import graphed_step as graphed_step
    from .modules.explaining import Explanation as Explanation

__version__ = "0.1.0"

warn_of_namesake()

#: Public name -> the module it lives in. Loaded when first used: the command line has to choose how kernels run, which
#: Triton reads when they are defined, and its help should not wait for torch.
_HOMES = {
    "BertForMaskedLM": "families.bert",
    "BertForMultipleChoice": "families.bert",
    "BertForNextSentencePrediction": "families.bert",
    "BertForPreTraining": "families.bert",
    "BertForQuestionAnswering": "families.bert",
    "BertForSequenceClassification": "families.bert",
    "BertForTokenClassification": "families.bert",
    "BertLMHeadModel": "families.bert",
    "BertModel": "families.bert",
    "Explanation": "modules.explaining",
    "Graphed": "graphs.inference",
    "GraphedStep": "graphs.training",
    "explain": "fusing",
    "fuse": "fusing",
    "graphed": "graphs.inference",
    "graphed_step": "graphs.training",
    "skip_unread": "fusing",
    "unfuse": "fusing",
}

#: Packages and modules of public names, loaded likewise.
_MODULES = ("attribution", "distill", "encode")

__all__ = sorted([*_HOMES, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

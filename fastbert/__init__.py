"""A drop-in Hugging Face `BertModel` on fused Triton kernels, forward and backward, attentions included."""

import importlib
from typing import TYPE_CHECKING, Any

from .namesake import warn_of_namesake

if TYPE_CHECKING:
    from . import attribution as attribution
    from . import distill as distill
    from . import encode as encode
    from .auto import AutoModel as AutoModel
    from .auto import AutoModelForMaskedLM as AutoModelForMaskedLM
    from .auto import AutoModelForMultipleChoice as AutoModelForMultipleChoice
    from .auto import AutoModelForNextSentencePrediction as AutoModelForNextSentencePrediction
    from .auto import AutoModelForPreTraining as AutoModelForPreTraining
    from .auto import AutoModelForQuestionAnswering as AutoModelForQuestionAnswering
    from .auto import AutoModelForSequenceClassification as AutoModelForSequenceClassification
    from .auto import AutoModelForTokenClassification as AutoModelForTokenClassification
    from .families.bert import *  # noqa: F403
    from .families.camembert import *  # noqa: F403
    from .families.data2vec_text import *  # noqa: F403
    from .families.distilbert import *  # noqa: F403
    from .families.electra import *  # noqa: F403
    from .families.mpnet import *  # noqa: F403
    from .families.roberta import *  # noqa: F403
    from .families.xlm_roberta import *  # noqa: F403
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

#: Each family's module, with what its classes begin with, and with the ends that they have beside "Model".
_HEADS = (
    "ForMaskedLM", "ForSequenceClassification", "ForMultipleChoice", "ForTokenClassification", "ForQuestionAnswering",
)  # fmt: skip
_FAMILIES = {
    "bert": ("Bert", (*_HEADS, "ForNextSentencePrediction", "ForPreTraining", "LMHeadModel")),
    "camembert": ("Camembert", (*_HEADS, "ForCausalLM")),
    "data2vec_text": ("Data2VecText", (*_HEADS, "ForCausalLM")),
    "distilbert": ("DistilBert", _HEADS),
    "electra": ("Electra", (*_HEADS, "ForPreTraining", "ForCausalLM")),
    "mpnet": ("MPNet", _HEADS),
    "roberta": ("Roberta", (*_HEADS, "ForCausalLM")),
    "xlm_roberta": ("XLMRoberta", (*_HEADS, "ForCausalLM")),
}

#: Public name -> the module it lives in. Loaded when first used: the command line has to choose how kernels run, which
#: Triton reads when they are defined, and its help should not wait for torch.
_HOMES = {
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
_HOMES |= {f"AutoModel{end}": "auto" for end in ("", *_HEADS, "ForNextSentencePrediction", "ForPreTraining")}
_HOMES |= {start + end: f"families.{module}" for module, (start, ends) in _FAMILIES.items() for end in ("Model", *ends)}

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

"""What a comparison with Hugging Face found: a check a tensor, the times, and what ran where."""

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Check:
    """One tensor of fastbert's against the float64 truth.

    Attributes:
        name: e.g. `hidden_states[3]`, `attentions[0]`, or a parameter's name.
        shape: the shape Hugging Face gives it.
        error: fastbert's largest error; absolute for outputs, relative to the largest true value for gradients.
        hf_error: the same of Hugging Face's eager model in the working dtype.
        bound: the largest `error` that passes.
        problem: what no number can say (missing, wrong shape, not finite, ...), or None.
        rms, hf_rms: the root mean squares of what `error` and `hf_error` are the largest of. In few elements the
            largest is chance.
    """

    name: str
    shape: tuple[int, ...]
    error: float
    hf_error: float
    bound: float
    problem: str | None = None
    rms: float = math.nan
    hf_rms: float = math.nan

    @property
    def ratio(self) -> float | None:
        """`error / hf_error`; None where Hugging Face is exact or fastbert has no error to speak of."""
        return self.error / self.hf_error if self.hf_error > 0 and math.isfinite(self.error) else None

    @property
    def ok(self) -> bool:
        """Whether this tensor is within its bound and has no other problem."""
        return self.problem is None and self.error <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """As JSON; what is not finite becomes null."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "error": _finite(self.error),
            "hf_error": _finite(self.hf_error),
            "rms": _finite(self.rms),
            "hf_rms": _finite(self.hf_rms),
            "ratio": self.ratio,
            "bound": _finite(self.bound),
            "ok": self.ok,
            "problem": self.problem,
        }


@dataclass(frozen=True)
class Timing:
    """Median seconds of one piece of work; `hf_sdpa` is None where sdpa cannot do it."""

    name: str
    fastbert: float
    hf_eager: float
    hf_sdpa: float | None

    @property
    def eager_ratio(self) -> float:
        """Hugging Face eager over fastbert: above 1, fastbert is faster."""
        return self.hf_eager / self.fastbert

    @property
    def sdpa_ratio(self) -> float | None:
        """Hugging Face sdpa over fastbert."""
        return None if self.hf_sdpa is None else self.hf_sdpa / self.fastbert

    def to_dict(self) -> dict[str, Any]:
        """As JSON, times in milliseconds."""
        return {
            "name": self.name,
            "fastbert_ms": 1e3 * self.fastbert,
            "hf_eager_ms": 1e3 * self.hf_eager,
            "hf_sdpa_ms": None if self.hf_sdpa is None else 1e3 * self.hf_sdpa,
            "eager_ratio": self.eager_ratio,
            "sdpa_ratio": self.sdpa_ratio,
        }


@dataclass
class Report:
    """What `compare` found.

    Attributes:
        provenance: what ran where: versions, device, dtype, backend, model, batch. Plain JSON values.
        outputs: a check per output, hidden state and attention map.
        gradients: a check per parameter; empty unless asked for.
        timings: empty when `timing_skipped` says why.
        attentions: fastbert's maps on the CPU in float32, (batch, heads, seq, seq) a layer; missing ones left out.
        tokens: each sentence's tokens.
        model: the fused model that was checked.
    """

    provenance: dict[str, Any]
    outputs: list[Check]
    gradients: list[Check]
    model: PreTrainedModel = field(repr=False)
    attentions: list[Tensor] = field(repr=False)
    tokens: list[list[str]] = field(repr=False)
    timings: list[Timing] = field(default_factory=list)
    timing_skipped: str | None = None

    @property
    def ok(self) -> bool:
        """Whether every output and every gradient is within its bound."""
        return all(check.ok for check in [*self.outputs, *self.gradients])

    @property
    def typical_ratio(self) -> float | None:
        """The median over all tensors of `rms / hf_rms`: how far fastbert is from the truth, of how far HF is."""
        ratios = [check.rms / check.hf_rms for check in [*self.outputs, *self.gradients] if check.hf_rms > 0]
        finite = [ratio for ratio in ratios if math.isfinite(ratio)]
        return statistics.median(finite) if finite else None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON."""
        return {
            "ok": self.ok,
            "typical_ratio": self.typical_ratio,
            "provenance": self.provenance,
            "outputs": [check.to_dict() for check in self.outputs],
            "gradients": [check.to_dict() for check in self.gradients],
            "timings": [timing.to_dict() for timing in self.timings],
            "timing_skipped": self.timing_skipped,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

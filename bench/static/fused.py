"""Whether the feed-forward block's first product should have the activation inside: the estimate behind
`feed_forward_start` of `fastbert_kernels.tiles`.

On one side the product at `SPEED` of its limit, and after it, with nothing hidden, the time in which what follows the
product can be issued. On the other the product at its limit, and then the activation in the least time of its bytes.
Two assumptions against the fused kernel: it ships where it is faster by `MARGIN` even so.
"""

import dataclasses

from .cases import DEVICES
from .limits import FEED_FORWARD, PEAKS, cost, floor
from .report import Report

#: Of the limit at which cuBLAS is taken to run. A Triton product had 86% of cuBLAS on H100 before it was persistent.
SPEED = 0.8
MARGIN = 0.05


def is_estimated(report: Report) -> bool:
    """Whether a report is of what is estimated: the forward kernel in inference, on an NVIDIA target."""
    return report.nvidia and report.case.kernel == "feed_forward_forward" and not report.case.flags


def times(report: Report) -> tuple[float, float]:
    """Microseconds of the fused kernel, and of the product and the activation one after the other."""
    case, peaks = report.case, PEAKS[DEVICES[report.target]]
    product = dataclasses.replace(case.cost(), exps=0)
    after = cost(
        "bias_activation_forward", lengths=case.lengths, width=FEED_FORWARD * case.width, dtype=case.dtype,
        flags=("BIAS",), activation=case.activation,
    )  # fmt: skip
    slower = dataclasses.replace(product, flops=product.flops / SPEED)
    fused = floor(slower, peaks, case.dtype).microseconds + report.issue_of(loops=False)
    return fused, floor(product, peaks, case.dtype).microseconds + floor(after, peaks, case.dtype).microseconds


def is_fused(report: Report) -> bool:
    """What the table should say for the width and target of a report."""
    fused, apart = times(report)
    return fused <= (1 - MARGIN) * apart


def line(report: Report) -> str:
    """The estimate in words."""
    fused, apart = times(report)
    return (
        f"{report.target}, hidden size {report.case.width}: {fused:.0f} us with the activation inside, {apart:.0f} us "
        f"apart: {'fused' if is_fused(report) else 'not fused'}"
    )

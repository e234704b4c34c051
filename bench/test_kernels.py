"""The ops forward and backward, for everyday work, as `bench.kernels` times them on a GPU: ours beside plain PyTorch.

On a CPU an op runs as plain PyTorch too, at sizes of a small model; on a GPU as a Triton kernel, at those of BERT base.
"""

from collections.abc import Callable

import pytest
import torch

from bench import kernel_cases, kernels
from bench.conftest import DEVICE
from bench.kernel_cases import CASES, OpCase
from fastbert.benchmark.measure import SLACK
from fastbert.benchmark.timing import Run
from fastbert.benchmark.workloads import full, ragged

ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


def _small() -> dict[str, OpCase]:
    lengths = ragged(16, 128, 0.46)
    return {
        "attention-128": kernel_cases._attention_case(full(16, 128), "16 x 128", heads=6),
        "attention-ragged": kernel_cases._attention_case(lengths, "16 x 128, fill 0.46", heads=6),
        "attention-maps": kernel_cases._attention_case(lengths, "16 x 128, fill 0.46", maps=True, heads=6),
        "norm-384": kernel_cases._norm_case(384, tokens=2048),
        "norm-384-dropout": kernel_cases._norm_case(384, dropout_p=0.1, tokens=2048),
        "gelu-1536": kernel_cases._gelu_case(1536, tokens=2048),
        "feed-forward-384": kernel_cases._feed_forward_case(384, tokens=2048),
        "embed-384": kernel_cases._embed_case(384, batch=16, seq=128),
    }


OURS = {name: case for name, case in CASES.items() if not name.startswith("linear")} if ON_GPU else _small()


@pytest.mark.parametrize(
    "contender", ["fastbert", "torch eager", pytest.param("torch.compile", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", OURS)
def test_kernel(name: str, direction: str, contender: str, timed: Callable[[str, str, Run], None]) -> None:
    case, backward = OURS[name], direction == "backward"
    calls = case.calls(DTYPE, DEVICE, 0.0)
    truth = kernels._results(kernels._reference(case.calls(torch.float32, DEVICE, 0.0)), backward)
    own = kernels._error(kernels._results(kernels._reference(calls), backward), truth)
    call = calls[contender]
    assert not isinstance(call, str)
    assert kernels._error(kernels._results(call, backward), truth) <= 2 * own + SLACK[DTYPE]
    if case.dropout_p:
        call = case.calls(DTYPE, DEVICE, case.dropout_p)[contender]
        assert not isinstance(call, str)
    timed(f"{case.kernel} {direction}, {case.case}", contender, kernels._run(call, backward))

"""The host time of a layer, measured without a GPU."""

import pytest
from uninterpreted import run_uninterpreted

from bench.stand_in import as_on_a_gpu
from fastbert_kernels.backend import INTERPRETED


@pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")
def test_the_interpreters_host_code_is_not_a_gpus() -> None:
    with (
        pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 the host code is not a GPU's"),
        as_on_a_gpu(),
    ):
        pass


@pytest.mark.slow
def test_the_table() -> None:
    code = "from bench import python_time as p; p.LAYERS = (1, 2); p.main(rounds=3)"
    shown = run_uninterpreted("-c", code)
    for step in ("inference", "training, forward", "training, forward and backward"):
        assert step in shown

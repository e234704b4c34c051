"""The table of a whole layer, without compiling one."""

import pytest

from bench.static.layer import BATCHES, MODELS, add_up, calls
from bench.static.limits import PEAKS


@pytest.mark.parametrize(("batch", "summed"), [((1092, 30), False), ((16, 512), True), ((4, 30), True)])
def test_kernels_of_a_layer(batch: tuple[int, int], summed: bool) -> None:
    launched = calls(768, batch, fused=False)
    assert sum(times for _, times in launched) == 10
    assert {case.batch for case, _ in launched} == {batch}
    backward = [case for case, _ in launched if case.kernel.startswith("attention_backward")]
    assert [("SUMS" in case.flags) for case in backward] == [summed, summed]


def test_a_kernel_that_was_not_compiled_is_an_error() -> None:
    with pytest.raises(KeyError):
        add_up("sm_90", {}, MODELS["base"], BATCHES[0], PEAKS["H200"], fused=False)

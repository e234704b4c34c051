"""Costs and floors, against sums done by hand."""

import dataclasses
from typing import Any

import pytest

from bench.static.cases import COMPILED, cases
from bench.static.limits import PEAKS, Cost, cost, floor

TOKENS = 64 * 512
BASE: dict[str, Any] = {"lengths": [512] * 64, "heads": 12, "width": 64, "dtype": "bfloat16"}
ROWS: dict[str, Any] = {"lengths": [512] * 64, "width": 768, "dtype": "bfloat16"}


def test_attention_forward() -> None:
    call = cost("attention_forward", **BASE)
    assert call.flops == 2 * 2 * 64 * 12 * 512 * 512 * 64  # Q K^T and P V
    assert call.bytes == 4 * TOKENS * 768 * 2 + 2 * 12 * TOKENS * 4  # q, k, v, out; two statistics
    assert call.exps == 64 * 12 * 512 * 512
    # 51.5 GFLOP at 790 TFLOP/s; 204 MB at 4.3 TB/s would take 48 us, 201 M exponentials at 4.18 T/s 48 us.
    microseconds, bound = floor(call, PEAKS["H200"], "bfloat16")
    assert bound == "compute"
    assert microseconds == pytest.approx(65.24, abs=0.01)


def test_narrow_heads_wait_for_exponentials() -> None:
    call = cost("attention_forward", **BASE | {"heads": 12, "width": 32})
    assert floor(call, PEAKS["H200"], "bfloat16") == (pytest.approx(48.14, abs=0.01), "exp")


def test_the_backward_kernels_and_the_pass_as_one() -> None:
    product = 2 * 64 * 12 * 512 * 512 * 64
    by_name = {name: cost(f"attention_backward{name}", **BASE) for name in ("_dq", "_dkv", "")}
    assert {name: call.flops / product for name, call in by_name.items()} == {"_dq": 3, "_dkv": 4, "": 5}
    assert by_name[""].bytes < by_name["_dq"].bytes + by_name["_dkv"].bytes


def test_relations_of_two_models() -> None:
    product, matrix, row = 2 * 64 * 12 * 512 * 512 * 64, TOKENS * 768 * 2, 12 * TOKENS * 4
    forward = cost("relation_forward", **BASE, flags=["SOFTMAX"])
    assert forward == Cost(2 * product, 4 * matrix + 3 * row, 2 * 64 * 12 * 512 * 512)
    assert cost("relation_forward", **BASE) == Cost(2 * product, 4 * matrix + row, 0)
    for operand in "ab":
        backward = cost(f"relation_backward_{operand}", **BASE, flags=["SOFTMAX"])
        assert backward == Cost(3 * product, 5 * matrix + 3 * row, 2 * 64 * 12 * 512 * 512)


def test_maps_are_moved_once() -> None:
    bare, side = cost("attention_forward", **BASE), 520
    written = cost("attention_forward", **BASE, flags=["PROBS"], probs_seq=side)
    assert written.bytes - bare.bytes == 64 * 12 * side * side * 2  # padding too
    gathered = cost("attention_forward", **BASE, flags=["PROBS", "COLUMNS"], probs_seq=side)
    assert gathered.bytes - bare.bytes == 64 * 12 * 512 * 512 * 2
    biased = cost("attention_forward", **BASE, flags=["BIAS"])
    assert biased.bytes - bare.bytes == 64 * 512 * 512 * 4
    assert written.flops == bare.flops


def test_ragged_sequences_add_up() -> None:
    lengths = [3, 0, 500]
    parts = [cost("attention_forward", **BASE | {"lengths": [length]}) for length in lengths]
    whole = cost("attention_forward", **BASE | {"lengths": lengths})
    assert dataclasses.astuple(whole) == tuple(map(sum, zip(*map(dataclasses.astuple, parts), strict=True)))


def test_rows() -> None:
    matrix, vector = TOKENS * 768 * 2, 768 * 2
    forward = cost("add_layer_norm_forward", **ROWS, flags=["BIAS", "RESIDUAL", "DROPOUT"])
    assert forward == Cost(0, 3 * matrix + 3 * vector + TOKENS * 4, 0)
    kept = cost("add_layer_norm_forward", **ROWS, flags=["BIAS", "RESIDUAL", "DROPOUT", "NORMED"])
    assert kept.bytes - forward.bytes == matrix
    backward = cost("add_layer_norm_backward", **ROWS, flags=["BIAS", "DROPOUT"])
    assert backward == Cost(0, 4 * matrix + 2 * vector + TOKENS * 4 + 3 * 256 * 768 * 4, 0)
    again = cost("add_layer_norm_backward", **ROWS, flags=["BIAS", "DROPOUT", "Y"])
    assert again.bytes - backward.bytes == matrix
    microseconds, bound = floor(forward, PEAKS["H200"], "bfloat16")
    assert (microseconds, bound) == (pytest.approx(35.15, abs=0.01), "bandwidth")
    gelu = cost("bias_activation_backward", **ROWS, flags=["BIAS"], activation="gelu")
    assert gelu == Cost(0, 3 * matrix + vector + 256 * 768 * 4, 2 * TOKENS * 768)
    again = cost("bias_activation_backward", **ROWS, flags=["BIAS", "Y"], activation="gelu")
    assert again.bytes - gelu.bytes == matrix


def test_feed_forward() -> None:
    matrix, weight, product = TOKENS * 768 * 2, 4 * 768 * 768 * 2, 2 * TOKENS * 768 * 3072
    forward = cost("feed_forward_forward", **ROWS, activation="gelu")
    assert forward == Cost(product, 5 * matrix + weight + 3072 * 2, TOKENS * 3072)
    kept = cost("feed_forward_forward", **ROWS, flags=["PRE"], activation="gelu")
    assert kept.bytes - forward.bytes == 4 * matrix
    backward = cost("feed_forward_backward", **ROWS, activation="gelu")
    assert backward == Cost(product, 13 * matrix + weight + 256 * 3072 * 4, 2 * TOKENS * 3072)
    microseconds, bound = floor(forward, PEAKS["H200"], "bfloat16")
    assert (microseconds, bound) == (pytest.approx(195.7, abs=0.1), "compute")


def test_words_that_come_again_are_in_the_cache() -> None:
    few = cost("embed_forward", **ROWS | {"lengths": [100]}, flags=["WORD_TABLE"])
    assert few.bytes == 2 * 100 * 768 * 2 + (100 + 2 + 2) * 768 * 2 + 3 * 100 * 8
    kept = cost("embed_forward", **ROWS | {"lengths": [100]}, flags=["WORD_TABLE", "NORMED"])
    assert kept.bytes - few.bytes == 100 * 768 * 4 + 100 * 4
    many = cost("embed_forward", **ROWS | {"lengths": [512] * 1000}, flags=["WORD_TABLE"])
    vectors = cost("embed_forward", **ROWS | {"lengths": [512] * 1000})
    assert vectors.bytes - many.bytes == (512_000 - 30522) * 768 * 2 - 512_000 * 8


def test_float32_has_peaks_of_its_own() -> None:
    call = cost("attention_forward", **BASE | {"dtype": "float32"})
    assert floor(call, PEAKS["H200"], "float32").microseconds == pytest.approx(call.flops / 67e12 * 1e6)
    in_three = floor(call, PEAKS["H200"], "float32", "tf32x3").microseconds
    assert in_three == pytest.approx(6 * call.flops / 790e12 * 1e6)
    assert floor(call, PEAKS["H200"], "float32", "tf32").microseconds == pytest.approx(in_three / 3)


def test_measured_rates_take_the_place_of_peaks() -> None:
    call = cost("add_layer_norm_forward", **ROWS)
    slow = dataclasses.replace(PEAKS["H200"], copy=1e12)
    assert floor(call, slow, "bfloat16").microseconds == pytest.approx(call.bytes / 1e6)


@pytest.mark.parametrize("kernel", COMPILED)
def test_every_kernel_has_a_cost(kernel: str) -> None:
    costs = [case.cost() for case in cases(full=True) if case.kernel == kernel]
    assert min(call.bytes for call in costs) > 0
    assert all((call.flops > 0) == kernel.startswith(("attention_", "relation_", "feed_")) for call in costs)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kernel": "softmax"}, r"unknown kernel 'softmax': known are .*attention_forward"),
        ({"dtype": "float64"}, "unknown dtype 'float64': known are bfloat16, float16, float32"),
        ({"flags": ["MASK"]}, "unknown flag 'MASK'"),
        ({"activation": "elu"}, "unknown activation 'elu'"),
        ({"lengths": []}, "needs sequences"),
        ({"lengths": [3, -1]}, r"lengths=\[3, -1\]"),
        ({"kernel": "add_layer_norm_forward"}, "has no heads, got heads=12"),
    ],
)
def test_bad_calls(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cost(**{"kernel": "attention_forward"} | BASE | changed)

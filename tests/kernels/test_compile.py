"""What torch.compile sees of the kernels."""

import json
from typing import Any

import pytest
from uninterpreted import run_uninterpreted

#: Of a model's training step, by kernel: how often it is launched, and the arguments it writes. What torch takes for
#: written besides is cloned before each launch.
FORWARD: dict[str, list[Any]] = {
    "embed_forward": [1, ["kept_ptr", "rstd_ptr", "y_ptr"]],
    "attention_forward": [1, ["out_ptr", "probs_ptr", "stats_ptr"]],
    "add_layer_norm_forward": [2, ["normed_ptr", "stats_ptr", "y_ptr"]],
    "bias_activation_forward": [1, ["then_bias_ptr", "y_ptr"]],
}
BACKWARD: dict[str, list[Any]] = {
    "embed_backward": [1, ["dz_ptr", "found_positions_ptr", "found_words_ptr", "partials_ptr", "type_partials_ptr"]],
    "attention_backward_dq": [1, ["delta_ptr", "dqkv_ptr"]],
    "attention_backward_dkv": [1, ["dqkv_ptr"]],
    "add_layer_norm_backward": [2, ["dx_ptr", "dz_ptr", "partials_ptr"]],
    "bias_activation_backward": [1, ["dx_ptr", "partials_ptr"]],
    "column_sums": [4, ["out_ptr"]],
}


@pytest.fixture(scope="module")
def traced() -> Any:
    """The graphs of `compiled_graph.py`, by the name of the step."""
    return json.loads(run_uninterpreted("tests/helpers/compiled_graph.py").splitlines()[-1])


def test_every_kernel_is_visible_in_the_compiled_graphs(traced: Any) -> None:
    for step in ("padded", "packed by the caller"):
        found = [{name: count for name, (count, _) in graph.items()} for graph in traced[step]]
        assert found == [{name: count for name, (count, _) in graph.items()} for graph in (FORWARD, BACKWARD)]


def test_lengths_that_are_symbols_are_compiled_once_for_each_class_of_them(traced: Any) -> None:
    assert traced["graphs of lengths"] == 3


def test_a_compiled_graph_clones_nothing_that_kernels_only_read(traced: Any) -> None:
    assert {name: graphs for name, graphs in traced.items() if name != "graphs of lengths"} == {
        "padded": [FORWARD, BACKWARD],
        "packed by the caller": [FORWARD, BACKWARD],
        "relations": [
            {"relation_forward": [1, ["loss_ptr", "lse_ptr"]]},
            {"relation_backward_a": [1, ["da_ptr"]], "relation_backward_b": [1, ["db_ptr"]]},
        ],
    }

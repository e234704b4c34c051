"""What torch.compile sees of the kernels."""

import json

from uninterpreted import run_uninterpreted


def test_every_kernel_is_visible_in_the_compiled_graphs() -> None:
    forward, backward = json.loads(run_uninterpreted("tests/helpers/compiled_graph.py").splitlines()[-1])
    assert forward == {
        "embed_forward": 1,
        "attention_forward": 1,
        "add_layer_norm_forward": 2,
        "bias_activation_forward": 1,
    }
    assert backward == {
        "embed_backward": 1,
        "attention_backward_dq": 1,
        "attention_backward_dkv": 1,
        "add_layer_norm_backward": 2,
        "bias_activation_backward": 1,
        "column_sums": 4,
    }

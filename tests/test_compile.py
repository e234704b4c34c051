"""What torch.compile sees of the kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_every_kernel_is_visible_in_the_compiled_graphs() -> None:
    command = [sys.executable, str(Path(__file__).with_name("compiled_graph.py"))]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    forward, backward = json.loads(done.stdout.splitlines()[-1])
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

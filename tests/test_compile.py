"""What torch.compile sees of the kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_every_kernel_is_visible_in_the_compiled_graphs() -> None:
    script = Path(__file__).with_name("compiled_graph.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    forward, backward = json.loads(done.stdout.splitlines()[-1])
    # embeddings, attention, two norms, activation; and backward: one each, two for attention, and their column sums.
    assert forward == {"triton_kernel_wrapper_functional": 5}
    assert backward == {"triton_kernel_wrapper_functional": 10}

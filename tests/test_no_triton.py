"""A machine without Triton, as macOS and Windows are: plain PyTorch runs, and what needs kernels says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: Triton cannot be imported after this.
WITHOUT = "import sys; sys.modules['triton'] = None\n"

STEP = """
import torch, transformers, fastbert
from fastbert.distill import attention_loss, capture
from fastbert_kernels import uses_triton
torch.manual_seed(0)
config = transformers.BertConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=60,
    max_position_embeddings=40, initializer_range=0.5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    attn_implementation="eager",
)
plain = transformers.BertForTokenClassification(config)
fused = fastbert.BertForTokenClassification(config)
fused.load_state_dict(plain.state_dict())
ids, mask = torch.randint(1, 60, (3, 9)), (torch.arange(9) < torch.tensor([[9], [4], [1]])).long()
labels = torch.where(mask.bool(), 1, -100)
runs = []
for model in (plain, fused):
    out = model(ids, mask, labels=labels, output_attentions=True)
    out.loss.backward()
    runs.append([out.loss, out.logits, *out.attentions, *[p.grad for p in model.parameters()]])
for a, b in zip(*runs, strict=True):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
with capture(fused.bert) as ours:
    fused(ids)
attention_loss(ours[0], ours[0]).backward()
assert not uses_triton(ids)
print("explained:", fastbert.explain(fused).fused)
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code], cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"} | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_models_run_forward_and_backward_in_plain_pytorch() -> None:
    done = python(STEP)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "explained: True\n"
    assert "Triton" not in done.stderr  # nobody has to hear of what nobody needs


def test_who_asks_for_kernels_is_told() -> None:
    code = """
import fastbert_kernels
for ask in (lambda: fastbert_kernels.set_backend("triton"), lambda: __import__("bench.static")):
    try:
        ask()
    except RuntimeError as error:
        print(error)
"""
    reason = "needs Triton, which cannot be imported here (import of triton halted; None in sys.modules)"
    done = python(code)
    assert done.stdout.splitlines() == [f"FASTBERT_BACKEND=triton {reason}", f"bench.static {reason}"], done.stderr
    done = python("import fastbert; fastbert.BertModel", FASTBERT_BACKEND="triton")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"RuntimeError: FASTBERT_BACKEND=triton {reason}"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("verify . --backend triton", "error: --backend triton needs Triton, which is not installed here"),
        ("tune", "error: tune measures kernels, and none run here: Triton cannot be imported"),
    ],
)
def test_commands_that_need_kernels_fail_in_one_line(command: str, message: str) -> None:
    a_gpu = "import torch; torch.cuda.is_available = lambda: True; torch.cuda.device_count = lambda: 1\n"
    done = python(f"{a_gpu}from fastbert.cli import app; app({command.split()})")
    assert done.returncode == 2
    assert message in done.stderr


def test_a_gpu_runs_plain_pytorch_and_this_is_said_once() -> None:
    code = """
import torch
from unittest.mock import Mock
from fastbert_kernels import uses_triton
tensor = Mock(is_cuda=True, get_device=lambda: 0, device=torch.device("cuda:0"), dtype=torch.float32)
print(uses_triton(tensor), uses_triton(tensor))
"""
    done = python(code)
    assert done.stdout == "False False\n", done.stderr
    assert done.stderr.count("fastbert: plain PyTorch runs on cuda:0: Triton cannot be imported") == 1

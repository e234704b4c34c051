"""Two processes under PyTorch's own engines, accelerate and DeepSpeed: gradients, accumulation, checkpoints, dropout.

On a CPU the processes speak by gloo; where each has a GPU, by NCCL.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import assert_close, ids, mask_of, pair
from torch import nn

import fastbert
from fastbert_kernels import backend

HERE = Path(__file__).parent
TORCHRUN = ("torch.distributed.run", "--nproc-per-node=2", "--standalone")
ACCELERATE = (
    "accelerate.commands.launch",
    *("--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
    *("--use_fsdp", "--fsdp_version=2", "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP"),
    *("--fsdp_transformer_layer_cls_to_wrap=BertLayer", "--fsdp_cpu_ram_efficient_loading=false"),
)

EVERYDAY = ("ddp", "fsdp2", "fsdp2-leaves", "accelerate-ddp", "accelerate-fsdp2")
#: How far float32 gradients of two processes may be from one's: their sums have another order.
BOUND = 1e-5


@functools.cache
def measure(launcher: tuple[str, ...], engines: tuple[str, ...], backend_name: str = "torch") -> dict[str, Any]:
    """The worker's figures for some engines."""
    settings = {"FASTBERT_BACKEND": backend_name, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    paths = [str(HERE), str(HERE.parent / "helpers"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "figures.json")
        done = subprocess.run(
            [sys.executable, "-m", *launcher, str(HERE / "distributed_worker.py"), str(out), *engines],
            env=os.environ | settings | {"PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(out.read_text())


def assert_gradients(figures: dict[str, Any]) -> None:
    assert figures["largest gradient"] > 0.1
    assert figures["gradients"] < BOUND
    assert figures["weights"] < BOUND


def assert_dropout(figures: dict[str, Any]) -> None:
    assert figures["own seed, as one process"] < BOUND
    assert figures["own seeds, between processes"] > 0.1
    assert figures["one seed, between processes"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("engine", EVERYDAY)
def test_gradients_equal_those_of_one_process(engine: str) -> None:
    assert_gradients(measure(TORCHRUN, EVERYDAY)[engine])


@pytest.mark.slow
@pytest.mark.parametrize("engine", EVERYDAY)
def test_accumulating_without_synchronising(engine: str) -> None:
    figures = measure(TORCHRUN, EVERYDAY)[engine]
    assert figures["unsynced"] == 0.0
    assert figures["accumulated"] < BOUND


@pytest.mark.parametrize("engine", EVERYDAY)
def test_a_run_resumed_from_a_sharded_checkpoint_is_the_uninterrupted_one(engine: str) -> None:
    figures = measure(TORCHRUN, EVERYDAY)[engine]
    assert figures["before loading"] > 0.1
    assert figures["resumed"] == 0.0
    assert figures["shards"] >= (0 if engine == "accelerate-ddp" else 2)


@pytest.mark.parametrize("engine", EVERYDAY)
def test_each_process_drops_by_its_own_seed(engine: str) -> None:
    assert_dropout(measure(TORCHRUN, EVERYDAY)[engine])


def test_bfloat16_under_fsdp2_errs_no_more_than_eager() -> None:
    figures = measure(TORCHRUN, EVERYDAY)["bfloat16"]
    assert figures["ours"] <= 2 * figures["eager"] + 1e-5


def test_explain_tells_what_runs_under_each_engine() -> None:
    figures = measure(TORCHRUN, EVERYDAY)
    assert {name for name in EVERYDAY if figures[name]["fused"]} == set(EVERYDAY) - {"fsdp2-leaves"}
    assert "every part is fused" in figures["ddp"]["explanation"]
    assert "three products: something else holds their parameters" in figures["fsdp2"]["explanation"]
    assert "LayerNorm is not a plain nn.LayerNorm but FSDPLayerNorm" in figures["fsdp2-leaves"]["explanation"]
    assert "query (FSDPLinear), key (FSDPLinear), value (FSDPLinear) called" in figures["fsdp2-leaves"]["explanation"]
    assert "word_embeddings (FSDPEmbedding) called as a module" in figures["accelerate-fsdp2"]["explanation"]


def test_a_model_is_fused_before_it_is_sharded() -> None:
    said = measure(TORCHRUN, EVERYDAY)["refusals"]
    for verb in ("fuse", "unfuse"):
        assert f"is sharded by FSDP2 already: {verb} the model before fully_shard" in said[verb]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_the_kernels_on_two_processes(engine: str) -> None:
    figures = measure(TORCHRUN, ("ddp", "fsdp2"), "triton")[engine]
    assert_gradients(figures)
    assert_dropout(figures)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["accelerate-fsdp2", "accelerate-fsdp2-checkpointing"])
def test_accelerate_launch(engine: str) -> None:
    figures = measure(ACCELERATE, ("accelerate-fsdp2", "accelerate-fsdp2-checkpointing"))[engine]
    assert_gradients(figures)
    assert_dropout(figures)
    assert figures["fused"]
    assert figures["resumed"] == figures["unsynced"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3", "zero3-layers"])
def test_deepspeed(engine: str) -> None:
    pytest.importorskip("deepspeed")
    figures = measure(TORCHRUN, ("zero2", "zero3", "zero3-layers"))[engine]
    assert_gradients(figures)
    assert_dropout(figures)


# What ZeRO-3 asks for, on one process: parameters that are there only while their module is called


class Gathering:
    """Parameters that are empty until their module is called, or run backward, as ZeRO-3's are."""

    def __init__(self, root: nn.Module) -> None:
        self.full = {p: p.data for p in root.parameters()}
        self.calls = 0
        for module in root.modules():
            module.register_forward_pre_hook(self.marked(self.gather))
            module.register_forward_hook(self.marked(self.release))
            if module._parameters:
                module.register_full_backward_pre_hook(self.marked(self.gather))
            self.release(module)

    @staticmethod
    def marked(hook: Any) -> Any:
        @functools.wraps(hook)
        def marked(*args: Any) -> None:
            hook(*args)

        marked.__module__ = "deepspeed.runtime.zero.parameter_offload"
        return marked

    def gather(self, module: nn.Module, *_: Any) -> None:
        self.calls += 1
        for p in module.parameters(recurse=False):
            p.data = self.full[p]

    def release(self, module: nn.Module, *_: Any) -> None:
        for p in module.parameters(recurse=False):
            p.data = p.data.new_empty(0)


def parts_with_parameters() -> list[str]:
    model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=1, vocab_size=2))
    return [name for name, module in model.named_modules() if module._parameters]


def assert_equal_gradients(plain: Any, fused: Any, full: dict[nn.Parameter, torch.Tensor]) -> None:
    """Two steps, between which the parameters change where the engine keeps them."""
    x, mask = ids(3, 9), mask_of([9, 2, 5], 9)
    for _ in range(2):
        wanted, got = plain(x, mask), fused(x, mask)
        assert_close(got.last_hidden_state, wanted.last_hidden_state, where=mask.bool())
        cotangent = torch.randn_like(wanted.last_hidden_state) * mask[:, :, None]
        for output in (wanted, got):
            ((output.last_hidden_state * cotangent).mean() + output.pooler_output.square().mean()).backward()
        for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
            assert_close(q.grad, p.grad)
            with torch.no_grad():
                p -= 0.05 * p.grad
                full[q] -= 0.05 * q.grad
                p.grad = q.grad = None


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # embeddings have no inputs with gradients
@pytest.mark.parametrize("name", parts_with_parameters())
def test_a_module_whose_parameters_are_gathered_for_its_calls(name: str) -> None:
    plain, fused = pair(num_hidden_layers=1)
    gathering = Gathering(fused.get_submodule(name))
    full = {p: gathering.full.get(p, p.data) for p in fused.parameters()}
    assert_equal_gradients(plain, fused, full)
    assert gathering.calls >= 4


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("backend_name", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_a_model_whose_parameters_are_gathered_for_calls(backend_name: str, device: torch.device) -> None:
    if backend_name == "triton" and device.type != "cpu":
        pytest.skip("written for a CPU")
    plain, fused = pair(num_hidden_layers=1, num_attention_heads=2)
    gathering = Gathering(fused)
    with backend(backend_name):
        assert_equal_gradients(plain, fused, gathering.full)
    runs = {part.name: part.fused for part in fastbert.explain(fused).parts}
    assert runs["attention.self"], "dropout and activation have no parameters, so that their hooks have no work"
    assert runs["intermediate"]
    assert not runs["output"]

"""Every kernel through Triton's own launch, on a GPU that is not there.

Prints as JSON how often each was launched; pairs of keys of arguments, ours and Triton's; and how many kernels were
compiled for a first batch, and for others. Run by `test_launched.py` in a process whose Triton is not the interpreter.
"""

import itertools
import json
from typing import Any
from unittest import mock

import torch
import transformers
from triton.runtime import driver
from triton.runtime.jit import compute_cache_key

import fastbert
from bench.stand_in import as_on_a_gpu
from fastbert.distill import attention_loss, capture
from fastbert.tuning.problems import COMPILED
from fastbert_kernels.launch import wrap_triton
from fastbert_kernels.layer_norm_kernels import add_layer_norm_forward


def model() -> fastbert.BertModel:
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, vocab_size=50
    )
    return fastbert.BertModel(config).bfloat16().train()


def keys() -> list[tuple[str, str]]:
    """What one kernel is looked up by, here and by Triton, for arguments of every kind that it compiles anew for."""
    kernel: Any = add_layer_norm_forward
    memory = torch.zeros(64)
    changes: dict[str, list[Any]] = {
        "x_ptr": [memory, memory[1:], memory[4:], memory.bfloat16()],
        "weight_ptr": [memory, memory[3:], memory.half()],
        "count": [0, 1, 2, 16, 17, 2**31 - 1, 2**31, 2**31 + 16],
        "features": [1, 3, 32],
        "eps": [1e-12, 1.0, 1],
        "site": [0, 1, 16, 2**31],
        "HAS_BIAS": [True, False],
        "BLOCK_M": [1, 2],
        "num_warps": [1, 2],
    }
    fixed = {name: memory for name in kernel.arg_names if name.endswith("_ptr")}
    fixed |= {"keep_threshold": 5, "keep_scale": 2.0, "BLOCK_N": 64, "ROW_MULTIPLE": 1, "num_stages": 1}
    fixed |= {name: True for name in kernel.arg_names if name.startswith("HAS_")}
    *_, binder = kernel.device_caches[driver.active.get_current_device()]
    found = []
    # All values of any two arguments together, the others as they come first.
    for names in itertools.combinations(changes, 2):
        for values in itertools.product(*(changes[name] for name in names)):
            arguments = fixed | {name: first for name, (first, *_) in changes.items()}
            arguments |= dict(zip(names, values, strict=True))
            _, specialization, options = binder(**arguments)
            ours = wrap_triton(kernel).functions["key"](**arguments)
            found.append((repr(ours), compute_cache_key({}, specialization, options)))
    return found


def distill(student: fastbert.BertModel, teacher: fastbert.BertModel, lengths: list[int]) -> None:
    """A step of training, with a loss of every kind, and inference, on sequences of these lengths."""
    ids = torch.ones(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]
    with capture(teacher) as theirs, torch.no_grad():
        teacher(ids, mask)
    with capture(student) as ours:
        last = student(ids, mask).last_hidden_state
    (last.sum() + attention_loss(ours[0], theirs[0])).backward()


def compiled() -> int:
    """How many kernels Triton has compiled for the stand-in."""
    device = driver.active.get_current_device()
    return sum(len(kernel.device_caches[device][0]) for kernel in COMPILED.values())


def batches() -> tuple[int, int, int, int]:
    """How many kernels are compiled for the first of several ragged batches of one class of lengths, and for all; and
    for the first batch of another class and another of it besides."""
    models = model(), model()
    before = compiled()
    found = []
    for lengths in ([24, 9], [17, 5, 1], [32, 16], [2, 1], [31, 3, 7, 11, 11], [16, 15, 1], [48, 3, 7], [64, 40]):
        for fused in (False, True):
            with mock.patch("fastbert.modules.layer.feed_forward_is_fused", return_value=fused):
                distill(*models, lengths)
        found.append(compiled() - before)
    return found[0], found[-3], found[-2] - found[-3], found[-1] - found[-3]


def main() -> None:
    ids, mask = torch.ones(2, 24, dtype=torch.long), torch.ones(2, 24, dtype=torch.long)
    mask[1, 9:] = 0
    with as_on_a_gpu() as launched:
        of_batches = batches()
        output = model()(ids, mask, output_attentions=True)
        (output.last_hidden_state.sum() + output.attentions[0].sum()).backward()
        square = torch.zeros(1, 1, 24, 24)
        model()(ids, square, head_mask=torch.ones(2, requires_grad=True)).last_hidden_state.sum().backward()
        apart = model()
        for part in (apart.encoder.layer[0].attention.output, apart.encoder.layer[0].intermediate):
            part.register_forward_hook(lambda *_: None)
        apart(ids).last_hidden_state.sum().backward()
        with mock.patch("fastbert.modules.layer.feed_forward_is_fused", return_value=True):
            model()(ids).last_hidden_state.sum().backward()
        with torch.no_grad():
            model().eval()(ids, mask)
        print(json.dumps([launched, keys(), of_batches]))


if __name__ == "__main__":
    main()

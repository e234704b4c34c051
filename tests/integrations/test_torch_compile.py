"""torch.compile, torch.export and AOTInductor: the model's own numbers, and one graph for every shape."""

import copy
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import assert_close, ids, mask_of, pair
from torch._dynamo.utils import counters

import fastbert

ALL = {"output_attentions": True, "output_hidden_states": True}
FLAGS = [pytest.param({}, id="two outputs"), pytest.param(ALL, id="all outputs")]

#: Rows, length, and the longest sequence's share of it, 1.0 being a batch without padding. The first is not square, as
#: torch takes sizes that are equal in the first batch for one and the same.
SHAPES = [
    (3, 11, 1.0), (5, 7, 0.5), (2, 40, 0.9), (8, 3, 1.0), (4, 16, 0.2), (2, 2, 1.0), (7, 33, 0.6), (16, 5, 0.8),
    (6, 40, 1.0), (3, 12, 0.4), (5, 24, 0.9), (9, 2, 0.5), (2, 31, 1.0), (4, 8, 0.3), (12, 17, 0.7), (3, 40, 0.1),
    (10, 6, 1.0), (8, 8, 0.6), (2, 23, 0.5), (5, 11, 0.9),
]  # fmt: skip

RAGGED = [(3, 11, 0.9), (5, 7, 0.5), (2, 40, 1.0)]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """How many graphs torch.compile has made since the test began."""
    return counters["stats"]["unique_graphs"]


def batch(rows: int, seq: int, fill: float, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Random tokens padded at the end, in sequences of 1 to fill * seq of them; without padding if fill is 1."""
    longest = max(1, round(fill * seq))
    lengths = [seq] * rows if fill == 1.0 else torch.randint(1, longest + 1, (rows,)).tolist()
    return {"input_ids": ids(rows, seq, device), "attention_mask": mask_of(lengths, seq, device)}


def tensors(output: Any) -> dict[str, torch.Tensor]:
    """Every tensor a model returned, by name."""
    named = {"last_hidden_state": output.last_hidden_state, "pooler_output": output.pooler_output}
    for kind in ("hidden_states", "attentions"):
        named |= {f"{kind}.{i}": tensor for i, tensor in enumerate(output.get(kind) or ())}
    return named


def at_tokens(output: Any, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same with zeros at padding, where Hugging Face leaves what it happens to compute."""
    shapes = {2: (-1, 1), 3: (*mask.shape, 1), 4: (mask.shape[0], 1, mask.shape[1], 1)}
    return {
        name: tensor if name == "pooler_output" else tensor * mask.view(shapes[tensor.dim()])
        for name, tensor in tensors(output).items()
    }


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference between tensors of the same names, each element's against 1 + its size."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape, name
    return max(((x - theirs[name]).abs() / (1 + theirs[name].abs())).max().item() for name, x in ours.items())


def apart_relatively(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference of two sets of gradients, each against the largest entry of its parameter's.

    A key's bias moves a row of scores by one number, which the softmax takes out: its gradient is rounding alone, and
    is held against its weight's.
    """
    assert ours.keys() == theirs.keys()
    scale = {name: theirs[name.replace("key.bias", "key.weight")].abs().max() for name in theirs}
    return max(((ours[name] - theirs[name]).abs().max() / scale[name]).item() for name in ours)


def run(model: Any, inputs: dict[str, torch.Tensor], flags: dict[str, Any]) -> Any:
    with torch.no_grad():
        return model(**inputs, **flags)


def check_forward(
    compiled: Any,
    model: Any,
    plain: Any,
    inputs: dict[str, torch.Tensor],
    flags: dict[str, Any],
    everywhere: bool = True,
) -> str:
    """Compare what was compiled with the model it was made of, in rows of padding too unless told otherwise, and with
    Hugging Face's; the differences, in words."""
    mask = inputs["attention_mask"]
    got, wanted = run(compiled, inputs, flags), run(model, inputs, flags)
    assert len(tensors(got)) == (2 if not flags else 3 + 2 * model.config.num_hidden_layers)
    compared = tensors if everywhere else functools.partial(at_tokens, mask=mask)
    uncompiled = apart(compared(got), compared(wanted))
    eager = apart(at_tokens(got, mask), at_tokens(run(plain, inputs, flags), mask))
    assert uncompiled <= 1e-5
    assert eager <= 1e-5
    return f"{tuple(mask.shape)}: {uncompiled:.1e} from the model uncompiled, {eager:.1e} from Hugging Face"


def gradients(
    called: Any, model: torch.nn.Module, inputs: dict[str, torch.Tensor], flags: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A loss that weighs every element of every output by its own random number, and the gradient of each of the
    model's parameters. `called` is the model, compiled or not."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(7)
    loss = torch.zeros(())
    for tensor in at_tokens(called(**inputs, **flags), inputs["attention_mask"]).values():
        loss = loss.to(tensor.device) + (tensor * torch.randn(tensor.shape, generator=generator).to(tensor)).mean()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == dict(model.named_parameters()).keys()
    return loss.detach(), found


def check_training(
    compiled: Any, model: Any, plain: Any, inputs: dict[str, torch.Tensor], flags: dict[str, Any]
) -> str:
    loss, grads = gradients(compiled, model, inputs, flags)
    own_loss, own = gradients(model, model, inputs, flags)
    plain_loss, theirs = gradients(plain, plain, inputs, flags)
    uncompiled, eager = apart_relatively(grads, own), apart_relatively(grads, theirs)
    assert max(abs(loss - own_loss), abs(loss - plain_loss)) <= 1e-5
    assert uncompiled <= 1e-4
    assert eager <= 1e-4
    shape = tuple(inputs["input_ids"].shape)
    return f"{shape}: gradients {uncompiled:.1e} from the model uncompiled, {eager:.1e} from Hugging Face"


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS)
def test_forward_of_padded_batches(device: torch.device, flags: dict[str, Any]) -> None:
    plain, fused = pair(device, num_hidden_layers=1)
    compiled = torch.compile(fused, fullgraph=True, dynamic=True)
    for shape in RAGGED:
        print(check_forward(compiled, fused, plain, batch(*shape, device), flags))
    assert graphs() == 1


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({}, id="two outputs", marks=pytest.mark.slow),
        pytest.param(ALL, id="all outputs", marks=pytest.mark.slow),
    ],
)
def test_training_on_padded_batches(device: torch.device, flags: dict[str, Any]) -> None:
    plain, fused = pair(device, num_hidden_layers=1)
    compiled = torch.compile(fused.train(), fullgraph=True, dynamic=True)
    for shape in RAGGED:
        print(check_training(compiled, fused, plain.train(), batch(*shape, device), flags))
    assert graphs() == 1


@pytest.mark.slow
def test_a_real_checkpoint(checkpoint: Path, device: torch.device) -> None:
    texts = ["Hello, my dog is cute", "no", "A sentence that is a good deal longer than the other two, as ever."]
    inputs = dict(transformers.AutoTokenizer.from_pretrained(checkpoint)(texts, padding=True, return_tensors="pt"))
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    plain: Any = transformers.BertModel.from_pretrained(checkpoint, attn_implementation="eager", **dropout)
    fused: Any = fastbert.BertModel.from_pretrained(checkpoint, **dropout)
    plain, fused = plain.to(device), fused.to(device)
    compiled = torch.compile(fused, fullgraph=True, dynamic=True)
    print(check_forward(compiled, fused.eval(), plain.eval(), inputs, ALL, everywhere=False))
    # This checkpoint was trained on tokens only: in rows of padding, rounding grows by a hundred, eager's as well.
    exact, padding = tensors(run(copy.deepcopy(plain).double(), inputs, ALL)), ~inputs["attention_mask"].bool()
    errors = {
        model: max(
            (tensors(run(model, inputs, ALL))[name] - exact[name])[padding].abs().max().item()
            for name in exact
            if "hidden" in name
        )
        for model in (compiled, plain)
    }
    assert 0 < errors[compiled] <= 2 * errors[plain]
    print(check_training(compiled, fused.train(), plain.train(), inputs, ALL))


#: dynamic=True makes a graph for all shapes at once. Left to itself, torch makes one for the first shape, and one for
#: all shapes when a second one comes.
@pytest.mark.parametrize(
    ("train", "dynamic", "expected"),
    [
        pytest.param(False, True, [1] * 20, id="forward, dynamic"),
        pytest.param(False, None, [1] + [2] * 19, id="forward, default"),
        pytest.param(True, True, [1] * 20, id="training, dynamic", marks=pytest.mark.slow),
        pytest.param(True, None, [1] + [2] * 19, id="training, default", marks=pytest.mark.slow),
    ],
)
def test_graphs_made_for_twenty_shapes(
    device: torch.device, train: bool, dynamic: bool | None, expected: list[int]
) -> None:
    _, fused = pair(device, num_hidden_layers=1)
    compiled = torch.compile(fused.train(train), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    made = []
    for shape in SHAPES:
        inputs = batch(*shape, device)
        if train:
            gradients(compiled, fused, inputs, ALL)
        else:
            got = run(compiled, inputs, {})
            assert_close(got.last_hidden_state, run(fused, inputs, {}).last_hidden_state)
        made.append(graphs())
    assert made == expected


def test_batches_of_one_share_a_graph(device: torch.device) -> None:
    """A size of 1 broadcasts, so torch makes a graph of its own for it: one, whatever the length and fill."""
    _, fused = pair(device, num_hidden_layers=1)
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="eager")
    made = []
    for shape in [(3, 11, 0.9), (1, 5, 1.0), (1, 40, 0.5), (1, 17, 1.0), (4, 9, 0.7)]:
        run(compiled, batch(*shape, device), {})
        made.append(graphs())
    assert made == [1, 2, 2, 2, 2]


def exported(model: torch.nn.Module, flags: dict[str, Any]) -> torch.export.ExportedProgram:
    """The model as a program for every batch size and length."""
    inputs = batch(3, 11, 0.9)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq", max=model.config.max_position_embeddings)}
    shapes: dict[str, Any] = dict.fromkeys(inputs, axes) | dict.fromkeys(flags)
    with torch.no_grad():
        return torch.export.export(model, (), inputs | flags, dynamic_shapes=shapes)


#: An exported program takes sizes of 1 as well.
EXPORTED = [*RAGGED, (1, 9, 1.0), (1, 33, 0.4), (4, 1, 1.0)]


@pytest.mark.filterwarnings("ignore:No complete tensor found")  # query, key and value are parts of one storage
@pytest.mark.parametrize("flags", FLAGS)
def test_an_exported_program_saved_and_loaded(tmp_path: Path, flags: dict[str, Any]) -> None:
    plain, fused = pair()
    program = exported(fused, flags)
    ops = {node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    assert {op.namespace for op in ops} == {"aten"}  # nothing that needs fastbert where the program is loaded
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for shape in EXPORTED:
        print(check_forward(loaded, fused, plain, batch(*shape), flags))


def test_an_exported_program_is_fused_whole(caplog: pytest.LogCaptureFixture) -> None:
    fastbert.notices.say_once.cache_clear()
    _, fused = pair(num_hidden_layers=1)
    with caplog.at_level(logging.WARNING, "fastbert"):
        exported(fused, {})
    assert caplog.text == ""


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS)
def test_an_aot_inductor_package(tmp_path: Path, flags: dict[str, Any]) -> None:
    plain, fused = pair(num_hidden_layers=1)
    path = torch._inductor.aoti_compile_and_package(exported(fused, flags), package_path=str(tmp_path / "model.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for shape in EXPORTED:
        print(check_forward(package, fused, plain, batch(*shape), flags))

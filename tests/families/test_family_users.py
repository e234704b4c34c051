"""What people do with a model works with every family: checkpointing, compiling, prefixes, adapters, hooks, changes."""

import copy
import functools
from typing import Any

import pytest
import torch
from comparison import assert_equal_gradients, assert_equals, gradients, named_tensors, zeroed
from family_table import SEQ, Family, each_decoding, each_family
from models import assert_close
from torch import nn
from transformers import DynamicCache

import fastbert
from fastbert.batch.prefix import CACHE
from fastbert.distill import capture

ALL = {"output_hidden_states": True, "output_attentions": True}


def at(model: Any, path: str) -> Any:
    """What an encoder model has at a path, which may end in a function's name."""
    return functools.reduce(getattr, path.split("."), model)


@each_family
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(family: Family, reentrant: bool) -> None:
    _, fused = family.pair(dropout=0.2)
    fused.train()
    given = family.batch()

    def run() -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        out = named_tensors(fused(**given, output_attentions=not reentrant))
        return {name: grad.clone() for name, grad in gradients(fused, out).items()}

    wanted = run()
    fused.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_equal_gradients(run(), wanted, 1e-6)
    assert fastbert.explain(fused).fused


@each_family
def test_distill_capture_keeps_the_projections(family: Family) -> None:
    plain, fused = family.pair(packing=True)
    given = family.batch("pad inside")
    tokens = given["attention_mask"].bool()
    with capture(fused, layers=[0, -1]) as captured:
        fused(**given)
        assert fastbert.explain(fused).fused
    states = plain(**given, output_hidden_states=True).hidden_states
    for i, found in enumerate(captured):
        wanted = [at(plain, family.name(path, i))(states[i][tokens]) for path in family.projections]
        assert_close(found.qkv, torch.stack(wanted, 1).unflatten(2, (4, 8)))


@each_decoding
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", ["ragged", "pad inside"])
def test_a_prefix_gives_what_eager_gives(family: Family, kind: str, packing: bool) -> None:
    plain, fused = family.pair(packing=packing)
    given = family.batch(kind)
    mask = given["attention_mask"]
    given["attention_mask"] = torch.cat([torch.ones(3, 5, dtype=torch.long), mask], 1)
    parts = torch.randn(2, 2, 3, 4, 5, 8)  # layers, keys and values
    runs = []
    for model in (fused, plain):
        leaf, cache = parts.clone().requires_grad_(), DynamicCache()
        for i, (keys, values) in enumerate(leaf):
            cache.update(keys, values, i)
        out = named_tensors(model(**given, **{CACHE: cache}, **ALL))
        out = {name: x for name, x in out.items() if not name.startswith(CACHE)}
        out = zeroed(plain, out, mask) if packing and model is plain else out
        runs.append((out, gradients(model, out), leaf.grad))
    (ours, found, ours_leaf), (theirs, wanted, theirs_leaf) = runs
    assert_equals(ours, theirs)
    assert_equal_gradients(found, wanted)
    assert (ours_leaf - theirs_leaf).norm() <= 1e-4 * theirs_leaf.norm()


@each_family
def test_hooks_see_hugging_faces_shapes(family: Family) -> None:
    plain, fused = family.pair(packing=True)
    given = family.batch()
    names = ["embeddings", *[family.name(path, 0) for path in family.projections], f"{family.layers}.1"]
    seen: dict[nn.Module, list[torch.Size]] = {plain: [], fused: []}
    for model, shapes in seen.items():
        for name in names:
            model.get_submodule(name).register_forward_hook(
                lambda module, args, output, shapes=shapes: shapes.append(output.shape)
            )
    ours, theirs = fused(**given), plain(**given)
    assert seen[fused] == seen[plain]
    assert len(seen[fused]) == 5
    assert_equals(named_tensors(ours), zeroed(plain, named_tensors(theirs), given["attention_mask"]))


@each_family
def test_a_hook_on_an_attention_may_change_its_output(family: Family) -> None:
    plain, fused = family.pair()
    given = family.batch()
    for model in (plain, fused):
        attention = model.get_submodule(family.name(family.projections[0].rpartition(".")[0], 0))
        attention.register_forward_hook(lambda module, args, output: (2.0 * output[0], *output[1:]))
    assert_equals(named_tensors(fused(**given)), named_tensors(plain(**given)))


@each_family
def test_an_odd_layer_norm_is_called(family: Family) -> None:
    class Doubled(nn.LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2.0 * super().forward(x)

    plain, fused = family.pair()
    given = family.batch()
    for model in (plain, fused):
        at(model, family.name(family.norm, 0)).__class__ = Doubled
    assert_equals(named_tensors(fused(**given)), named_tensors(plain(**given)))
    told = fastbert.explain(fused)
    assert not told.fused
    assert [part.layer for part in told.parts if not part.fused] == [0]
    assert "Doubled" in str(told)


@each_family
@pytest.mark.parametrize("packing", [True, False])
def test_a_replaced_chunk_of_the_feed_forward_part_is_called(family: Family, packing: bool) -> None:
    plain, fused = family.pair(packing=packing)
    given = family.batch()
    owner, _, name = family.name(family.chunk, 0).rpartition(".")
    for model in (plain, fused):
        theirs = getattr(type(plain.get_submodule(owner)), name)
        part = model.get_submodule(owner)
        setattr(part, name, lambda x, part=part, theirs=theirs: 2.0 * theirs(part, x))
    ours, wanted = named_tensors(fused(**given)), named_tensors(plain(**given))
    assert_equals(ours, zeroed(plain, wanted, given["attention_mask"]) if packing else wanted)


@each_family
def test_a_feed_forward_part_in_chunks(family: Family) -> None:
    plain, fused = family.pair(chunk_size_feed_forward=SEQ)
    given = family.batch()
    ours, theirs = named_tensors(fused(**given, **ALL)), named_tensors(plain(**given, **ALL))
    assert_equals(ours, theirs)
    assert_equal_gradients(gradients(fused, ours), gradients(plain, theirs))


@each_family
def test_an_activation_that_no_kernel_has_is_called(family: Family) -> None:
    name = "activation" if "activation" in vars(family.config()) else "hidden_act"
    plain, fused = family.pair(**{name: "quick_gelu"})
    given = family.batch()
    ours, theirs = named_tensors(fused(**given)), named_tensors(plain(**given))
    assert_equals(ours, theirs)
    assert_equal_gradients(gradients(fused, ours), gradients(plain, theirs))
    assert "no kernel has the activation" in str(fastbert.explain(fused))


@pytest.mark.slow
@each_family
@pytest.mark.parametrize("flags", [{}, {"output_attentions": True, "output_hidden_states": [0, -1]}])
def test_one_graph_without_breaks(family: Family, flags: dict[str, Any]) -> None:
    _, fused = family.pair()
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for kind in ("ragged", "pad inside"):
        given = family.batch(kind)
        wanted, got = named_tensors(fused(**given, **flags)), named_tensors(compiled(**given, **flags))
        assert_equals(got, wanted)
        found = copy.deepcopy(gradients(fused, got))
        assert_equal_gradients(found, gradients(fused, wanted))


@pytest.mark.slow
@each_family
@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_adapters_of_peft(family: Family, targets: str) -> None:
    import peft

    plain, fused = family.pair("ForSequenceClassification")
    first, _, last = (path.rpartition(".")[2] for path in family.projections)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=[first, last] if targets == "attention" else targets
    )
    adapted = []
    for model in (fused, plain):
        torch.manual_seed(1)
        made = peft.get_peft_model(model, copy.deepcopy(config)).eval()
        with torch.no_grad():
            for p in made.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape) * 0.2)
        adapted.append(made)
    given = family.labelled("ForSequenceClassification")
    ours, theirs = (model(**given) for model in adapted)
    assert_equals(named_tensors(ours), named_tensors(theirs))
    found = []
    for model, out in zip(adapted, (ours, theirs), strict=True):
        out.loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_equal_gradients(*found)
    assert fastbert.explain(adapted[0]).fused

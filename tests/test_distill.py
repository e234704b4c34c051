"""Attention distillation: the loss against its definition on real models, what `capture` keeps, and bad input."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import ids, mask_of, pair, tiny_config

import fastbert
from fastbert.distill import Projections, attention_loss, capture
from fastbert_kernels import backend

KINDS = ("kl", "mse_scores", "query_relation", "key_relation", "value_relation")
LENGTHS = [11, 4, 7]


def model(**changes: Any) -> fastbert.BertModel:
    return pair(**changes)[1]


def batch(lengths: list[int] | None = LENGTHS) -> dict[str, torch.Tensor]:
    return {"input_ids": ids()} | ({} if lengths is None else {"attention_mask": mask_of(lengths, 11)})


def layer_inputs(bert: transformers.BertModel, inputs: dict[str, torch.Tensor], layer: int) -> list[torch.Tensor]:
    """Query, key and value of a layer of Hugging Face's model, each (batch, seq, hidden)."""
    attention = bert.encoder.layer[layer].attention.self
    hidden = bert(**inputs, output_hidden_states=True).hidden_states[layer]
    return [attention.query(hidden), attention.key(hidden), attention.value(hidden)]


def plain_loss(
    student: list[torch.Tensor], teacher: list[torch.Tensor], kind: str, heads: tuple[int, int], mask: torch.Tensor
) -> torch.Tensor:
    """The loss as one writes it in plain PyTorch, maps and padding and all."""
    first, second = {"query_relation": (0, 0), "key_relation": (1, 1), "value_relation": (2, 2)}.get(kind, (0, 1))
    visible = mask[:, None, None, :].bool()
    scores = []
    for parts, count in ((student, heads[0]), (teacher, heads[1])):
        a, b = (x.unflatten(2, (count, -1)).transpose(1, 2) for x in (parts[first], parts[second]))
        scores.append(a @ b.transpose(2, 3) / a.shape[-1] ** 0.5)
    s, t = scores
    if kind == "mse_scores":
        pairs = (visible & visible.transpose(2, 3)).expand_as(s)
        return F.mse_loss(s[pairs], t[pairs])
    log_s, log_t = (x.masked_fill(~visible, -1e30).log_softmax(-1) for x in (s, t))
    rows = F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)
    return rows[mask[:, None, :].bool().expand_as(rows)].mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("teacher_changes", "relation_heads"),
    [
        ({}, None),
        ({"hidden_size": 48}, None),  # as many heads, of another size
        ({"num_attention_heads": 2}, 8),
        ({"hidden_size": 48, "num_attention_heads": 6}, 2),
    ],
)
@pytest.mark.parametrize("backend_name", ["triton", "torch"])
def test_loss_and_gradients_equal_the_plain_definition(
    kind: str, teacher_changes: dict[str, Any], relation_heads: int | None, backend_name: str
) -> None:
    """float32: 1e-5 forward and 1e-4 of the largest gradient, in every parameter of the student."""
    (plain, fused), (plain_teacher, teacher) = pair(initializer_range=0.2), pair(**teacher_changes)
    inputs = batch()
    with capture(teacher) as theirs, torch.no_grad():
        teacher(**inputs)
    with capture(fused) as ours:
        fused(**inputs)
    with backend(backend_name):
        loss = attention_loss(ours[0], theirs[0], kind, relation_heads=relation_heads)
    loss.backward()
    with torch.no_grad():
        wanted_teacher = layer_inputs(plain_teacher, inputs, 1)
    heads = tuple(relation_heads or m.config.num_attention_heads for m in (plain, plain_teacher))
    want = plain_loss(layer_inputs(plain, inputs, 1), wanted_teacher, kind, heads, inputs["attention_mask"])
    want.backward()
    assert abs(loss.item() - want.item()) <= 1e-5 * max(1.0, want.item())
    assert want.item() > 1e-2
    grads = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    largest = max(g.abs().max().item() for g in grads.values())
    for name, p in fused.named_parameters():
        if name in grads:
            assert (p.grad - grads[name]).abs().max().item() <= 1e-4 * largest, name
        else:
            assert p.grad is None or not p.grad.any(), name
    assert all(p.grad is None for p in teacher.parameters())


def test_captured_layers_stay_fused_and_packed() -> None:
    bert, inputs = model(), batch()
    want = bert(**inputs, output_attentions=True)
    with capture(bert, layers=[-1, 0]) as captured:
        got = bert(**inputs, output_attentions=True)
        assert fastbert.explain(bert).fused
    assert torch.equal(got.last_hidden_state, want.last_hidden_state)
    assert [c.qkv.shape for c in captured] == [(sum(LENGTHS), 3, 4, 8)] * 2
    for c, layer in zip(captured, (1, 0), strict=True):
        assert c.cu_seqlens is not None
        assert c.cu_seqlens.tolist() == [0, 11, 15, 22]
        assert c.max_seqlen == 11
        q, k, _ = c.qkv[11:15].permute(1, 2, 0, 3)  # the second sequence
        probs = (q @ k.transpose(1, 2) * 8**-0.5).softmax(-1)
        torch.testing.assert_close(probs, want.attentions[layer][1, :, :4, :4])


def test_nothing_is_left_on_the_model() -> None:
    bert = model()
    bert(**batch())
    before = [set(module.__dict__) for module in bert.modules()]
    with capture(bert):
        bert(**batch())
    with pytest.raises(IndexError), capture(bert):
        bert(torch.tensor([[99]]))  # out of the vocabulary, half way through
    assert [set(module.__dict__) for module in bert.modules()] == before
    assert not bert._forward_hooks
    assert not bert._forward_pre_hooks


def test_last_forward_pass_counts() -> None:
    bert = model()
    with capture(bert) as captured:
        bert(ids(seq=5))
        bert(ids(seq=9))
    assert len(captured) == 1
    assert captured[0].qkv.shape[0] == 27


def test_batches_without_padding_and_packed_ones_mix() -> None:
    """The same sequences, with and without cu_seqlens."""
    student, teacher = model(), model()
    tokens = ids()
    packed = {
        "cu_seq_lens_q": torch.tensor([0, 11, 22, 33], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, 11, 22, 33], dtype=torch.int32),
        "max_length_q": 11,
        "max_length_k": 11,
    }
    losses = []
    for kind in ("kl", "mse_scores"):
        for packs in ("neither", "student", "teacher", "both"):
            captures = []
            for name, bert in (("student", student), ("teacher", teacher)):
                with capture(bert) as captured:
                    bert(tokens.view(1, 33), **packed) if packs in (name, "both") else bert(tokens)
                captures += captured
            losses.append(attention_loss(*captures, kind).item())
    assert losses[:4] == pytest.approx([losses[0]] * 4, rel=1e-5)
    assert losses[4:] == pytest.approx([losses[4]] * 4, rel=1e-5)


def test_no_tokens_is_no_loss() -> None:
    empty = Projections(torch.zeros(0, 3, 4, 8, requires_grad=True), torch.zeros(3, dtype=torch.int32), 11)
    for kind in KINDS:
        loss = attention_loss(empty, empty, kind)
        assert loss.item() == 0.0
        loss.backward()


def test_loss_is_nothing_between_a_model_and_itself() -> None:
    bert = model()
    with capture(bert) as captured:
        bert(**batch())
    for kind in KINDS:
        assert abs(attention_loss(captured[0], captured[0], kind).item()) < 1e-6


def test_heads_of_one_model_are_found_in_the_classifier_around_it() -> None:
    classifier = fastbert.BertForSequenceClassification(tiny_config(attention_probs_dropout_prob=0.1)).train()
    with capture(classifier) as captured:
        logits = classifier(**batch()).logits
    (logits.sum() + attention_loss(captured[0], captured[0], "mse_scores")).backward()
    assert captured[0].qkv.requires_grad


def test_whole_step_on_the_kernels() -> None:
    """Models and loss interpreted, or on a GPU, give the step of plain PyTorch."""
    student, teacher, inputs = model(), model(num_attention_heads=2), batch()
    results = []
    for backend_name in ("torch", "triton"):
        student.zero_grad()
        with backend(backend_name):
            with capture(teacher) as theirs, torch.no_grad():
                teacher(**inputs)
            with capture(student) as ours:
                student(**inputs)
            loss = attention_loss(ours[0], theirs[0], relation_heads=8)
            loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in student.parameters() if p.grad is not None)])
    for x, y in zip(*results, strict=True):
        assert (x - y).abs().max() <= 1e-4 * x.abs().max() + 1e-5


@pytest.mark.parametrize("inside", [False, True])
def test_gradients_pass_through_checkpointed_layers(inside: bool) -> None:
    """The backward pass runs the layers again, and captures nothing by it, even inside the block."""
    student, teacher, inputs = model().train(), model(), batch()
    with capture(teacher) as theirs, torch.no_grad():
        teacher(**inputs)
    grads = []
    for checkpointing in (False, True):
        student.zero_grad()
        if checkpointing:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with capture(student) as ours:
            student(**inputs)
            kept = ours[0]
            if inside:
                attention_loss(ours[0], theirs[0]).backward()
        if not inside:
            attention_loss(ours[0], theirs[0]).backward()
        assert ours[0] is kept
        grads.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    message = "reentrant gradient checkpointing detaches the projections"
    with pytest.raises(ValueError, match=message), capture(student):
        student(**inputs)


def test_compiled_model_without_padding() -> None:
    bert = model()
    compiled = torch.compile(bert, backend="eager")
    tokens = ids()
    with capture(bert) as want, torch.no_grad():
        bert(tokens)
    with capture(bert) as got, torch.no_grad():
        compiled(tokens)
    torch.testing.assert_close(got[0].qkv, want[0].qkv)


def test_training_brings_the_student_closer() -> None:
    student, teacher, inputs = model(initializer_range=0.1).train(), model(), batch()
    with capture(teacher) as theirs, torch.no_grad():
        teacher(**inputs)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        with capture(student) as ours:
            student(**inputs)
        loss = attention_loss(ours[0], theirs[0]) + attention_loss(ours[0], theirs[0], "value_relation")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that any op gives, and all that autograd saves, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def test_neither_map_is_stored() -> None:
    """Twice the length, twice the memory: what is saved for the backward pass, and the largest tensor of all."""
    heads, dim = 2, 8
    saved, largest = [], []
    for length in (512, 1024):
        ours, theirs = (
            Projections(torch.randn(length, 3, heads, dim, requires_grad=needs), None, length)
            for needs in (True, False)
        )
        storages: dict[int, int] = {}

        def keep(x: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), _Largest() as mode:
            attention_loss(ours, theirs).backward()
        saved.append(sum(storages.values()))
        largest.append(mode.largest)
    assert saved[1] <= 2 * saved[0] <= 2 * 2 * 512 * 3 * heads * dim + 100
    assert largest[1] <= 2 * largest[0] < heads * 512 * 512


# Bad input


def projections(tokens: int = 14, heads: int = 2, dim: int = 16, lengths: tuple[int, ...] = (9, 5)) -> Projections:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return Projections(torch.randn(tokens, 3, heads, dim), cu_seqlens, max(lengths))


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        ({}, {"kind": "cosine"}, f"unknown kind 'cosine' of attention loss: it is one of {', '.join(KINDS[:2])}"),
        ({"tokens": 15, "lengths": (9, 6)}, {}, "the same tokens, got 14 in 2 sequences and 15 in 2"),
        ({"lengths": (5, 5, 4)}, {}, "the same tokens, got 14 in 2 sequences and 14 in 3"),
        ({"lengths": (5, 9)}, {}, "the same sequences, got cu_seqlens [0, 9, 14] and [0, 5, 14]"),
        ({"heads": 4}, {}, "the student has 2 heads and the teacher 4: pass relation_heads"),
        ({"heads": 3}, {"relation_heads": 32}, "relation_heads must divide the teacher's hidden size 48, got 32"),
        ({}, {"relation_heads": 5}, "relation_heads must divide the student's hidden size 32, got 5"),
        ({}, {"relation_heads": 0}, "relation_heads must divide the student's hidden size 32, got 0"),
        ({"dim": 144}, {}, "hidden size 288 have dim 144, over the kernels' 128: pass relation_heads of at least 3"),
    ],
)
def test_bad_input(teacher: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        attention_loss(projections(), projections(**teacher), **options)


def test_equal_lengths_against_ragged_ones() -> None:
    dense = Projections(torch.randn(14, 3, 2, 16), None, 7)
    with pytest.raises(ValueError, match=re.escape("got cu_seqlens [0, 7, 14] and [0, 9, 14]")):
        attention_loss(dense, projections())
    with pytest.raises(ValueError, match=re.escape("got cu_seqlens [0, 9, 14] and [0, 7, 14]")):
        attention_loss(projections(), dense)


def test_models_on_different_devices() -> None:
    theirs = Projections(torch.zeros(14, 3, 2, 16, device="meta"), None, 7)
    with pytest.raises(ValueError, match="attention_loss needs every tensor on one device, got student on cpu"):
        attention_loss(projections(), theirs)


def test_projections_of_another_shape() -> None:
    with pytest.raises(ValueError, match=re.escape("(tokens, 3, heads, head_dim), got (14, 2, 16)")):
        Projections(torch.zeros(14, 2, 16), None, 7)


def test_models_that_cannot_be_captured() -> None:
    plain, fused = pair()
    cases = [
        (plain, (-1,), "the attention of layer -1 is not fused, and only fused layers are captured"),
        (fused, (2,), "there is no layer 2 to capture: the model has 2"),
        (fused, (-3,), "there is no layer -3"),
        (torch.nn.Linear(2, 2), (-1,), "exactly one BertModel, got Linear with 0"),
        (torch.nn.ModuleList([plain, fused]), (-1,), "got ModuleList with 2"),
    ]
    for bert, layers, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)), capture(bert, layers):
            pass


def test_batches_that_cannot_be_captured() -> None:
    bert, mask = model(), mask_of(LENGTHS, 11)
    message = "takes batches whose padding was dropped, or that have none, but this layer attends under a mask"
    with pytest.raises(ValueError, match=message), capture(bert):
        bert(ids(), attention_mask=mask[:, None, None, :].bool())
    bert.packing = False
    with pytest.raises(ValueError, match=message), capture(bert):
        bert(ids(), attention_mask=mask)
    with pytest.raises(ValueError, match="knows no cache"), capture(bert):
        bert(ids(), past_key_values=transformers.DynamicCache())


def test_captures_that_capture_nothing() -> None:
    bert = model()
    message = "nothing was captured: BertModel was not called inside the block"
    with pytest.raises(RuntimeError, match=message), capture(bert):
        pass
    with pytest.raises(RuntimeError, match="captured already"), capture(bert), capture(bert):
        pass
    with capture(bert) as captured:  # nothing of it is left
        bert(ids())
    assert len(captured) == 1


def test_one_layer_twice() -> None:
    bert = model()
    with capture(bert, layers=(1, -1)) as captured:
        bert(ids())
    assert captured[0] is captured[1]


def test_found_under_its_name() -> None:
    assert "distill" in fastbert.__all__
    assert fastbert.distill.attention_loss is attention_loss

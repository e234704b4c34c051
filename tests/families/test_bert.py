"""What Hugging Face's BertModel does in each odd case, and what fastbert does, on both backends."""

import logging
from collections.abc import Iterator

import pytest
import torch
import transformers
from models import assert_close, ids, mask_of, pair, randomize, tiny_config
from transformers.utils import output_capturing

import fastbert
from fastbert.batch.prefix import CACHE
from fastbert_kernels import backend


@pytest.fixture(params=["torch", "triton"], autouse=True)
def backend_name(request: pytest.FixtureRequest) -> Iterator[str]:
    with backend(request.param):
        yield request.param


def both_flags() -> dict[str, bool]:
    return {"output_attentions": True, "output_hidden_states": True}


def test_four_outputs_equal_eager(device: torch.device) -> None:
    plain, fused = pair(device)
    x = ids(device=device)
    theirs, ours = plain(x, **both_flags()), fused(x, **both_flags())
    assert list(ours.keys()) == list(theirs.keys())
    assert_close(ours.last_hidden_state, theirs.last_hidden_state)
    assert_close(ours.pooler_output, theirs.pooler_output)
    for name in ("hidden_states", "attentions"):
        assert len(ours[name]) == len(theirs[name])
        for a, b in zip(ours[name], theirs[name], strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.long, torch.float32])
def test_ragged_batch_equals_eager_at_tokens_and_is_zero_at_padding(
    device: torch.device, mask_dtype: torch.dtype
) -> None:
    plain, fused = pair(device)
    x, mask = ids(device=device), mask_of([11, 1, 6], 11, device)
    types = torch.randint(0, 2, x.shape, device=device)
    # Hugging Face reads a 0-1 float mask as bool too.
    theirs = plain(x, mask.to(mask_dtype), types, **both_flags())
    ours = fused(x, mask.to(mask_dtype), types, **both_flags())
    tokens = mask.bool()
    squares = (tokens[:, None, :, None] & tokens[:, None, None, :]).expand(-1, 4, -1, -1)
    assert_close(ours.pooler_output, theirs.pooler_output)
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert_close(a, b, tokens)
        assert (a[~tokens] == 0).all()
    for a, b in zip(ours.attentions, theirs.attentions, strict=True):
        assert_close(a, b, squares)
        assert (a[~squares] == 0).all()


def test_without_packing_padding_rows_equal_eager_too(device: torch.device) -> None:
    plain, fused = pair(device)
    fused.packing = False
    x, mask = ids(device=device), mask_of([11, 1, 6], 11, device)
    theirs, ours = plain(x, mask, **both_flags()), fused(x, mask, **both_flags())
    for a, b in zip((*ours.hidden_states, *ours.attentions), (*theirs.hidden_states, *theirs.attentions), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("layers", [1, 2])
def test_head_mask_multiplies_probabilities_and_has_a_gradient(device: torch.device, layers: int) -> None:
    plain, fused = pair(device)
    x, mask = ids(device=device), mask_of([11, 4, 6], 11, device)
    factors = torch.tensor([[1.0, 0.0, 0.5, 2.0], [0.0, 1.0, 1.5, 1.0]], device=device)[-layers:]
    head_mask = (factors if layers == 2 else factors[0]).requires_grad_()
    ours = fused(x, mask, head_mask=head_mask, output_attentions=True)

    # The same by hand, from Hugging Face's own modules: probabilities scaled by a hook on the value's weighting.
    per_layer = factors.detach().expand(2, 4)
    plain.double()
    hidden = plain.embeddings(x)
    bias = torch.zeros(mask.shape, dtype=torch.float64, device=device).masked_fill(mask == 0, -1e300)[:, None, None, :]
    reference_mask = per_layer.double().requires_grad_()
    maps = []
    for i, layer in enumerate(plain.encoder.layer):
        block = layer.attention.self
        q, k, v = (proj(hidden).view(3, 11, 4, 8).transpose(1, 2) for proj in (block.query, block.key, block.value))
        probs = torch.softmax(q @ k.transpose(2, 3) * 8**-0.5 + bias, -1) * reference_mask[i][None, :, None, None]
        maps.append(probs)
        context = (probs @ v).transpose(1, 2).reshape(3, 11, 32)
        attended = layer.attention.output(context, hidden)
        hidden = layer.output(layer.intermediate(attended), attended)
    tokens = mask.bool()
    assert_close(ours.last_hidden_state, hidden.float(), tokens)
    squares = (tokens[:, None, :, None] & tokens[:, None, None, :]).expand(-1, 4, -1, -1)
    for a, b in zip(ours.attentions, maps, strict=True):
        assert_close(a, b.float(), squares)

    cotangent = torch.randn_like(hidden) * tokens[:, :, None]
    (ours.last_hidden_state * cotangent.float()).sum().backward()
    (hidden * cotangent).sum().backward()
    wanted = reference_mask.grad if layers == 2 else reference_mask.grad.sum(0)
    torch.testing.assert_close(head_mask.grad, wanted.float(), rtol=1e-3, atol=1e-4)


def test_attentions_are_asked_for_by_config_at_three_moments(device: torch.device, tmp_path: object) -> None:
    x = ids(device=device)
    by_config = fastbert.BertModel(tiny_config(output_attentions=True)).to(device).eval()
    assert len(by_config(x).attentions) == 2
    later = fastbert.BertModel(transformers.BertConfig(**tiny_config(attn_implementation=None).to_diff_dict()))
    later.config.output_attentions = True
    assert len(later.to(device).eval()(x).attentions) == 2
    later.config.output_attentions = False
    later.save_pretrained(tmp_path)
    loaded = fastbert.BertModel.from_pretrained(tmp_path, output_attentions=True).to(device).eval()
    assert len(loaded(x).attentions) == 2


def test_train_mode_attentions_are_after_dropout_and_carry_gradients(device: torch.device) -> None:
    _, fused = pair(device, attention_probs_dropout_prob=0.4)
    fused.train()
    maps = fused(ids(device=device), output_attentions=True).attentions
    rows = maps[0].sum(-1)
    assert not torch.allclose(rows, torch.ones_like(rows), atol=1e-2)
    assert 0.2 < (maps[0] == 0).float().mean() < 0.6
    maps[-1].retain_grad()
    (maps[-1] ** 2).sum().backward()
    torch.testing.assert_close(maps[-1].grad, 2 * maps[-1].detach())
    assert fused.encoder.layer[-1].attention.self.query.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_checkpointing_gives_the_same_gradients_and_the_same_dropout(
    device: torch.device, reentrant: bool, caplog: pytest.LogCaptureFixture
) -> None:
    _, fused = pair(device, attention_probs_dropout_prob=0.2, hidden_dropout_prob=0.2)
    fused.train()
    x, mask = ids(device=device), mask_of([11, 4, 6], 11, device)

    def gradients() -> tuple[list[torch.Tensor], torch.Tensor]:
        torch.manual_seed(5)
        fused.zero_grad()
        out = fused(x, mask, output_attentions=True)
        loss = (out.last_hidden_state**3).sum()
        if not reentrant:
            loss = loss + (out.attentions[0] ** 2).sum()
        loss.backward()
        return [p.grad.clone() for p in fused.encoder.parameters()], out.attentions[0]

    wanted, _ = gradients()
    fused.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with caplog.at_level(logging.WARNING, "fastbert"):
        fastbert.notices.say_once.cache_clear()
        got, probs = gradients()
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert probs.requires_grad is not reentrant
    assert ("reentrant" in caplog.text) is reentrant


@pytest.mark.parametrize("selection", [[0, -1], [1], [7, -9], [], 0, 2, -1, True, False])
def test_hidden_states_selection_is_hugging_faces(device: torch.device, selection: object) -> None:
    if not isinstance(selection, bool) and not hasattr(output_capturing, "selected_hidden_states"):
        pytest.skip("this transformers cannot select hidden states")
    plain, fused = pair(device)
    x = ids(device=device)
    theirs, ours = plain(x, output_hidden_states=selection), fused(x, output_hidden_states=selection)
    assert (ours.hidden_states is None) == (theirs.hidden_states is None)
    for a, b in zip(ours.hidden_states or (), theirs.hidden_states or (), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b)


def test_attentions_take_the_same_selection(device: torch.device) -> None:
    _, fused = pair(device)
    x = ids(device=device)
    full = fused(x, output_attentions=True).attentions
    last = fused(x, output_attentions=[-1, 5]).attentions
    assert last[0] is None
    torch.testing.assert_close(last[1], full[1])
    assert fused(x, output_attentions=[]).attentions is None


def test_last_of_hidden_states_is_last_hidden_state(device: torch.device) -> None:
    _, fused = pair(device)
    out = fused(ids(device=device), mask_of([11, 4, 6], 11, device), output_hidden_states=True)
    assert out.hidden_states[-1] is out.last_hidden_state


def test_tuples_have_hugging_faces_order(device: torch.device) -> None:
    plain, fused = pair(device)
    x = ids(device=device)
    theirs, ours = (m(x, return_dict=False, **both_flags()) for m in (plain, fused))
    assert isinstance(ours, tuple)
    assert [len(part) if isinstance(part, tuple) else part.shape for part in ours] == [
        len(part) if isinstance(part, tuple) else part.shape for part in theirs
    ]
    assert_close(ours[0], theirs[0])
    assert_close(ours[1], theirs[1])
    fused.config.return_dict = False
    assert isinstance(fused(x), tuple)


def test_additive_2d_mask_is_an_error_that_says_how(device: torch.device) -> None:
    _, fused = pair(device)
    mask = mask_of([11, 4, 6], 11, device)
    with pytest.raises(ValueError, match=r"values from -10000 to -0.*four dimensions"):
        fused(ids(device=device), (1.0 - mask) * -10000.0)


@pytest.mark.parametrize("dims", [3, 4])
@pytest.mark.parametrize("kind", ["bool", "int", "additive"])
def test_dense_masks(device: torch.device, dims: int, kind: str) -> None:
    plain, fused = pair(device)
    x = ids(device=device)
    visible = torch.rand(3, 11, 11, device=device) > 0.4
    visible |= torch.eye(11, dtype=torch.bool, device=device)
    additive = torch.zeros(3, 11, 11, device=device).masked_fill(~visible, torch.finfo(torch.float32).min)
    mask = {"bool": visible, "int": visible.long(), "additive": additive}[kind]
    theirs = plain(x, additive[:, None], **both_flags())
    ours = fused(x, mask[:, None] if dims == 4 else mask, **both_flags())
    assert_close(ours.last_hidden_state, theirs.last_hidden_state)
    for a, b in zip(ours.attentions, theirs.attentions, strict=True):
        assert_close(a, b)


def test_dense_masks_broadcast_over_batch_heads_and_rows(device: torch.device) -> None:
    plain, fused = pair(device)
    x = ids(device=device)
    bias = torch.randn(1, 4, 1, 11, device=device)
    assert_close(fused(x, bias).last_hidden_state, plain(x, bias.expand(3, 4, 11, 11)).last_hidden_state)


def test_rows_with_no_visible_key_are_finite_forward_and_backward(device: torch.device) -> None:
    plain, fused = pair(device)
    x, mask = ids(device=device), mask_of([11, 0, 6], 11, device)
    out = fused(x, mask, **both_flags())
    assert (out.last_hidden_state[1] == 0).all()
    assert (out.attentions[0][1] == 0).all()
    assert_close(out.last_hidden_state[0], plain(x, mask).last_hidden_state[0])
    out.last_hidden_state.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in fused.parameters())

    fused.zero_grad()
    dense = torch.zeros(3, 1, 11, 11, device=device)
    dense[0, :, 2] = float("-inf")
    out = fused(x, dense, output_attentions=True)
    torch.testing.assert_close(out.attentions[0][0, :, 2], torch.full((4, 11), 1 / 11, device=device))
    out.last_hidden_state.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in fused.parameters())


def test_a_batch_of_padding_alone_gives_zeros(device: torch.device) -> None:
    _, fused = pair(device)
    out = fused(ids(device=device), mask_of([0, 0, 0], 11, device), **both_flags())
    assert (out.last_hidden_state == 0).all()
    assert (out.attentions[1] == 0).all()


def test_masks_with_left_padding_and_holes(device: torch.device) -> None:
    plain, fused = pair(device)
    x = ids(device=device)
    mask = mask_of([11, 4, 6], 11, device)
    mask[1] = mask[1].flip(0)
    mask[2, 2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for kwargs in ({}, {"position_ids": positions}):
        theirs, ours = plain(x, mask, **kwargs, **both_flags()), fused(x, mask, **kwargs, **both_flags())
        tokens = mask.bool()
        assert_close(ours.last_hidden_state, theirs.last_hidden_state, tokens)
        squares = (tokens[:, None, :, None] & tokens[:, None, None, :]).expand(-1, 4, -1, -1)
        for a, b in zip(ours.attentions, theirs.attentions, strict=True):
            assert_close(a, b, squares)
            assert (a[~squares] == 0).all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty_batches_are_an_error(device: torch.device, shape: tuple[int, int]) -> None:
    _, fused = pair(device)
    with pytest.raises(ValueError, match=f"batch {shape[0]} and length {shape[1]}"):
        fused(torch.zeros(shape, dtype=torch.long, device=device))


def test_too_long_is_an_error_with_both_lengths(device: torch.device) -> None:
    _, fused = pair(device)
    with pytest.raises(ValueError, match=r"length 41 is over .*max_position_embeddings=40"):
        fused(ids(1, 41, device))
    positions = (torch.arange(41, device=device) % 40)[None]
    assert fused(ids(1, 41, device), position_ids=positions).last_hidden_state.shape == (1, 41, 32)


def test_token_out_of_range(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused = pair(device)
    x = ids(device=device)
    x[0, 3] = 60
    monkeypatch.setenv("FASTBERT_CHECK", "1")
    with pytest.raises(IndexError, match="words holds 60, outside the 60 rows"):
        fused(x)


@pytest.mark.gpu
def test_token_out_of_range_on_a_gpu_reads_zero_and_leaves_the_context_alive(
    device: torch.device, backend_name: str
) -> None:
    if backend_name != "triton":
        pytest.skip("plain PyTorch asserts on the device")
    _, fused = pair(device)
    x = ids(device=device)
    x[0, 3] = 60_000
    assert fused(x).last_hidden_state.isfinite().all()


def test_decoder_takes_hugging_faces_path_and_says_so(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    plain, fused = pair(device, is_decoder=True)
    x = ids(device=device)
    fastbert.notices.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "fastbert"):
        ours = fused(x, **both_flags())
    assert "decoder" in caplog.text
    theirs = plain(x, **both_flags())
    assert_close(ours.last_hidden_state, theirs.last_hidden_state)
    assert_close(ours.attentions[1], theirs.attentions[1])
    assert ours[CACHE] is not None
    assert not fastbert.explain(fused).fused


def test_cross_attention_takes_hugging_faces_path(device: torch.device) -> None:
    plain, fused = pair(device, is_decoder=True, add_cross_attention=True)
    x, memory = ids(device=device), torch.randn(3, 5, 32, device=device)
    kwargs = {"encoder_hidden_states": memory, "output_attentions": True}
    theirs, ours = plain(x, **kwargs), fused(x, **kwargs)
    assert_close(ours.last_hidden_state, theirs.last_hidden_state)
    assert len(ours.cross_attentions) == 2


def test_a_cache_takes_hugging_faces_path_with_its_attentions(device: torch.device) -> None:
    plain, fused = pair(device)
    x = ids(device=device)
    theirs, ours = (m(x, **{CACHE: transformers.DynamicCache()}, **both_flags()) for m in (plain, fused))
    assert_close(ours.last_hidden_state, theirs.last_hidden_state)
    for a, b in zip(ours.attentions, theirs.attentions, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("low", [float("-inf"), torch.finfo(torch.float32).min, -1e9])
@pytest.mark.parametrize("maps", [False, True])
def test_gradients_of_a_row_with_no_visible_key_equal_eagers(device: torch.device, low: float, maps: bool) -> None:
    plain, fused = pair(device)
    x = ids(device=device)
    mask = torch.zeros(3, 1, 11, 11, device=device)
    mask[0, :, 2] = low
    mask[2] = low
    cotangent = torch.randn(3, 11, 32, device=device)
    finite = mask.clamp(min=torch.finfo(torch.float32).min)
    (plain(x, finite).last_hidden_state * cotangent).sum().backward()
    (fused(x, mask, output_attentions=maps).last_hidden_state * cotangent).sum().backward()
    for theirs, ours in zip(plain.encoder.parameters(), fused.encoder.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3 * theirs.grad.abs().max().item() + 1e-4)


def test_inputs_embeds(device: torch.device) -> None:
    plain, fused = pair(device)
    vectors = torch.randn(3, 11, 32, device=device)
    mask = mask_of([11, 4, 6], 11, device)
    grads = []
    for model in (plain, fused):
        leaf = vectors.clone().requires_grad_()
        out = model(inputs_embeds=leaf, attention_mask=mask)
        assert_close(out.last_hidden_state, plain(inputs_embeds=vectors, attention_mask=mask)[0], mask.bool())
        (out.last_hidden_state[mask.bool()] ** 3).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-3)


def test_a_hook_inside_sees_hugging_faces_shapes(device: torch.device) -> None:
    plain, fused = pair(device)
    x, mask = ids(device=device), mask_of([11, 4, 6], 11, device)
    seen: dict[str, torch.Size] = {}
    names = (
        "embeddings",
        "encoder.layer.1",
        "encoder.layer.0.attention.self.query",
        "encoder.layer.0.intermediate.dense",
    )
    handles = [
        fused.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, output.shape)
        )
        for name in names
    ]
    ours = fused(x, mask)
    assert seen == {name: torch.Size([3, 11, 48 if name.endswith("dense") else 32]) for name in names}
    assert_close(ours.last_hidden_state, plain(x, mask).last_hidden_state, mask.bool())
    assert (ours.last_hidden_state[mask == 0] == 0).all()
    for handle in handles:
        handle.remove()


def test_a_batch_the_caller_packed(device: torch.device) -> None:
    _, fused = pair(device)
    x, mask = ids(device=device), mask_of([11, 4, 6], 11, device)
    wanted = fused(x, mask, output_attentions=True)
    cu = torch.tensor([0, 11, 15, 21], dtype=torch.int32, device=device)
    names = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 11, "max_length_k": 11}
    got = fused(x[mask.bool()][None], output_attentions=True, **names)
    assert got.last_hidden_state.shape == (1, 21, 32)
    assert_close(got.last_hidden_state[0], wanted.last_hidden_state[mask.bool()])
    assert_close(got.attentions[1], wanted.attentions[1])
    with pytest.raises(ValueError, match="max_length_k missing"):
        fused(x[:1], **{k: v for k, v in names.items() if k != "max_length_k"})
    with pytest.raises(ValueError, match="got batch 3"):
        fused(x, **names)


@pytest.mark.parametrize("flags", [{}, {"output_attentions": True, "output_hidden_states": [0, -1]}])
def test_torch_compile_fullgraph(device: torch.device, backend_name: str, flags: dict[str, object]) -> None:
    if backend_name == "triton" and device.type == "cpu":
        pytest.skip("nothing traces the interpreter")
    _, fused = pair(device)
    x, mask = ids(device=device), mask_of([11, 4, 6], 11, device)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    wanted, got = fused(x, mask, **flags), compiled(x, mask, **flags)
    assert_close(got.last_hidden_state, wanted.last_hidden_state)
    assert_close(got.pooler_output, wanted.pooler_output)
    if flags:
        assert got.hidden_states[1] is None
        assert_close(got.attentions[1], wanted.attentions[1])
    got.last_hidden_state.square().sum().backward()
    compiled_grad = fused.encoder.layer[0].attention.self.key.weight.grad.clone()
    fused.zero_grad()
    wanted.last_hidden_state.square().sum().backward()
    torch.testing.assert_close(
        compiled_grad, fused.encoder.layer[0].attention.self.key.weight.grad, rtol=1e-3, atol=1e-3
    )


def test_compiled_additive_2d_mask_is_an_error_too(device: torch.device, backend_name: str) -> None:
    if backend_name == "triton" or device.type == "cuda":
        pytest.skip("an assertion on a GPU ends its context")
    _, fused = pair(device)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    mask = mask_of([11, 4, 6], 11, device)
    compiled(ids(device=device), mask.float())
    with pytest.raises(RuntimeError, match="holds only 0 and 1"):
        compiled(ids(device=device), (1.0 - mask) * -10000.0)


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu", "silu", "quick_gelu"])
def test_activations(device: torch.device, act: str, caplog: pytest.LogCaptureFixture) -> None:
    fastbert.notices.say_once.cache_clear()
    plain, fused = pair(device, hidden_act=act)
    x = ids(device=device)
    with caplog.at_level(logging.WARNING, "fastbert"):
        assert_close(fused(x).last_hidden_state, plain(x).last_hidden_state)
    assert ("no kernel has the activation" in caplog.text) is (act == "quick_gelu")
    assert fastbert.explain(fused).fused is (act != "quick_gelu")


def test_chunked_feed_forward(device: torch.device) -> None:
    plain, fused = pair(device, chunk_size_feed_forward=11)
    x = ids(3, 22, device)
    assert_close(fused(x).last_hidden_state, plain(x).last_hidden_state)


def test_dropout_repeats_with_the_seed_and_drops_its_fraction(device: torch.device) -> None:
    _, fused = pair(device, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    fused.train()
    x, mask = ids(4, 24, device), mask_of([24, 9, 24, 17], 24, device)

    def run(seed: int) -> transformers.utils.ModelOutput:
        torch.manual_seed(seed)
        return fused(x, mask, output_attentions=True, output_hidden_states=[0])

    first, again, other = run(1), run(1), run(2)
    assert torch.equal(first.last_hidden_state, again.last_hidden_state)
    assert not torch.equal(first.last_hidden_state, other.last_hidden_state)
    tokens = mask.bool()
    squares = (tokens[:, None, :, None] & tokens[:, None, None, :]).expand(-1, 4, -1, -1)
    for probs in first.attentions:
        assert abs((probs[squares] == 0).float().mean().item() - 0.3) < 0.03  # 7 thousand draws
    assert abs((first.hidden_states[0][tokens] == 0).float().mean().item() - 0.3) < 0.03
    assert not torch.equal(first.attentions[0] == 0, first.attentions[1] == 0)  # every layer draws its own


@pytest.mark.parametrize(
    "head",
    [
        "BertForPreTraining", "BertLMHeadModel", "BertForMaskedLM", "BertForNextSentencePrediction",
        "BertForSequenceClassification", "BertForMultipleChoice", "BertForTokenClassification",
        "BertForQuestionAnswering",
    ],
)  # fmt: skip
def test_heads(device: torch.device, head: str) -> None:
    plain = getattr(transformers, head)(tiny_config()).to(device).eval()
    randomize(plain)
    fused = getattr(fastbert, head)(tiny_config()).to(device).eval()
    assert isinstance(fused, type(plain))
    fused.load_state_dict(plain.state_dict(), strict=True)
    assert fastbert.explain(fused).fused
    x, mask = ids(4, 11, device), mask_of([11, 4, 6, 2], 11, device)
    labels: dict[str, torch.Tensor] = {}
    if head == "BertForMultipleChoice":
        x, mask = x.view(2, 2, 11), mask.view(2, 2, 11)
        labels = {"labels": torch.tensor([0, 1], device=device)}
    elif head == "BertForQuestionAnswering":
        labels = {"start_positions": torch.tensor([0, 1, 2, 0], device=device)}
        labels["end_positions"] = torch.tensor([1, 2, 3, 1], device=device)
    elif head in ("BertForSequenceClassification", "BertForNextSentencePrediction"):
        labels = {"labels": torch.tensor([0, 1, 1, 0], device=device)}
    elif head == "BertForTokenClassification":
        labels = {"labels": (x % 2).masked_fill(mask == 0, -100)}
    else:
        labels = {"labels": x.masked_fill(mask == 0, -100)}
        if head == "BertForPreTraining":
            labels["next_sentence_label"] = torch.tensor([0, 1, 1, 0], device=device)
    with torch.no_grad():
        if head == "BertForQuestionAnswering":  # its loss reads the logits of padding too
            plain.bert.config._attn_implementation = "eager"
            mask = torch.ones_like(mask)
        theirs, ours = plain(x, attention_mask=mask, **labels), fused(x, attention_mask=mask, **labels)
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=1e-4)

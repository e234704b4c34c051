"""fuse, unfuse and explain, and what people put around a model."""

import copy
import logging
from pathlib import Path

import pytest
import torch
import transformers
from models import assert_close, ids, mask_of, pair, randomize, tiny_config
from torch import nn
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert import notices
from fastbert.modules.packing import find_strangers
from fastbert_kernels import backend


def plain_model(**changes: object) -> transformers.BertModel:
    model = transformers.BertModel(tiny_config(**changes)).eval()
    randomize(model)
    return model


def test_fuse_then_unfuse_is_bit_equal_to_before() -> None:
    model = transformers.BertModel(tiny_config(attn_implementation="sdpa")).eval()
    x, mask = ids(), mask_of([11, 3, 7], 11)
    types = [type(m) for m in model.modules()]
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = list(model.parameters())
    before = model(x, mask).last_hidden_state
    assert fastbert.fuse(model) is model
    assert isinstance(model, fastbert.BertModel)
    model(x, mask)
    assert fastbert.unfuse(model) is model
    assert [type(m) for m in model.modules()] == types
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(x, mask).last_hidden_state, before)
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(storages) == len(parameters)


def test_state_dicts_go_both_ways() -> None:
    plain, fused = plain_model(), fastbert.BertModel(tiny_config())
    assert list(plain.state_dict()) == list(fused.state_dict())
    assert [p.shape for p in plain.parameters()] == [p.shape for p in fused.parameters()]
    fused.load_state_dict(plain.state_dict(), strict=True)
    back = transformers.BertModel(tiny_config())
    back.load_state_dict(fused.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), back.parameters(), strict=True))


@pytest.mark.parametrize("safe", [True, False])
def test_saved_by_one_opens_in_the_other(tmp_path: Path, safe: bool) -> None:
    plain, fused = pair()
    x, mask = ids(), mask_of([11, 3, 7], 11)
    tokens = mask.bool()
    if safe:
        fused.save_pretrained(tmp_path / "ours")
        plain.save_pretrained(tmp_path / "theirs")
        theirs = transformers.BertModel.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
        ours = fastbert.BertModel.from_pretrained(tmp_path / "theirs").eval()
        ours.packing = fused.packing
    else:
        torch.save(fused.state_dict(), tmp_path / "ours.pt")
        theirs = transformers.BertModel(tiny_config()).eval()
        theirs.load_state_dict(torch.load(tmp_path / "ours.pt"), strict=True)
        ours = fused
    assert torch.equal(theirs(x, mask).last_hidden_state, plain(x, mask).last_hidden_state)
    assert torch.equal(ours(x, mask).last_hidden_state, fused(x, mask).last_hidden_state)
    assert_close(ours(x, mask).last_hidden_state, plain(x, mask).last_hidden_state, tokens)


def test_the_real_checkpoint_loads_through_every_door(checkpoint: Path) -> None:
    x = torch.tensor([[101, 7592, 1010, 2026, 3899, 2003, 10140, 102]])
    plain = transformers.BertModel.from_pretrained(checkpoint, attn_implementation="eager").eval()
    wanted = plain(x).last_hidden_state
    loaded = fastbert.BertModel.from_pretrained(checkpoint).eval()
    fused = fastbert.fuse(transformers.AutoModel.from_pretrained(checkpoint)).eval()
    for model in (loaded, fused):
        assert fastbert.explain(model).fused
        torch.testing.assert_close(model(x).last_hidden_state, wanted, atol=1e-5, rtol=0)


def test_another_model_with_the_same_config_stays_as_it_is() -> None:
    config = tiny_config(attn_implementation="sdpa")
    teacher, student = transformers.BertModel(config), transformers.BertModel(config)
    ours = fastbert.BertModel(config)
    fastbert.fuse(student)
    assert type(teacher) is transformers.BertModel
    assert type(teacher.encoder.layer[0]) is hf.BertLayer
    assert teacher.config._attn_implementation == "sdpa"
    assert student.config._attn_implementation == "eager"
    assert ours.config._attn_implementation == "eager"


def test_another_attention_name_is_not_used_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    notices.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "fastbert"):
        model = fastbert.BertModel(tiny_config(attn_implementation="sdpa"))
    assert "attn_implementation='sdpa' is not used" in caplog.text
    assert len(model.eval()(ids(), output_attentions=True).attentions) == 2


def test_fuse_reaches_inside_and_explains() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = transformers.BertForTokenClassification(tiny_config())

    model = fastbert.fuse(Wrapper())
    assert isinstance(model.inner.bert, fastbert.BertModel)
    assert type(model.inner) is fastbert.BertForTokenClassification
    explained = str(fastbert.explain(model)).splitlines()
    assert explained[0] == "every part is fused: embeddings and 2 layers"
    assert explained[1].startswith("what is fused runs as plain PyTorch on this CPU")
    assert explained[2:] == ["padding is dropped where there are labels, and every one at padding is -100"]
    assert type(fastbert.unfuse(model).inner) is transformers.BertForTokenClassification


def test_nothing_to_fuse_is_an_error() -> None:
    for function in (fastbert.fuse, fastbert.unfuse, fastbert.explain):
        with pytest.raises(
            ValueError, match=r"Linear holds no encoder that fastbert fuses: it knows BertModel \(bert\)"
        ):
            function(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["fuse", "unfuse", "explain", "skip_unread"])
def test_what_is_no_model_is_told(name: str) -> None:
    for thing, what in (("path/to/checkpoint", "str"), (transformers.BertModel, "the class BertModel"), (None, "None")):
        with pytest.raises(TypeError, match=rf"a model is needed .*, got {what}.*: pass what from_pretrained returns"):
            getattr(fastbert, name)(thing)


def test_unfuse_takes_fastberts_own_classes_back() -> None:
    head = fastbert.BertForSequenceClassification(tiny_config()).eval()
    x = ids()
    before = head(x).logits
    fastbert.unfuse(head)
    assert type(head) is transformers.BertForSequenceClassification
    assert type(head.bert) is transformers.BertModel
    assert_close(head(x).logits, before)


def test_fuse_leaves_decoders_and_subclasses_alone(caplog: pytest.LogCaptureFixture) -> None:
    class MyBert(transformers.BertModel):
        pass

    notices.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "fastbert"):
        decoder = fastbert.fuse(transformers.BertModel(tiny_config(is_decoder=True)))
        mine = fastbert.fuse(MyBert(tiny_config()))
    assert type(decoder) is transformers.BertModel
    assert type(mine) is MyBert
    assert "decoder stays" in caplog.text
    assert "MyBert overrides" in caplog.text
    assert "decoder" in str(fastbert.explain(decoder))
    assert "not fused" in str(fastbert.explain(plain_model()))


class LowRank(nn.Module):
    """An adapter around a Linear, as PEFT builds it: its own weight is the frozen base's."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize(
    "name",
    ["attention.self.query", "attention.self.value", "attention.output.dense", "intermediate.dense", "output.dense"],
)
def test_a_wrapped_linear_is_called_and_the_rest_stays_fused(name: str) -> None:
    plain = plain_model()
    layer = plain.encoder.layer[1]
    owner, attribute = layer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    setattr(owner, attribute, LowRank(getattr(owner, attribute)))
    fused = fastbert.fuse(copy.deepcopy(plain))
    x, mask = ids(), mask_of([11, 3, 7], 11)
    assert_close(fused(x, mask).last_hidden_state, plain(x, mask).last_hidden_state, mask.bool())
    report = fastbert.explain(fused)
    assert report.fused
    notes = [(part.layer, part.reason) for part in report.parts if part.reason]
    assert notes == [(1, f"{attribute} (LowRank) called as a module")]
    fused(x, mask).last_hidden_state.sum().backward()
    assert fused.encoder.layer[1].get_submodule(name).up.weight.grad is not None


def test_explain_says_once_what_layers_have_in_common() -> None:
    model = fastbert.fuse(plain_model(num_hidden_layers=4))
    for i in (0, 1, 3):
        model.encoder.layer[i].output.dense = LowRank(model.encoder.layer[i].output.dense)
    rows = [line.split("│")[1:-1] for line in str(fastbert.explain(model)).splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        [layers, "output", "fused", "dense (LowRank) called as a module"] for layers in ("0-1", "3")
    ]
    assert [part.layer for part in fastbert.explain(model).parts if part.reason] == [0, 1, 3]


def test_explain_names_a_weight_of_another_kind() -> None:
    class Quantized(nn.Parameter):
        pass

    model = fastbert.fuse(plain_model())
    dense = model.encoder.layer[0].output.dense
    dense.weight = Quantized(dense.weight.detach())
    assert "dense (Linear whose weight is Quantized) called as a module" in str(fastbert.explain(model))


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_explain_names_the_backend(device: torch.device, name: str) -> None:
    model = fastbert.fuse(plain_model()).to(device)
    where = "this CPU" if device.type == "cpu" else "cuda:0"
    kernels = f"Triton kernels, interpreted, on {where}" if device.type == "cpu" else f"Triton kernels on {where}"
    with backend(name):
        found = fastbert.explain(model).backends
    assert found == (kernels if name == "triton" else f"plain PyTorch on {where}",)


@pytest.mark.parametrize(
    ("name", "replacement", "reason"),
    [
        ("attention.output.LayerNorm", nn.Identity(), "LayerNorm is not a plain nn.LayerNorm"),
        ("output.dropout", nn.Identity(), "dropout is not a plain nn.Dropout"),
        ("attention.self.dropout", nn.Dropout2d(0.0), "dropout is not a plain nn.Dropout"),
    ],
)
def test_a_replaced_module_runs_unfused_and_says_so(
    name: str, replacement: nn.Module, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    notices.say_once.cache_clear()
    plain = plain_model()
    owner, attribute = plain.encoder.layer[0].get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    setattr(owner, attribute, replacement)
    fused = fastbert.fuse(copy.deepcopy(plain))
    x, mask = ids(), mask_of([11, 3, 7], 11)
    with caplog.at_level(logging.WARNING, "fastbert"):
        got = fused(x, mask).last_hidden_state
    assert reason in caplog.text
    assert reason in str(fastbert.explain(fused))
    assert_close(got, plain(x, mask).last_hidden_state, mask.bool())
    theirs, ours = plain(x, output_attentions=True), fused(x, output_attentions=True)
    for a, b in zip(ours.attentions, theirs.attentions, strict=True):
        assert_close(a, b)


def test_someone_elses_layer_and_attention_get_a_padded_batch() -> None:
    class MyAttention(hf.BertSelfAttention):
        pass

    class MyLayer(hf.BertLayer):
        pass

    plain = plain_model()
    plain.encoder.layer[0].attention.self.__class__ = MyAttention
    plain.encoder.layer[1].__class__ = MyLayer
    fused = fastbert.fuse(copy.deepcopy(plain))
    x, mask = ids(), mask_of([11, 3, 7], 11)
    assert_close(fused(x, mask).last_hidden_state, plain(x, mask).last_hidden_state, mask.bool())
    assert_close(fused(x, output_attentions=True).attentions[1], plain(x, output_attentions=True).attentions[1])
    report = str(fastbert.explain(fused))
    with pytest.raises(ValueError, match=r"MyLayer\) is not fastbert's"):
        fused(x, head_mask=torch.ones(4))
    cu = torch.tensor([0, 5, 11], dtype=torch.int32)
    with pytest.raises(ValueError, match="neither packed sequences"):
        fused(x[:1], cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=6, max_length_k=6)
    half = mask_of([11, 3, 7], 11)
    assert fused.bfloat16()(x, half).last_hidden_state.dtype == torch.bfloat16
    assert "MyAttention" in report
    assert "MyLayer" in report


def test_heads_wider_than_the_kernels_run_unfused() -> None:
    plain, fused = pair(hidden_size=272, num_attention_heads=2)
    x, mask = ids(), mask_of([11, 3, 7], 11)
    assert_close(fused(x, mask).last_hidden_state, plain(x, mask).last_hidden_state, mask.bool(), atol=1e-4)
    assert "head_dim 136 is over the kernels' 128" in str(fastbert.explain(fused))


def test_captum_style_hooks_see_their_modules_called() -> None:
    _, fused = pair()
    called = []
    for name in ("embeddings", "encoder.layer.0", "encoder.layer.1.attention.self.query", "encoder", "pooler"):
        fused.get_submodule(name).register_forward_hook(lambda m, a, o, name=name: called.append(name))
    fused(ids(), mask_of([11, 3, 7], 11))
    assert called == ["embeddings", "encoder.layer.0", "encoder.layer.1.attention.self.query", "encoder", "pooler"]


def test_machinery_hooks_do_not_stop_packing() -> None:
    _, fused = pair()
    fused.enable_input_require_grads()
    assert list(find_strangers(fused)) == []
    assert fastbert.explain(fused).fused
    fused.requires_grad_(False)
    assert fused(ids()).last_hidden_state.requires_grad
    plain = plain_model()
    plain(ids(), output_hidden_states=True)  # installs Hugging Face's own capturing hooks
    assert list(find_strangers(fastbert.fuse(plain))) == []


@pytest.mark.parametrize("train", [False, True])
def test_autocast_matches_hugging_faces_dtypes_and_values(device: torch.device, train: bool) -> None:
    plain, fused = pair(device)
    x, mask = ids(device=device), mask_of([11, 3, 7], 11, device)
    with torch.autocast(device.type, torch.bfloat16):
        theirs, ours = plain(x, mask, output_attentions=True), fused(x, mask, output_attentions=True)
    assert ours.last_hidden_state.dtype == theirs.last_hidden_state.dtype == torch.float32
    truth = plain(x, mask).last_hidden_state[mask.bool()]
    error = (ours.last_hidden_state[mask.bool()] - truth).abs().max()
    assert error <= 2 * (theirs.last_hidden_state[mask.bool()] - truth).abs().max() + 1e-5
    if train:
        ours.last_hidden_state.square().sum().backward()
        assert all(p.grad.dtype == p.dtype for p in fused.encoder.parameters())


def test_lazy_package_names() -> None:
    assert set(fastbert.__all__) <= set(dir(fastbert))
    assert all(getattr(fastbert, name) for name in fastbert.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Bert'"):
        fastbert.Bert  # noqa: B018


def test_wrappers_that_rebuild_arguments_do_not_lose_the_attentions() -> None:
    _, fused = pair()

    def rebuild(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[object, object]:
        return torch.utils._pytree.tree_map(lambda leaf: leaf, (args, kwargs))

    fused.encoder.layer[0].register_forward_pre_hook(rebuild, with_kwargs=True)
    assert all(probs is not None for probs in fused(ids(), output_attentions=True).attentions)


def test_a_hooked_activation_is_called() -> None:
    plain, fused = pair()
    seen = []
    act = fused.encoder.layer[1].intermediate.intermediate_act_fn
    act.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    x = ids()
    assert_close(fused(x).last_hidden_state, plain(x).last_hidden_state)
    assert seen == [(3, 11, 48)]
    assert "the activation is hooked" in str(fastbert.explain(fused))


def test_unfuse_refuses_classes_built_on_fastberts() -> None:
    class Mine(fastbert.BertModel):
        pass

    with pytest.raises(ValueError, match="Mine derives from fastbert's class"):
        fastbert.unfuse(Mine(tiny_config()))


def test_left_padding_warns_of_the_pooler(caplog: pytest.LogCaptureFixture) -> None:
    notices.say_once.cache_clear()
    _, fused = pair()
    with caplog.at_level(logging.WARNING, "fastbert"):
        fused(ids(), mask_of([11, 3, 7], 11))
        assert "pooler_output" not in caplog.text
        fused(ids(), mask_of([11, 3, 7], 11).flip(1))
    assert "pooler_output is made of padding" in caplog.text


def test_print_shows_what_is_fused() -> None:
    _, fused = pair()
    fused.encoder.layer[1].output.LayerNorm = nn.Identity()
    shown = str(fused)
    assert "fused by fastbert, packing=True" in shown
    assert shown.count("  fused\n") == 1 + 4 * 2 - 1  # embeddings, and the parts of two layers but one
    assert "unfused: LayerNorm is not a plain nn.LayerNorm but Identity" in shown
    assert "fused" not in str(fastbert.unfuse(fused))

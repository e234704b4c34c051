"""Layers on a CPU, by oneDNN's products, against the definition, and against what changes under them."""

import copy
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.models import assert_close, ids, mask_of, onednn_enabled, pair, randomize, tiny_config
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fastbert
from fastbert_kernels import backend, cpu_layer, runs_as_block

LENGTHS = {"full": [11, 11, 11], "ragged": [11, 4, 7], "some alike": [5, 5, 9]}


@pytest.fixture(autouse=True)
def _by_device() -> Iterator[None]:
    with backend("auto"):
        yield


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each layer that ran as one."""
    seen: list[int] = []
    run = cpu_layer.layer_block

    def counted(hidden: torch.Tensor, *records: Any) -> Any:
        seen.append(hidden[..., 0].numel())
        return run(hidden, *records)

    monkeypatch.setattr(cpu_layer, "layer_block", counted)
    return seen


def run(model: Any, lengths: list[int], **keywords: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The tokens' last hidden states without gradients and with them, and the gradients of a fixed projection."""
    generator = torch.Generator().manual_seed(5)
    seq = max(lengths)
    x = torch.randint(1, 60, (len(lengths), seq), generator=generator)
    mask = mask_of(lengths, seq)
    with torch.no_grad():
        quiet = model(x, mask, **keywords).last_hidden_state[mask.bool()]
    y = model(x, mask, **keywords).last_hidden_state[mask.bool()]
    parameters = dict(model.encoder.named_parameters())
    loss = (y * torch.randn(y.shape, generator=generator).to(y)).sum()
    grads = torch.autograd.grad(loss, list(parameters.values()))
    return quiet, y.detach(), dict(zip(parameters, grads, strict=True))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("with_onednn", [True, False])
def test_equals_hugging_face(layers: list[int], lengths: list[int], packing: bool, with_onednn: bool) -> None:
    plain, fused = pair()
    fused.packing = packing
    want = run(plain, lengths)
    with onednn_enabled(with_onednn):
        got = run(fused, lengths)
    assert layers == ([sum(lengths) if packing else 3 * max(lengths)] * 4 if with_onednn else [])
    assert_close(got[0], want[0])
    assert_close(got[1], want[1])
    for name, gradient in got[2].items():
        assert_close(gradient, want[2][name], atol=2e-5 * max(1.0, want[2][name].abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_errs_no_more_than_hugging_face_in_half_precision(
    layers: list[int], dtype: torch.dtype, lengths: list[int]
) -> None:
    mine: dict[str, float] = defaultdict(float)
    theirs: dict[str, float] = defaultdict(float)
    for _ in range(6):  # by chance one or the other errs less in one model
        plain, fused = pair(initializer_range=0.2)  # 0.5 gives models whose errors are all one softmax's
        fused.packing = True
        exact = named(run(copy.deepcopy(plain).double(), lengths))
        add_squared_errors(theirs, named(run(plain.to(dtype), lengths)), exact)
        add_squared_errors(mine, named(run(fused.to(dtype), lengths)), exact)
    assert len(layers) == 6 * 4
    for name, error in mine.items():
        if not name.endswith("key.bias"):  # zero but for rounding
            assert error**0.5 <= (1.1 if name in ("quiet", "recorded") else 1.5) * theirs[name] ** 0.5, name


def named(found: tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    quiet, recorded, gradients = found
    return {"quiet": quiet, "recorded": recorded, **gradients}


def add_squared_errors(sums: dict[str, float], found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> None:
    for name, x in found.items():
        sums[name] += (x.double() - exact[name]).square().sum().item()


def test_rows_in_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused = pair()
    x, mask = ids(), mask_of([11, 4, 7], 11)
    with torch.no_grad():
        want = fused(x, mask, packing=True).last_hidden_state
        monkeypatch.setattr(cpu_layer, "ROWS", 5)
        assert_close(fused(x, mask, packing=True).last_hidden_state, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_padding_is_no_key(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    plain, fused = pair(packing="auto", num_hidden_layers=1)
    fused = fused.to(dtype)
    x, mask = ids(4), mask_of([11, 4, 4, 7], 11)
    seen: list[int] = []
    attend_run = cpu_layer._attend_run

    def noted(qkv: torch.Tensor, length: int, scale: float, keys: int) -> torch.Tensor:
        seen.append(keys)
        return attend_run(qkv, length, scale, keys)

    monkeypatch.setattr(cpu_layer, "_attend_run", noted)
    monkeypatch.setattr(cpu_layer, "FEW_SCORES", 0)
    by_length = fused(x, mask).last_hidden_state
    assert seen == [11, 4, 7]
    if dtype == torch.float32:
        assert_close(by_length, plain(x, mask).last_hidden_state)
    with backend("torch"):
        assert_close(by_length, fused(x, mask).last_hidden_state, atol=2e-5 if dtype == torch.float32 else 0.1)
    mask[1] = 0  # a row with no visible key attends to all
    fused(x, mask)
    assert seen == [11, 4, 7]


@pytest.mark.parametrize("which", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_is_the_same_with_and_without_gradients(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    """As reentrant checkpointing, which runs a layer twice, needs it."""
    monkeypatch.setattr(cpu_layer, "ROWS", 5)
    _, fused = pair(**{which: 0.3})
    fused.train()
    x, mask = ids(), mask_of([11, 4, 7], 11)
    results = []
    for recorded in (False, True):
        torch.manual_seed(1)
        with torch.set_grad_enabled(recorded):
            results.append(fused(x, mask, packing=True).last_hidden_state)
    assert_close(*results)


@pytest.mark.parametrize("maps", [False, True])
def test_maps_head_masks_and_wide_masks(layers: list[int], maps: bool) -> None:
    _, fused = pair()
    x, wide = ids(), torch.rand(3, 1, 11, 11) < 0.7
    keywords = {"output_attentions": maps, "head_mask": torch.rand(2, 4)}
    got = fused(x, wide, **keywords)
    with backend("torch"):
        want = fused(x, wide, **keywords)
    assert layers == [33, 33]
    assert_close(got.last_hidden_state, want.last_hidden_state)
    for ours, theirs in zip(got.attentions or (), want.attentions or (), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("which", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_follows_torchs_seed(layers: list[int], which: str) -> None:
    _, fused = pair(**{which: 0.3})
    fused.train()
    fused.embeddings.eval()
    x, mask = ids(), mask_of([11, 4, 7], 11)

    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return fused(x, mask, packing=True).last_hidden_state

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert len(layers) == 8


def test_gradients_of_gradients(layers: list[int]) -> None:
    plain, fused = pair()
    x, mask = ids(), mask_of([11, 4, 7], 11)

    def second(model: Any) -> tuple[torch.Tensor, ...]:
        vectors = model.embeddings.word_embeddings(x).detach().requires_grad_()
        y = model(inputs_embeds=vectors, attention_mask=mask).last_hidden_state[mask.bool()]
        (slope,) = torch.autograd.grad(y.square().sum(), vectors, create_graph=True)
        weights = [p for name, p in model.encoder.named_parameters() if name.endswith("weight")]
        return torch.autograd.grad(slope.square().sum(), weights)

    # torch's fused attention has no second derivative, as in Hugging Face's sdpa; attention with maps has one.
    plain.config.output_attentions = fused.config.output_attentions = True
    for got, want in zip(second(fused), second(plain), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())
    assert layers == [22, 22]


def watched_by_a_mode(x: torch.Tensor) -> bool:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        return runs_as_block(x)


def under_autocast(x: torch.Tensor) -> bool:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return runs_as_block(x)


def in_forward_mode(x: torch.Tensor) -> bool:
    with torch.autograd.forward_ad.dual_level():
        return runs_as_block(x)


def in_a_transform(x: torch.Tensor) -> bool:
    seen = []
    torch.func.vmap(lambda y: seen.append(runs_as_block(x)) or y)(x)
    return seen[0]


def by_the_definition(x: torch.Tensor) -> bool:
    with backend("torch"):
        return runs_as_block(x)


def in_float64(x: torch.Tensor) -> bool:
    return runs_as_block(x.double())


@pytest.mark.parametrize(
    "where", [watched_by_a_mode, under_autocast, in_forward_mode, in_a_transform, by_the_definition, in_float64]
)
def test_the_definition_runs(where: Callable[[torch.Tensor], bool]) -> None:
    x = torch.zeros(2, 3)
    assert runs_as_block(x)
    assert not where(x)


def _added(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.add_(0.1)


def _copied(weight: nn.Parameter) -> None:
    weight.data.copy_(weight.data * 0.9)


def _replaced_data(weight: nn.Parameter) -> None:
    weight.data = weight.data * 0.9


def _by_numpy(weight: nn.Parameter) -> None:
    weight.detach().numpy()[0] *= 0.5


def _by_optimizer(weight: nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()
    weight.grad = None


def _by_init(weight: nn.Parameter) -> None:
    nn.init.normal_(weight)


CHANGES = {f.__name__[1:]: f for f in (_added, _copied, _replaced_data, _by_numpy, _by_optimizer, _by_init)}


@pytest.mark.parametrize("how", [*CHANGES, "loaded", "new parameter"])
@pytest.mark.parametrize("projection", ["attention.self.key", "attention.output.dense", "intermediate.dense"])
def test_outputs_follow_changed_weights(how: str, projection: str) -> None:
    plain, fused = pair()
    x = ids()
    with torch.no_grad():
        before = fused(x).last_hidden_state
        module = fused.encoder.layer[0].get_submodule(projection)
        with torch.enable_grad():
            if how == "loaded":
                other, _ = pair()
                fused.load_state_dict(other.state_dict())
            elif how == "new parameter":
                module.weight = nn.Parameter(module.weight.detach() * 0.9)
            else:
                CHANGES[how](module.weight)
        plain.load_state_dict(fused.state_dict())
        after = fused(x).last_hidden_state
        assert not torch.equal(after, before)
        assert_close(after, plain(x).last_hidden_state)


def test_threads_may_share_a_model() -> None:
    _, fused = pair()
    batches = [ids(2, seq) for seq in range(3, 15)]
    with torch.no_grad():
        want = [fused(x).last_hidden_state for x in batches]
    got: dict[int, torch.Tensor] = {}

    def work(start: int) -> None:
        with torch.no_grad():  # a thread's own
            for i in range(start, len(batches), 4):
                got[i] = fused(batches[i]).last_hidden_state

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == len(batches)
    for i, y in got.items():
        assert_close(y, want[i])


def test_any_number_of_threads_inside() -> None:
    _, fused = pair()
    x, before = ids(), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with torch.no_grad():
                results.append(fused(x).last_hidden_state)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    for y in results[1:]:
        assert_close(y, results[0])


class Encoded(Dataset[torch.Tensor]):
    """Batches, encoded where they are asked for."""

    def __init__(self, model: fastbert.BertModel, batches: list[torch.Tensor]) -> None:
        self.model, self.batches = model, batches

    def __len__(self) -> int:
        return len(self.batches)

    @torch.no_grad()
    def __getitem__(self, i: int) -> torch.Tensor:
        return self.model(self.batches[i]).last_hidden_state


def test_a_data_loaders_workers_may_run_a_model() -> None:
    _, fused = pair()
    data = Encoded(fused, [ids() for _ in range(4)])
    want = [data[i] for i in range(4)]  # in this process first, whose threads a worker does not have
    for got, y in zip(DataLoader(data, batch_size=None, num_workers=2, timeout=60), want, strict=True):
        assert_close(got, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_may_have_a_dtype_of_their_own(layers: list[int], dtype: torch.dtype) -> None:
    model = fastbert.BertModel(tiny_config()).eval()
    randomize(model)
    model.to(dtype)
    for layer in model.encoder.layer:
        layer.output.LayerNorm.to(torch.bfloat16 if dtype == torch.float32 else torch.float32)
    x = ids()
    got = model(x).last_hidden_state
    with backend("torch"):
        want = model(x).last_hidden_state
    assert layers == [33, 33]
    assert_close(got.float(), want.float(), atol=2e-5 if dtype == torch.float32 else 0.1)

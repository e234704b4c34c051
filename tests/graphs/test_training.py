"""Training steps replayed from recordings. Without a GPU what is recorded is run again, all else being the same."""

import copy
import functools
import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import transformers
from models import assert_close, ids, mask_of, randomize, tiny_config
from recorders import RerunSteps
from recorders import rerun_steps as rerun
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastbert
from fastbert import notices
from fastbert.distill import capture
from fastbert.graphs.training import GraphedStep
from fastbert_kernels import backend

Batch = dict[str, torch.Tensor]

#: Heads that are recorded -> their labels of tokens, of sequences.
HEADS: dict[str, tuple[str | None, str | None]] = {
    "BertForMaskedLM": ("labels", None),
    "BertForTokenClassification": ("labels", None),
    "BertForPreTraining": ("labels", "next_sentence_label"),
    "BertForSequenceClassification": (None, "labels"),
    "BertForNextSentencePrediction": (None, "labels"),
}


def sgd(model: nn.Module, lr: float = 0.01, **changes: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr, **{"momentum": 0.9, "fused": True, **changes})


def adamw(model: nn.Module, lr: float = 0.01, **changes: Any) -> torch.optim.Optimizer:
    """With an epsilon so large that the rounding of gradients which are zero in theory is no step."""
    return torch.optim.AdamW(model.parameters(), lr, **{"eps": 0.01, "fused": True, "capturable": True, **changes})


def heads(name: str, device: torch.device | str = "cpu", **changes: Any) -> tuple[Any, Any]:
    """A head of Hugging Face's with eager attention and fastbert's with the same weights, in training mode."""
    plain = getattr(transformers, name)(tiny_config(**changes))
    randomize(plain)
    fused = getattr(fastbert, name)(tiny_config(**changes))
    fused.load_state_dict(plain.state_dict(), strict=True)
    return plain.to(device).train(), fused.to(device).train()


def batch_of(name: str, lengths: list[int], seq: int, device: torch.device | str = "cpu") -> Batch:
    """A batch with labels for a head; about a third of the tokens has none."""
    mask = mask_of(lengths, seq)
    batch = {"input_ids": ids(len(lengths), seq), "attention_mask": mask}
    of_tokens, of_sequences = HEADS[name]
    if of_tokens:
        labels = torch.randint(0, 2, mask.shape).masked_fill((torch.rand(mask.shape) < 0.3) | (mask == 0), -100)
        labels[0, 0] = 1
        batch[of_tokens] = labels
    if of_sequences:
        batch[of_sequences] = torch.randint(0, 2, (len(lengths),))
    return {key: value.to(device) for key, value in batch.items()}


def ragged(name: str, device: torch.device | str = "cpu") -> list[Batch]:
    """Batches for the smaller bucket of `rerun` and the larger, of shapes that differ."""
    shapes = [([7], 7), ([9, 3, 5], 9), ([14], 20), ([12, 1, 6, 4], 12), ([8, 8, 8], 8), ([3], 3), ([2, 4], 6)]
    return [batch_of(name, lengths, seq, device) for lengths, seq in shapes]


def train(
    model: Any, optimizer: torch.optim.Optimizer, batches: Iterable[Batch], max_grad_norm: float | None = None
) -> torch.Tensor:
    """The steps that a replay shall equal; their losses."""
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def assert_same(ours: nn.Module, theirs: nn.Module, atol: float = 2e-5) -> None:
    for (name, p), (other, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        assert_close(p, q, atol=atol)


def replays_alike(
    step: GraphedStep, batches: list[Batch], plain: Any, optimizer: torch.optim.Optimizer, **clip: float
) -> None:
    """Replayed steps have the losses of plain ones and lead to the same parameters; all of them did something."""
    before = [p.clone() for p in plain.parameters()]
    losses = torch.stack([step(**batch) for batch in batches])
    assert_close(losses, train(plain, optimizer, batches, **clip))
    assert_same(step.model, plain)
    assert sum(not torch.equal(p, q) for p, q in zip(before, plain.parameters(), strict=True)) > len(before) / 2
    assert all(p.grad is None for p in step.model.parameters())


# What a step does.


def test_ragged_batches_train_as_hugging_faces_model_does(device: torch.device, backend_name: str) -> None:
    plain, fused = heads("BertForSequenceClassification", device)
    step = rerun(fused, adamw(fused))
    replays_alike(step, ragged("BertForSequenceClassification", device)[:4], plain, adamw(plain, capturable=False))
    assert (step.captures, step.replays, step.plain.total()) == (2, 2, 0)


@pytest.mark.parametrize("own", [True, False], ids=["fastbert's", "fused in place"])
@pytest.mark.parametrize("name", HEADS)
def test_every_head_trains_as_hugging_faces_does(name: str, own: bool, device: torch.device) -> None:
    plain, fused = heads(name, device)
    model = fused if own else fastbert.fuse(copy.deepcopy(plain))
    step = rerun(model, sgd(model))
    replays_alike(step, ragged(name, device), plain, sgd(plain))
    assert (step.captures, step.replays, step.plain.total()) == (2, 5, 0)


def test_a_masked_language_model_trains_by_the_kernels(device: torch.device) -> None:
    plain, fused = heads("BertForPreTraining", device)
    with backend("triton"):
        step = rerun(fused, sgd(fused), tokens=(20,))
        replays_alike(step, ragged("BertForPreTraining", device)[:2], plain, sgd(plain))
    assert (step.captures, step.replays) == (1, 1)


def test_every_argument_arrives(device: torch.device) -> None:
    plain, fused = heads("BertForTokenClassification", device)
    step, batch = rerun(fused, sgd(fused)), batch_of("BertForTokenClassification", [6, 2, 4], 6, device)
    types, positions = torch.randint(0, 2, (3, 6), device=device), torch.randint(0, 40, (3, 6), device=device)
    more: list[Batch] = [{}, {"token_type_ids": types}, {"position_ids": positions}, {"token_type_ids": types[:1]}]
    replays_alike(step, [batch | extra for extra in more], plain, sgd(plain))
    assert step.replays == 3
    del batch["attention_mask"]
    replays_alike(step, [batch, batch | more[2]], plain, sgd_like(plain, step))


def sgd_like(model: nn.Module, step: GraphedStep) -> torch.optim.Optimizer:
    """An optimizer for a model with the values of a step's, in the same state."""
    optimizer = sgd(model)
    optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    return optimizer


def test_labels_count_where_there_are_tokens_and_may_be_missing() -> None:
    plain, fused = heads("BertForMaskedLM")
    batch = batch_of("BertForMaskedLM", [5, 2], 6)
    wanted = train(plain, sgd(plain), [batch])[0]
    padded = batch["labels"].masked_fill(batch["attention_mask"] == 0, 3)
    for tokens in ((16,), (4,)):  # recorded and plain
        model = copy.deepcopy(fused)
        assert_close(rerun(model, sgd(model), tokens)(**batch | {"labels": padded}), wanted)
        assert_same(model, plain)
    none = torch.full_like(batch["labels"], -100)
    assert rerun(fused, sgd(fused))(**batch | {"labels": none}).isnan()


def test_empty_sequences_are_what_they_are_to_the_model() -> None:
    _, fused = heads("BertForSequenceClassification")
    fused.bert.packing = True
    other = copy.deepcopy(fused)
    batches = [batch_of("BertForSequenceClassification", lengths, 5) for lengths in ([0, 5, 0], [3, 0], [0, 0])]
    step = rerun(fused, sgd(fused))
    replays_alike(step, batches, other, sgd(other))
    assert (step.captures, step.replays) == (1, 2)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForPreTraining"])
def test_rows_that_are_skipped_elsewhere_are_computed(name: str) -> None:
    plain, fused = heads(name)
    step = rerun(fastbert.skip_unread(fused), sgd(fused))
    replays_alike(step, ragged(name), plain, sgd(plain))
    assert step.plain.total() == 0


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_gradients_are_clipped_as_torch_does(optimizer: Callable[..., Any], device: torch.device) -> None:
    plain, fused = heads("BertForTokenClassification", device)
    off = {} if optimizer is sgd else {"capturable": False}
    step = rerun(fused, optimizer(fused), max_grad_norm=0.1)
    replays_alike(step, ragged("BertForTokenClassification", device), plain, optimizer(plain, **off), max_grad_norm=0.1)
    assert step.replays == 5


@pytest.mark.parametrize("name", ["BertForPreTraining", "BertForSequenceClassification"])
def test_every_element_that_is_read_is_written(name: str) -> None:
    _, fused = heads(name)
    step = rerun(fused, sgd(fused, lr=0.0), tokens=(40,))
    large, small = batch_of(name, [12, 9, 7, 4], 12), batch_of(name, [3, 2], 4)
    step(**small)  # recorded; on a CPU other code runs then than in what is run again
    wanted = step(**small)
    step(**large)
    assert torch.equal(step(**small), wanted)
    step._arrays._ids.fill_(10**6)  # is no id and no label
    step._arrays._cu_seqlens.fill_(-7)
    assert torch.equal(step(**small), wanted)


@pytest.mark.parametrize("name", ["BertForPreTraining", "BertForSequenceClassification"])
def test_what_lies_beyond_the_tokens_changes_nothing(name: str, device: torch.device, backend_name: str) -> None:
    _, fused = heads(name, device, num_hidden_layers=1)
    other, batch = copy.deepcopy(fused), batch_of(name, [4, 1, 3], 4, device)
    count = int(batch["attention_mask"].sum())
    steps = [rerun(model, sgd(model), tokens=(12,)) for model in (fused, other)]

    def poison() -> None:
        values, cu_seqlens = steps[0]._arrays.read(steps[0].buckets[0])
        for part, many in (("input_ids", 60), ("position_ids", 40), ("token_type_ids", 2)):
            values[part][0, count:] = torch.randint(0, many, (12 - count,), device=device)
        cu_seqlens[4:-1] = torch.randint(count, 12, cu_seqlens[4:-1].shape, device=device).sort().values

    steps[0]._recorder.before_replay = poison  # type: ignore[attr-defined]
    for _ in range(2):
        ours, theirs = [step(**batch) for step in steps]
        assert_close(ours, theirs, atol=1e-6)
    assert_same(fused, other, atol=1e-6)
    assert steps[0].replays == 1


def test_losses_share_no_memory() -> None:
    _, fused = heads("BertForMaskedLM")
    step = rerun(fused, sgd(fused), tokens=(40,))
    losses = [step(**batch) for batch in ragged("BertForMaskedLM")]
    kept = [loss.item() for loss in losses]
    assert all(loss.shape == () and not loss.requires_grad for loss in losses)
    step(**batch_of("BertForMaskedLM", [5], 5))
    assert [loss.item() for loss in losses] == kept
    assert len(set(kept)) == len(kept)


def test_every_replay_drops_anew_from_torchs_generator(device: torch.device, backend_name: str) -> None:
    dropout = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    _, fused = heads("BertForSequenceClassification", device, num_hidden_layers=1, **dropout)
    step = rerun(fused, sgd(fused, lr=0.0), tokens=(4,), max_sequences=1)
    batch = batch_of("BertForSequenceClassification", [3], 3, device)
    torch.manual_seed(1)
    losses = [step(**batch).item() for _ in range(3)]
    assert len(set(losses)) == 3
    torch.manual_seed(1)
    assert [step(**batch).item() for _ in range(2)] == losses[:2]


def test_a_thread_at_a_time_steps() -> None:
    _, fused = heads("BertForTokenClassification")
    step = rerun(fused, sgd(fused, lr=0.0))
    batches = ragged("BertForTokenClassification")[:4]
    # Recorded first; on a CPU other code runs then than in what is run again.
    _, wanted = ([step(**batch) for batch in batches] for _ in range(2))
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(5) if not torch.equal(step(**batches[i]), wanted[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert step.captures + step.replays == 28


def test_autocast_is_recorded_by_its_dtype() -> None:
    _, fused = heads("BertForMaskedLM")
    other, batch = copy.deepcopy(fused), batch_of("BertForMaskedLM", [9, 3], 9)
    step, optimizer = rerun(fused, sgd(fused), tokens=(12,)), sgd(other)
    with torch.autocast("cpu", torch.bfloat16):  # around several steps: no weight of the one before may be kept
        for _ in range(3):
            ours = step(**batch)
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                loss = other(**batch).loss
            with torch.autocast("cpu", enabled=False):
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert_close(ours, loss.detach(), atol=1e-3)
    assert_same(fused, other, atol=1e-3)
    assert (step.captures, step.replays) == (1, 2)
    step(**batch)
    assert (step.captures, step.replays) == (2, 2)
    step(**batch)
    assert (step.captures, step.replays) == (2, 3)


def test_autocast_ends_with_the_forward_pass() -> None:
    _, fused = heads("BertForMaskedLM")
    optimizer, seen = sgd(fused), []
    step = rerun(fused, optimizer)
    optimizer.register_step_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    fused.cls.predictions.bias.register_hook(lambda grad: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        step(**batch_of("BertForMaskedLM", [5], 5))
    assert seen == [False, False]


# The optimizer.


def test_the_first_step_of_a_bucket_is_one_step() -> None:
    _, fused = heads("BertForMaskedLM")
    optimizer = adamw(fused)
    step = rerun(fused, optimizer)
    for done, batch in enumerate(ragged("BertForMaskedLM"), 1):
        step(**batch)
        assert all(state["step"] == done for state in optimizer.state.values())
    assert (step.captures, step.replays) == (2, 5)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch)),
        lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5),
        lambda optimizer: transformers.get_linear_schedule_with_warmup(optimizer, 2, 7),
    ],
    ids=["lambda", "exponential", "cosine", "warmup"],
)
@pytest.mark.filterwarnings("error")
def test_schedulers_are_seen(schedule: Callable[..., Any], when: str) -> None:
    plain, fused = heads("BertForTokenClassification")
    ours, theirs = sgd(fused), sgd(plain)
    if when == "before":
        schedulers = [schedule(ours), schedule(theirs)]
        step = rerun(fused, ours, tokens=(40,))
    else:
        step = rerun(fused, ours, tokens=(40,))
        schedulers = [schedule(ours), schedule(theirs)]
    for batch in ragged("BertForTokenClassification"):
        assert_close(step(**batch), train(plain, theirs, [batch])[0])
        assert_same(fused, plain)
        for scheduler in schedulers:
            scheduler.step()
        assert ours.param_groups[0]["lr"].item() == pytest.approx(theirs.param_groups[0]["lr"])
    assert (step.captures, step.replays) == (1, 6)


@pytest.mark.filterwarnings("error")
def test_a_scheduler_that_comes_late_sees_the_steps() -> None:
    _, fused = heads("BertForTokenClassification")
    optimizer, batch = sgd(fused), batch_of("BertForTokenClassification", [5], 5)
    step = rerun(fused, optimizer)
    step(**batch)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step(**batch)
    scheduler.step()
    assert step.replays == 1
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.005)


def test_a_number_in_the_place_of_a_learning_rate_is_seen() -> None:
    plain, fused = heads("BertForTokenClassification")
    ours, theirs = sgd(fused), sgd(plain)
    step = rerun(fused, ours, tokens=(40,))
    held = ours.param_groups[0]["lr"]
    assert held.item() == pytest.approx(0.01)
    for batch, rate in zip(ragged("BertForTokenClassification"), (0.01, 0.004, 0.004, 0.02), strict=False):
        ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = rate
        replays_alike(step, [batch], plain, theirs)
        assert ours.param_groups[0]["lr"] is held
    assert (step.captures, step.replays) == (1, 3)


def _weight_decay(step: GraphedStep) -> None:
    step.optimizer.param_groups[0]["weight_decay"] = 0.3


def _betas(step: GraphedStep) -> None:
    step.optimizer.param_groups[0]["betas"] = (0.5, 0.9)


def _another_rate(step: GraphedStep) -> None:
    step.optimizer.param_groups[0]["lr"] = torch.tensor(0.02)


def _loaded(step: GraphedStep) -> None:
    step.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))


def _forgotten(step: GraphedStep) -> None:
    step.optimizer.state.clear()


def _frozen(step: GraphedStep) -> None:
    step.model.bert.embeddings.requires_grad_(False)


def _without_dropout(step: GraphedStep) -> None:
    for module in step.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 1e-9


def _partly_evaluated(step: GraphedStep) -> None:
    step.model.dropout.eval()


def _head_replaced(step: GraphedStep) -> None:
    step.model.classifier.weight = nn.Parameter(step.model.classifier.weight.detach().clone())


def _pruned(step: GraphedStep) -> None:
    step.model.bert.encoder.layer = step.model.bert.encoder.layer[:1]


def _another_group(step: GraphedStep) -> None:
    step.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.5})


@pytest.mark.parametrize(
    "change",
    [
        _weight_decay,
        _betas,
        _another_rate,
        _loaded,
        _forgotten,
        _frozen,
        _without_dropout,
        _partly_evaluated,
        _head_replaced,
        _pruned,
        _another_group,
    ],
)
def test_what_changes_is_recorded_again(change: Callable[[GraphedStep], None]) -> None:
    _, fused = heads("BertForTokenClassification")
    batches = ragged("BertForTokenClassification")
    step = rerun(fused, adamw(fused), tokens=(40,))
    for batch in batches[:2]:
        step(**batch)
    change(step)
    other, optimizer = copy.deepcopy((step.model, step.optimizer))
    for group in optimizer.param_groups:
        group["capturable"] = False
    replays_alike(step, batches[2:5], other, optimizer)
    assert (step.captures, step.replays) == (2, 3)


def test_a_resumed_optimizer_goes_on() -> None:
    plain, fused = heads("BertForTokenClassification")
    batches, theirs = ragged("BertForTokenClassification"), adamw(plain, capturable=False)
    train(plain, theirs, batches[:2])
    fused.load_state_dict(plain.state_dict())
    ours = adamw(fused)
    state = copy.deepcopy(theirs.state_dict())
    state["param_groups"][0]["capturable"] = True
    ours.load_state_dict(state)
    step = rerun(fused, ours)
    replays_alike(step, batches[2:], plain, theirs)
    assert step.captures == 2
    assert step.optimizer.state_dict()["state"][0]["step"] == len(batches)


def test_evaluation_between_two_steps_costs_no_recording() -> None:
    plain, fused = heads("BertForTokenClassification")
    step, theirs = rerun(fused, sgd(fused), tokens=(40,)), sgd(plain)
    for batch in ragged("BertForTokenClassification")[:3]:
        replays_alike(step, [batch], plain, theirs)
        with torch.no_grad():
            assert_close(fused.eval()(**batch).loss, plain(**batch).loss)
        fused.train()
    assert (step.captures, step.replays) == (1, 2)


# What is not replayed.


def _masked(batch: Batch) -> dict[str, Any]:
    whole = batch["attention_mask"].bool()
    return {"attention_mask": (whole[:, None] & whole[..., None])[:, None]}


def _embedded(batch: Batch) -> dict[str, Any]:
    return {"input_ids": None, "inputs_embeds": torch.ones(*batch["input_ids"].shape, 32)}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (lambda batch: {"output_attentions": True}, "the call has output_attentions"),
        (lambda batch: {"output_hidden_states": True}, "the call has output_hidden_states"),
        (lambda batch: {"head_mask": torch.tensor([1.0, 0.0, 1.0, 1.0])}, "the call has head_mask"),
        (_masked, "attention_mask has more than two dimensions"),
        (_embedded, "the call has inputs_embeds"),
    ],
)
def test_what_no_recording_has_is_a_plain_step_that_says_so(
    arguments: Callable[[Batch], dict[str, Any]], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    notices.say_once.cache_clear()
    _, fused = heads("BertForMaskedLM")
    fused.bert.packing = True
    other, batch = copy.deepcopy(fused), batch_of("BertForMaskedLM", [5, 3], 5)
    batch |= arguments(batch)
    step = rerun(fused, sgd(fused))
    with caplog.at_level(logging.WARNING, "fastbert"):
        replays_alike(step, [batch, batch], other, sgd(other))
    assert step.plain == {reason: 2}
    assert (step.captures, step.replays) == (0, 0)
    assert [r.message for r in caplog.records] == [f"fastbert: a step of a BertForMaskedLM is not replayed: {reason}"]


def test_a_configuration_that_asks_for_more_is_a_plain_step() -> None:
    _, fused = heads("BertForMaskedLM", output_hidden_states=True)
    step = rerun(fused, sgd(fused))
    step(**batch_of("BertForMaskedLM", [5, 3], 5), output_attentions=False, return_dict=False)
    assert step.plain == {"the call has output_hidden_states": 1}


@pytest.mark.parametrize(("lengths", "seq"), [([13, 13, 13, 2], 13), ([2] * 6, 2)], ids=["tokens", "sequences"])
def test_a_batch_over_the_largest_bucket_is_a_plain_step(lengths: list[int], seq: int) -> None:
    plain, fused = heads("BertForSequenceClassification")
    step = rerun(fused, sgd(fused), max_grad_norm=0.1)
    batch = batch_of("BertForSequenceClassification", lengths, seq)
    replays_alike(step, [batch, batch], plain, sgd(plain), max_grad_norm=0.1)
    assert step.plain == {"a batch is over the largest bucket of 40 tokens in 5 sequences of at most 40": 2}


def test_padding_before_the_tokens_is_a_plain_step_where_first_columns_are_read() -> None:
    for name, replayed in (("BertForSequenceClassification", 0), ("BertForTokenClassification", 1)):
        _, fused = heads(name)
        other, batch = copy.deepcopy(fused), batch_of(name, [5, 3], 5)
        batch["attention_mask"] = batch["attention_mask"].flip(1)
        if replayed:
            batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
        step = rerun(fused, sgd(fused))
        replays_alike(step, [batch, batch], other, sgd(other))
        assert (step.replays, step.plain.total()) == (replayed, 2 - 2 * replayed)


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def _hook(step: GraphedStep) -> Callable[[], Any]:
    return step.model.classifier.register_forward_hook(lambda module, args, output: output + 1).remove


def _inner_hook(step: GraphedStep) -> Callable[[], Any]:
    return step.model.bert.encoder.layer[1].register_forward_hook(lambda module, args, output: output + 1).remove


def _backward_hook(step: GraphedStep) -> Callable[[], Any]:
    return step.model.dropout.register_full_backward_hook(lambda module, grad, out: (grad[0] * 2,)).remove


def _gradient_hook(step: GraphedStep) -> Callable[[], Any]:
    return step.model.classifier.weight.register_hook(lambda grad: 2 * grad).remove


def _step_hook(step: GraphedStep) -> Callable[[], Any]:
    return step.optimizer.register_step_post_hook(lambda optimizer, args, kwargs: None).remove


def _own_step(step: GraphedStep) -> Callable[[], Any]:
    step.optimizer.step = type(step.optimizer).step.__get__(step.optimizer)
    return lambda: vars(step.optimizer).pop("step")


def _not_capturable(step: GraphedStep) -> Callable[[], Any]:
    step.optimizer.param_groups[0]["fused"] = False
    return lambda: step.optimizer.param_groups[0].update(fused=True)


def _adapter(step: GraphedStep) -> Callable[[], Any]:
    """What an adapter does: a module in the place of another, around the same parameters."""
    block = step.model.bert.encoder.layer[0].attention.self
    before = block.query
    block.query = Doubled(32, 32)
    block.query.weight, block.query.bias = before.weight, before.bias
    return lambda: setattr(block, "query", before)


def _compiled(step: GraphedStep) -> Callable[[], Any]:
    step.model.classifier.compile(backend="eager")
    return lambda: setattr(step.model.classifier, "_compiled_call_impl", None)


def _unpacked(step: GraphedStep) -> Callable[[], Any]:
    step.model.bert.packing = False
    return lambda: setattr(step.model.bert, "packing", True)


def _checkpointing(step: GraphedStep) -> Callable[[], Any]:
    for layer in step.model.bert.encoder.layer:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)

    def undo() -> None:
        for layer in step.model.bert.encoder.layer:
            layer.gradient_checkpointing = False

    return undo


def _watched(step: GraphedStep) -> Callable[[], Any]:
    watching = capture(step.model.bert)
    watching.__enter__()
    return lambda: watching.__exit__(None, None, None)


def _unfused(step: GraphedStep) -> Callable[[], Any]:
    fastbert.unfuse(step.model)
    return lambda: fastbert.fuse(step.model)


def _another_bert(step: GraphedStep) -> Callable[[], Any]:
    before, other = step.model.bert, fastbert.BertModel(tiny_config(), add_pooling_layer=False)
    for (name, _), p in zip(list(other.named_parameters()), before.parameters(), strict=True):
        where, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(where), leaf, p)
    step.model.bert = other
    return lambda: setattr(step.model, "bert", before)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hook, "modules in it have forward hooks"),
        (_inner_hook, "modules in it have forward hooks"),
        (_backward_hook, "modules or parameters in it have backward hooks"),
        (_gradient_hook, "modules or parameters in it have backward hooks"),
        (_step_hook, "SGD has hooks"),
        (_own_step, "the step of SGD was replaced"),
        (_not_capturable, "SGD makes the GPU wait unless it is made with fused=True"),
        (_adapter, "not all of it is fused: layer 0 attention.self: query (Doubled) called as a module"),
        (_compiled, "modules in it are compiled"),
        (_unpacked, "its padding is kept (packing=False)"),
        (_checkpointing, "gradient checkpointing is on"),
        (_watched, "distill.capture looks on"),
        (_unfused, "the model is no longer fused"),
        (_another_bert, "its bert was replaced"),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_that_cannot_be_recorded_takes_plain_steps_until_it_can(
    change: Callable[[GraphedStep], Callable[[], Any]], reason: str, when: str
) -> None:
    _, fused = heads("BertForTokenClassification")
    step, batches = rerun(fused, sgd(fused), tokens=(40,)), ragged("BertForTokenClassification")
    if when == "after":
        step(**batches[0])
    twin = GraphedStep(*copy.deepcopy((step.model, step.optimizer)), (40,), 5, None, RerunSteps)
    undo = change(step)
    change(twin)
    replays_alike(step, batches[:2], twin.model, twin.optimizer)
    (told,) = step.plain
    assert told.startswith(reason)
    assert step.plain.total() == 2
    undo()
    step(**batches[2])
    step(**batches[3])
    assert step.plain.total() == 2
    assert step.replays == 2 - (step.captures - (when == "after"))


# What is an error.


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (lambda: fastbert.BertModel(tiny_config()), "no step of BertModel can be recorded, only of BertForMaskedLM, "),
        (lambda: fastbert.BertForQuestionAnswering(tiny_config()), "no step of BertForQuestionAnswering"),
        (lambda: fastbert.BertForMultipleChoice(tiny_config()), "no step of BertForMultipleChoice"),
        (lambda: fastbert.BertLMHeadModel(tiny_config(is_decoder=True)), "no step of BertLMHeadModel"),
        (lambda: nn.Sequential(fastbert.BertForMaskedLM(tiny_config())), "no step of Sequential"),
        (lambda: Own(tiny_config()), "no step of Own can be recorded, only of .* call the model itself"),
        (lambda: fastbert.BertForSequenceClassification(tiny_config(num_labels=1)), r"its loss \(regression\) would"),
        (
            lambda: fastbert.BertForSequenceClassification(tiny_config(problem_type="multi_label_classification")),
            r"its loss \(multi_label_classification\) would count the padding of a bucket; or call the model itself",
        ),
        (lambda: fastbert.BertForMaskedLM(tiny_config(is_decoder=True)), "BertModel is a decoder or not fused"),
        (lambda: transformers.BertForMaskedLM(tiny_config()), "pass an encoder to fastbert.fuse first"),
    ],
)
def test_a_model_whose_loss_cannot_be_recorded_is_an_error(model: Callable[[], nn.Module], told: str) -> None:
    made = model()
    with pytest.raises(ValueError, match=told):
        rerun(made, sgd(made))


class Own(fastbert.BertForTokenClassification):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class OwnSGD(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        (lambda p: torch.optim.AdamW(p, fused=True), "AdamW makes the GPU wait unless it is made with capturable=True"),
        (lambda p: torch.optim.RMSprop(p), "RMSprop makes the GPU wait unless it is made with capturable=True"),
        (lambda p: torch.optim.SGD(p), "SGD makes the GPU wait unless it is made with fused=True; or call the model"),
        (lambda p: torch.optim.LBFGS(p), "LBFGS makes the GPU wait: use an optimizer that is capturable"),
        (lambda p: OwnSGD(p, fused=True), "OwnSGD is not one of torch's own optimizers"),
        (lambda p: torch.optim.SGD([nn.Parameter(torch.ones(1))], fused=True), "SGD has no parameter of the model"),
    ],
)
def test_an_optimizer_whose_step_cannot_be_recorded_is_an_error(
    optimizer: Callable[[Any], torch.optim.Optimizer], told: str
) -> None:
    model = fastbert.BertForMaskedLM(tiny_config())
    made = optimizer(model.parameters())
    with pytest.raises(ValueError, match=told):
        rerun(model, made)
    assert not isinstance(made.param_groups[0]["lr"], torch.Tensor)


def test_wrong_arguments_are_errors() -> None:
    model = fastbert.BertForMaskedLM(tiny_config())
    with pytest.raises(ValueError, match="BertForMaskedLM is not one of torch's own optimizers"):
        rerun(model, model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"max_grad_norm must be over 0, or None for no clipping, got 0\.0"):
        rerun(model, sgd(model), max_grad_norm=0.0)
    with pytest.raises(ValueError, match="buckets need tokens and max_sequences of at least 1"):
        rerun(model, sgd(model), tokens=())


@pytest.mark.skipif(torch.cuda.is_available(), reason="says that there is no GPU")
def test_without_a_gpu_there_is_a_clear_error() -> None:
    model = fastbert.BertForMaskedLM(tiny_config())
    with pytest.raises(RuntimeError, match=r"need a GPU, and the model is on cpu: move it with model\.to\('cuda'\)"):
        fastbert.graphed_step(model, sgd(model))


def test_wrong_calls_are_errors_and_no_steps() -> None:
    _, fused = heads("BertForPreTraining")
    before = copy.deepcopy(fused)
    step, batch = rerun(fused, sgd(fused)), batch_of("BertForPreTraining", [5, 3], 5)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"labels": None}, "BertForPreTraining needs labels, an int64 tensor, got NoneType"),
        ({"next_sentence_label": None}, "needs next_sentence_label, an int64 tensor, got NoneType"),
        ({"labels": batch["labels"].float()}, "needs labels, an int64 tensor, got torch.float32"),
        ({"labels": batch["labels"][:, 1:]}, r"labels must have shape \(2, 5\) for this batch, got \(2, 4\)"),
        ({"next_sentence_label": batch["labels"][:1, 0]}, r"must have shape \(2,\) for this batch, got \(1,\)"),
        ({"input_ids": None}, "exactly one of input_ids and inputs_embeds, got neither"),
        ({"labels": batch["labels"].to("meta")}, "a step needs every tensor on one device"),
    ]
    for change, told in wrong:
        with pytest.raises(ValueError, match=told):
            step(**batch | change)
    with torch.no_grad(), pytest.raises(RuntimeError, match="gradients are off"):
        step(**batch)
    fused.eval()
    with pytest.raises(RuntimeError, match=r"BertForPreTraining is in evaluation mode: call model\.train\(\)"):
        step(**batch)
    fused.train()
    fused(**batch).loss.backward()
    with pytest.raises(ValueError, match=r"gradients already, .* call optimizer\.zero_grad\(\) before"):
        step(**batch)
    fused.zero_grad()
    assert_same(fused, before, atol=0.0)
    step(**batch)
    assert (step.captures, step.plain.total()) == (1, 0)


def test_a_step_that_fails_leaves_no_gradients() -> None:
    _, fused = heads("BertForMaskedLM")
    step, batch = rerun(fused, sgd(fused)), batch_of("BertForMaskedLM", [5, 3], 5)
    with pytest.raises(IndexError):
        step(**batch | {"labels": batch["labels"].clamp(min=60)})
    step(**batch)
    assert (step.captures, step.replays) == (1, 0)


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", [adamw, sgd])
@pytest.mark.parametrize("name", HEADS)
def test_a_gpu_trains_as_plain_steps_do(name: str, optimizer: Callable[..., Any], device: torch.device) -> None:
    _, fused = heads(name, device)
    other = copy.deepcopy(fused)
    step = fastbert.graphed_step(fused, optimizer(fused), (16, 40), 5, max_grad_norm=1.0)
    replays_alike(step, ragged(name, device), other, optimizer(other), max_grad_norm=1.0)
    assert (step.captures, step.replays, step.plain.total()) == (2, 5, 0)


@pytest.mark.gpu
def test_a_gpu_trains_under_autocast(device: torch.device) -> None:
    plain, fused = heads("BertForMaskedLM", device)
    step, theirs = fastbert.graphed_step(fused, sgd(fused), (16, 40), 5), sgd(plain)
    batches = ragged("BertForMaskedLM", device)
    with torch.autocast("cuda", torch.bfloat16):
        losses = torch.stack([step(**batch) for batch in batches])
    assert_close(losses, train(plain, theirs, batches), atol=0.1)
    assert (step.captures, step.replays) == (2, 5)


@pytest.mark.gpu
def test_a_gpu_drops_anew_in_every_replay(device: torch.device) -> None:
    changes = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    _, fused = heads("BertForSequenceClassification", device, **changes)
    step = fastbert.graphed_step(fused, sgd(fused, lr=0.0), (16,))
    batch = batch_of("BertForSequenceClassification", [9], 9, device)
    step(**batch)
    torch.cuda.manual_seed(1)
    losses = [step(**batch).item() for _ in range(8)]
    assert len(set(losses)) == 8
    torch.cuda.manual_seed(1)
    assert [step(**batch).item() for _ in range(8)] == losses


@pytest.mark.gpu
def test_a_gpu_sees_schedulers_and_records_changes_again(device: torch.device) -> None:
    _, fused = heads("BertForTokenClassification", device)
    other = copy.deepcopy(fused)
    ours, theirs = adamw(fused), adamw(other)
    step = fastbert.graphed_step(fused, ours, (40,), 5)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in (ours, theirs)]
    for i, batch in enumerate(ragged("BertForTokenClassification", device)):
        assert_close(step(**batch), train(other, theirs, [batch])[0])
        assert_same(fused, other)
        for scheduler in schedulers:
            scheduler.step()
        if i == 3:
            ours.load_state_dict(copy.deepcopy(ours.state_dict()))
            for optimizer in (ours, theirs):
                optimizer.param_groups[0]["betas"] = (0.5, 0.9)
            torch.cuda.empty_cache()
    assert (step.captures, step.replays) == (2, 5)


@pytest.mark.gpu
def test_buckets_of_a_gpu_share_their_memory_and_hold_no_gradients(device: torch.device) -> None:
    config = tiny_config(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, max_position_embeddings=512)
    fused = fastbert.BertForSequenceClassification(config).to(device).train()
    step = fastbert.graphed_step(fused, adamw(fused), range(1024, 4097, 512))
    labels = torch.zeros(8, dtype=torch.int64, device=device)
    step(input_ids=ids(8, 512, device), labels=labels)
    torch.cuda.empty_cache()
    held, start = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    for tokens in step.buckets:
        step(input_ids=ids(8, tokens.tokens // 8, device), labels=labels)
    torch.cuda.empty_cache()
    assert step.captures == 7
    assert torch.cuda.memory_reserved(device) <= 2 * start  # apart it would be over four times
    assert torch.cuda.memory_allocated(device) - held <= 2**20
    assert all(p.grad is None for p in fused.parameters())


@pytest.mark.gpu
def test_streams_of_a_gpu_take_turns_to_step(device: torch.device) -> None:
    _, fused = heads("BertForTokenClassification", device)
    other = copy.deepcopy(fused)
    step = fastbert.graphed_step(fused, sgd(fused), (40,), 5)
    batches = ragged("BertForTokenClassification", device) * 4
    streams = [torch.cuda.Stream() for _ in range(4)]
    losses = []
    for i, batch in enumerate(batches):
        streams[i % 4].wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(streams[i % 4]):
            losses.append(step(**batch))
    torch.cuda.synchronize()
    assert_close(torch.stack(losses), train(other, sgd(other), batches))
    assert_same(fused, other)
    assert step.replays == len(batches) - 1


@pytest.mark.gpu
def test_a_gpu_takes_plain_steps_where_something_makes_it_wait(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fused = heads("BertForTokenClassification", device)
    step, batch = fastbert.graphed_step(fused, sgd(fused)), batch_of("BertForTokenClassification", [5], 5, device)
    with backend("torch"):
        step(**batch)
    monkeypatch.setenv("FASTBERT_CHECK", "1")
    step(**batch)
    assert step.plain.total() == 2
    assert step.captures == 0

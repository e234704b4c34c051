"""Inference replayed from recordings. Without a GPU what is recorded is run again, all else being the same."""

import copy
import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from models import assert_close, ids, mask_of, pair, randomize, tiny_config
from recorders import rerun_calls as rerun
from torch import nn

import fastbert
from fastbert import notices
from fastbert.distill import capture
from fastbert.graphs.buckets import TOKENS, Bucket, choose_bucket, make_buckets
from fastbert.graphs.recording import CudaRecorder
from fastbert_kernels import backend


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def on_the_bucket(model: fastbert.BertModel, bucket: Bucket, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What the model itself gives for the tokens of a batch and the padding of a bucket: (batch, seq, hidden)."""
    tokens = mask.bool()
    count, padding = int(tokens.sum()), bucket.tokens - int(tokens.sum())
    bounds = [0, *tokens.sum(1).cumsum(0).tolist()]
    while bounds[-1] < bucket.tokens:
        bounds.append(min(bounds[-1] // bucket.longest * bucket.longest + bucket.longest, bucket.tokens))
    bounds += [bucket.tokens] * (bucket.sequences - (-bucket.tokens // bucket.longest) + 1 - len(bounds))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=x.device)
    columns = torch.arange(x.shape[1], device=x.device).expand_as(x)
    hidden = model(
        nn.functional.pad(x[tokens], (0, padding))[None],
        position_ids=nn.functional.pad(columns[tokens], (0, padding))[None],
        cu_seq_lens_q=cu_seqlens,
        cu_seq_lens_k=cu_seqlens,
        max_length_q=bucket.longest,
        max_length_k=bucket.longest,
    ).last_hidden_state[0]
    whole = hidden.new_zeros(*x.shape, hidden.shape[1])
    whole[tokens] = hidden[:count]
    return whole


def gaps(device: torch.device | str = "cpu") -> torch.Tensor:
    """Padding on the right, on the left, within, everywhere, nowhere."""
    rows = ["11110000000", "00000011111", "10100110001", "00000000000", "11111111111"]
    return torch.tensor([[int(bit) for bit in row] for row in rows], device=device)


# Buckets.


@pytest.mark.parametrize(
    ("tokens", "sequences", "longest", "chosen"),
    [
        (1, 1, 1, 32),
        (0, 1, 1, 32),
        (32, 2, 30, 32),  # exactly full
        (33, 2, 30, 64),  # one over
        (2, 3, 1, 64),  # more sequences than the smallest has room for
        (64, 1, 40, 64),
        (64, 1, 41, None),  # longer than the model takes
        (80, 9, 40, 80),  # the largest has room for all sequences
        (80, 10, 40, None),
        (81, 1, 40, None),
    ],
)
def test_the_smallest_bucket_with_room_is_chosen(tokens: int, sequences: int, longest: int, chosen: int | None) -> None:
    bucket = choose_bucket(make_buckets([80, 32, 64, 32], 9, 40), tokens, sequences, longest)
    assert (bucket.tokens if bucket else None) == chosen


def test_rooms_of_the_default_buckets() -> None:
    buckets = make_buckets(TOKENS, 64, 512)
    assert [(b.tokens, b.sequences, b.longest) for b in buckets][:4] == [
        (32, 2, 32),
        (64, 4, 64),
        (96, 6, 96),
        (128, 8, 128),
    ]
    assert (buckets[-1].sequences, buckets[-1].longest) == (64, 512)
    for smaller, bucket in itertools.pairwise(buckets):
        assert bucket.tokens * 2 / 3 <= smaller.tokens or bucket.tokens == 64


@pytest.mark.parametrize(("tokens", "sequences"), [([], 4), ([0, 8], 4), ([8], 0)])
def test_no_buckets_are_an_error(tokens: list[int], sequences: int) -> None:
    with pytest.raises(ValueError, match="need tokens and max_sequences of at least 1"):
        make_buckets(tokens, sequences, 40)


@given(st.integers(1, 90), st.integers(1, 30), st.integers(1, 7), st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_padding_fills_a_bucket_in_sequences_that_are_not_too_long(
    tokens: int, longest: int, sequences: int, data: st.DataObject
) -> None:
    bucket = make_buckets([tokens], sequences, longest)[0]
    count, batch = data.draw(st.integers(0, tokens)), data.draw(st.integers(1, sequences))
    padding = bucket.bounds(torch.device("cpu"))[count // bucket.longest :][: bucket.slots - batch]
    bounds = [count, *padding.tolist()]
    assert len(bounds) + batch == bucket.slots + 1
    assert bounds[-1] == tokens
    assert all(0 <= after - before <= bucket.longest for before, after in itertools.pairwise(bounds))


# What comes out.


def test_ragged_batches_equal_the_model_and_are_bit_equal_to_it_on_the_bucket(
    device: torch.device, backend_name: str
) -> None:
    plain, fused = pair(device)
    graphed, x, mask = rerun(fused), ids(5, 11, device), gaps(device)
    ours, wanted, theirs = graphed(x, mask), fused(x, mask), plain(x, mask)
    assert type(ours) is type(wanted)
    assert list(ours) == list(wanted)
    assert_close(ours.last_hidden_state, wanted.last_hidden_state, atol=2e-6)
    assert_close(ours.pooler_output, wanted.pooler_output, atol=2e-6)
    assert_close(ours.last_hidden_state, theirs.last_hidden_state, mask.bool())
    assert (ours.last_hidden_state[mask == 0] == 0).all()
    assert torch.equal(ours.last_hidden_state, on_the_bucket(fused, graphed.buckets[-1], x, mask))
    assert (graphed.captures, graphed.replays, graphed.plain.total()) == (1, 1, 0)
    for dtype in (torch.bool, torch.float32):
        assert torch.equal(graphed(x, mask.to(dtype)).last_hidden_state, ours.last_hidden_state)


@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (2, 8), (6, 1), (2, 32), (1, 40), (6, 7)])
def test_batches_without_padding(device: torch.device, shape: tuple[int, int]) -> None:
    _, fused = pair(device)
    graphed, x = rerun(fused), ids(*shape, device)
    wanted = fused(x)
    for mask in (None, torch.ones_like(x)):
        ours = graphed(x, mask)
        assert_close(ours.last_hidden_state, wanted.last_hidden_state, atol=2e-6)
        assert_close(ours.pooler_output, wanted.pooler_output, atol=2e-6)
        assert ours.last_hidden_state.is_contiguous()
    assert (graphed.captures, graphed.replays) == (1, 2)


def test_every_argument_of_the_embeddings_arrives(device: torch.device) -> None:
    _, fused = pair(device)
    graphed, x, mask = rerun(fused), ids(3, 11, device), mask_of([11, 1, 6], 11, device)
    types, positions = torch.randint(0, 2, x.shape, device=device), torch.randint(0, 40, x.shape, device=device)
    for arguments in (
        {"token_type_ids": types},
        {"position_ids": positions},
        {"position_ids": positions[:1], "token_type_ids": types[:1]},
        {"input_ids": x.int(), "token_type_ids": types.int(), "position_ids": positions.int()},
    ):
        for more in ({}, {"attention_mask": mask}):
            call = {"input_ids": x, **arguments, **more}
            assert_close(graphed(**call).last_hidden_state, fused(**call).last_hidden_state, atol=2e-6)
    assert (graphed.captures, graphed.replays) == (1, 8)
    assert isinstance(graphed(x, return_dict=False), tuple)


def test_a_batch_of_nothing_but_padding_is_zero() -> None:
    _, fused = pair()
    x = ids(2, 5)
    ours, wanted = rerun(fused)(x, torch.zeros_like(x)), fused(x, torch.zeros_like(x))
    assert torch.equal(ours.last_hidden_state, wanted.last_hidden_state)
    assert torch.equal(ours.pooler_output, wanted.pooler_output)
    assert (ours.last_hidden_state == 0).all()


def test_what_lies_beyond_the_tokens_changes_nothing(device: torch.device, backend_name: str) -> None:
    _, fused = pair(device)
    graphed, x, mask = rerun(fused), ids(5, 11, device), gaps(device)
    count, bucket = int(mask.sum()), graphed.buckets[-1]
    wanted = graphed(x, mask)

    def poison() -> None:
        for part, values in zip(graphed._arrays._ids[: 3 * bucket.tokens].view(3, -1), (60, 40, 2), strict=True):
            part[count:] = torch.randint(0, values, part[count:].shape, device=device)
        padding = graphed._arrays._cu_seqlens[1 + len(mask) : bucket.slots + 1]  # and its division into sequences
        padding[:-1] = torch.randint(count, bucket.tokens, padding[:-1].shape, device=device).sort().values

    graphed._recorder.before_replay = poison  # type: ignore[attr-defined]
    for _ in range(2):
        ours = graphed(x, mask)
        assert torch.equal(ours.last_hidden_state, wanted.last_hidden_state)
        assert torch.equal(ours.pooler_output, wanted.pooler_output)


def test_calls_share_no_memory_and_leave_nothing_behind() -> None:
    _, fused = pair()
    graphed = rerun(fused).warm_up()
    batches = [(ids(5, 12), None), (ids(1, 3), None), (ids(5, 11), gaps()), (ids(2, 4), mask_of([1, 2], 4))]
    fresh = [rerun(fused)(x, mask) for x, mask in batches]
    outputs = [graphed(x, mask) for x, mask in batches]
    kept = [copy.deepcopy(dict(output)) for output in outputs]
    outputs += [graphed(x, mask) for x, mask in reversed(batches)]
    for output, wanted in zip(outputs, [*fresh, *reversed(fresh)], strict=True):
        assert torch.equal(output.last_hidden_state, wanted.last_hidden_state)
        assert torch.equal(output.pooler_output, wanted.pooler_output)
    for output, before in zip(outputs, kept, strict=False):
        assert torch.equal(output.last_hidden_state, before["last_hidden_state"])
    assert graphed.captures == 3


def test_shapes_that_vary_inside_a_bucket_are_not_recorded_again() -> None:
    _, fused = pair()
    graphed = rerun(fused)
    for lengths, seq in (([9], 9), ([16], 16), ([1], 40), ([3, 4, 2], 5), ([0, 8, 8], 11), ([2] * 5, 2)):
        graphed(ids(len(lengths), seq), mask_of(lengths, seq))
    assert graphed.captures == 2  # the last three have more sequences than the smallest bucket takes
    assert graphed._recorder.sizes == [16, 64]  # type: ignore[attr-defined]
    assert graphed.replays == 6


HEADS = [
    "BertForPreTraining",
    "BertLMHeadModel",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForMultipleChoice",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
]


@pytest.mark.parametrize("own", [True, False], ids=["fastbert's", "fused in place"])
@pytest.mark.parametrize("name", HEADS)
def test_every_head_is_replayed(name: str, own: bool) -> None:
    head = getattr(fastbert if own else transformers, name)(tiny_config())
    randomize(head)
    model = fastbert.fuse(head.eval(), packing=True)
    x, mask = ids(4, 11), mask_of([11, 3, 7, 1], 11)
    if name == "BertForMultipleChoice":
        x, mask = x.view(2, 2, 11), mask.view(2, 2, 11)
    graphed = rerun(model)
    ours, wanted = graphed(x, attention_mask=mask), model(x, attention_mask=mask)
    assert type(ours) is type(wanted)
    assert list(ours) == list(wanted)
    for key in wanted:
        assert_close(ours[key], wanted[key], atol=5e-6)
    assert graphed.replays == 1


def test_rows_that_nothing_reads_are_left_out_of_what_is_returned() -> None:
    ours = fastbert.BertForSequenceClassification(tiny_config()).eval()
    ours.bert.packing = True
    mask = gaps()[:2]
    x = ids(*mask.shape)
    whole = ours.bert(x, mask).last_hidden_state
    logits = ours(x, mask).logits
    graphed = rerun(fastbert.skip_unread(ours))
    torch.testing.assert_close(graphed(x, mask).logits, logits)
    of_bert = rerun(ours.bert)
    last = of_bert(x, mask).last_hidden_state
    assert last.shape == (2, 1, whole.shape[2])
    torch.testing.assert_close(last, whole[:, :1])
    assert (graphed.replays, of_bert.replays) == (1, 1)


def test_a_head_computes_its_loss() -> None:
    model = fastbert.BertForSequenceClassification(tiny_config()).eval()
    x, labels = ids(3, 11), torch.tensor([0, 1, 1])
    assert_close(rerun(model)(x, labels=labels).loss, model(x, labels=labels).loss)


@pytest.mark.parametrize("first", [True, False])
def test_inference_mode_is_as_good_as_gradients_off(first: bool) -> None:
    _, fused = pair()
    graphed, x, mask = rerun(fused), ids(5, 11), gaps()
    for inside in (first, not first):
        with torch.inference_mode(inside), torch.no_grad():
            ours = graphed(x, mask)
            assert ours.last_hidden_state.is_inference() == inside
            assert_close(ours.last_hidden_state, fused(x, mask).last_hidden_state, atol=2e-6)
    assert (graphed.captures, graphed.replays) == (1, 2)


def test_threads_take_turns() -> None:
    _, fused = pair()
    graphed = rerun(fused)
    batches = [ids(2, 8) for _ in range(4)]
    wanted = [graphed(x).last_hidden_state for x in batches]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                if not torch.equal(graphed(batches[i]).last_hidden_state, wanted[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert graphed.replays == 44


# What is not replayed.


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"output_attentions": True}, "the call has output_attentions"),
        ({"output_hidden_states": [-1]}, "the call has output_hidden_states"),
        ({"head_mask": torch.tensor([1.0, 0.0, 1.0, 1.0])}, "the call has head_mask"),
        ({"attention_mask": torch.ones(2, 1, 6, 6).tril().bool()}, "attention_mask has more than two dimensions"),
        ({"input_ids": None, "inputs_embeds": torch.ones(2, 6, 32)}, "the call has inputs_embeds"),
    ],
)
def test_what_no_recording_has_takes_the_models_own_path_and_says_so(
    arguments: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    notices.say_once.cache_clear()
    _, fused = pair()
    graphed, call = rerun(fused), {"input_ids": ids(2, 6), **arguments}
    with caplog.at_level(logging.WARNING, "fastbert"):
        ours = [graphed(**call), graphed(**call)][1]
    wanted = fused(**call)
    assert list(ours) == list(wanted)
    assert torch.equal(ours.last_hidden_state, wanted.last_hidden_state)
    assert graphed.plain == {reason: 2}
    assert (graphed.captures, graphed.replays) == (0, 0)
    assert [r.message for r in caplog.records] == [f"fastbert: a call of a graphed BertModel is not replayed: {reason}"]


def test_packed_batches_take_the_models_own_path() -> None:
    _, fused = pair()
    cu_seqlens = torch.tensor([0, 4, 6], dtype=torch.int32)
    packed = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 4, "max_length_k": 4}
    graphed, x = rerun(fused), ids(1, 6)
    assert torch.equal(graphed(x, **packed).last_hidden_state, fused(x, **packed).last_hidden_state)
    assert graphed.plain == {"the call has cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k": 1}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", [(5, 13), (7, 2), (1, 41)], ids=["tokens", "sequences", "length"])
def test_a_batch_over_the_largest_bucket_takes_the_models_own_path(padded: bool, shape: tuple[int, int]) -> None:
    _, fused = pair()
    graphed, x = rerun(fused), ids(*shape)
    call = {"input_ids": x, "position_ids": torch.arange(shape[1])[None] % 40}
    if padded:
        call = {name: nn.functional.pad(value, (0, 1)) for name, value in call.items()}
        call["attention_mask"] = nn.functional.pad(torch.ones_like(x), (0, 1))
    assert torch.equal(graphed(**call).last_hidden_state, fused(**call).last_hidden_state)
    assert graphed.plain == {"a batch is over the largest bucket of 64 tokens in 6 sequences of at most 40": 1}


def test_gradients_and_autocast_take_the_models_own_path() -> None:
    _, fused = pair()
    graphed, x = rerun(fused), ids(2, 6)
    with torch.enable_grad():
        graphed(x).last_hidden_state.square().sum().backward()
    assert fused.embeddings.word_embeddings.weight.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(graphed(x).last_hidden_state, fused(x).last_hidden_state)
    assert graphed.plain == {
        "gradients are on: call it under torch.inference_mode()": 1,
        "autocast is on: cast the model": 1,
    }


def test_wrong_input_raises_what_the_model_raises() -> None:
    _, fused = pair()
    graphed = rerun(fused)
    with pytest.raises(ValueError, match="is over the model's max_position_embeddings=40"):
        graphed(ids(1, 41))
    with pytest.raises(ValueError, match="an empty batch cannot be encoded"):
        graphed(ids(0, 4))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds, got neither"):
        graphed()
    with pytest.raises(IndexError, match="words holds 60"):
        graphed(torch.full((1, 3), 60))
    assert torch.equal(graphed(torch.ones(1, 3).long())[0], rerun(fused)(torch.ones(1, 3).long())[0])


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def _hook(model: fastbert.BertModel) -> Callable[[], Any]:
    return model.encoder.layer[1].register_forward_hook(lambda module, args, output: output + 1).remove


def _own_forward(model: fastbert.BertModel) -> Callable[[], Any]:
    layer = model.encoder.layer[0]
    layer.forward = lambda hidden, *args, **kwargs: hidden  # type: ignore[method-assign]
    return lambda: layer.__dict__.pop("forward")


def _training(model: fastbert.BertModel) -> Callable[[], Any]:
    dropout = model.embeddings.dropout.train()
    return dropout.eval


def _adapter(model: fastbert.BertModel) -> Callable[[], Any]:
    """What an adapter does: a module in the place of another, around the same parameters."""
    block = model.encoder.layer[0].attention.self
    before = block.query
    block.query = Doubled(32, 32).eval()
    block.query.weight, block.query.bias = before.weight, before.bias

    def undo() -> None:
        block.query = before

    return undo


def _unpacked(model: fastbert.BertModel) -> Callable[[], Any]:
    model.packing = False
    return lambda: setattr(model, "packing", True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hook, "modules in it have forward hooks"),
        (_own_forward, "modules in it have forward hooks"),
        (_training, "the model is in training mode: call model.eval()"),
        (_adapter, "not all of it is fused: layer 0 attention.self: query (Doubled) called as a module"),
        (_unpacked, "its padding is kept (packing=False)"),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_that_cannot_be_recorded_is_called_until_it_can(
    change: Callable[[fastbert.BertModel], Callable[[], Any]], reason: str, when: str
) -> None:
    _, fused = pair()
    graphed, x, mask = rerun(fused), ids(5, 11), gaps()
    if when == "after":
        graphed(x, mask)
    undo = change(fused)
    for _ in range(2):
        assert torch.equal(graphed(x, mask).last_hidden_state, fused(x, mask).last_hidden_state)
    assert len(graphed.plain) == 1
    assert next(iter(graphed.plain)).startswith(reason)
    with pytest.raises(RuntimeError, match="nothing can be recorded: "):
        graphed.warm_up()
    undo()
    assert_close(graphed(x, mask).last_hidden_state, fused(x, mask).last_hidden_state, atol=2e-6)
    assert graphed.plain.total() == 2
    assert graphed.captures == 1  # what was recorded is as good as before


def test_a_watched_model_is_called() -> None:
    _, fused = pair()
    graphed, x = rerun(fused), ids(2, 6)
    graphed(x)
    with capture(fused) as seen:
        graphed(x)
    assert seen
    assert graphed.plain == {"distill.capture looks on": 1}


def test_an_unfused_model_is_called() -> None:
    _, fused = pair()
    graphed, x = rerun(fused), ids(2, 6)
    graphed(x)
    fastbert.unfuse(fused)
    assert torch.equal(graphed(x).last_hidden_state, fused(x).last_hidden_state)
    assert graphed.plain == {"the model is no longer fused": 1}
    fastbert.fuse(fused)
    assert_close(graphed(x).last_hidden_state, fused(x).last_hidden_state, atol=2e-6)


def test_another_bert_in_the_head_is_called() -> None:
    model = fastbert.BertForTokenClassification(tiny_config()).eval()
    graphed, x = rerun(model), ids(2, 6)
    graphed(x)
    model.bert = fastbert.BertModel(tiny_config(), add_pooling_layer=False).eval()
    assert torch.equal(graphed(x).logits, model(x).logits)
    assert graphed.plain == {"its bert was replaced": 1}


# Parameters.


def _replaced(model: fastbert.BertModel) -> None:
    model.encoder.layer[0].output.dense.bias = nn.Parameter(torch.randn(32))


def _moved(model: fastbert.BertModel) -> None:
    model.encoder.layer[0].attention.self.key.weight.data = torch.randn(32, 32)


def _assigned(model: fastbert.BertModel) -> None:
    model.load_state_dict({name: torch.randn_like(p) for name, p in model.state_dict().items()}, assign=True)


def _cast(model: fastbert.BertModel) -> None:
    model.bfloat16()


def _pruned(model: fastbert.BertModel) -> None:
    model.encoder.layer = model.encoder.layer[:1]


@pytest.mark.parametrize("change", [_replaced, _moved, _assigned, _cast, _pruned])
def test_parameters_that_lie_elsewhere_are_recorded_again(change: Callable[[fastbert.BertModel], None]) -> None:
    _, fused = pair()
    graphed, x, mask = rerun(fused), ids(5, 11), gaps()
    before = graphed(x, mask).last_hidden_state
    change(fused)
    ours, wanted = graphed(x, mask).last_hidden_state, fused(x, mask).last_hidden_state
    assert_close(ours, wanted, atol=2e-6 if ours.dtype == torch.float32 else 2e-2)
    assert not torch.equal(ours.float(), before)
    graphed(x, mask)
    assert (graphed.captures, graphed.replays) == (2, 3)


def test_parameters_that_change_in_place_are_seen() -> None:
    _, fused = pair()
    graphed, x = rerun(fused), ids(2, 6)
    before = graphed(x).last_hidden_state
    fused.load_state_dict({name: value + 0.1 for name, value in fused.state_dict().items()})
    assert_close(graphed(x).last_hidden_state, fused(x).last_hidden_state, atol=2e-6)
    assert not torch.equal(graphed(x).last_hidden_state, before)
    assert graphed.captures == 1


def test_where_torch_is_told_of_tf32_is_recorded_again() -> None:
    _, fused = pair()
    graphed, matmul = rerun(fused), torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision, captures in (("ieee", 1), ("ieee", 1), ("tf32", 2), ("tf32", 2)):
            matmul.fp32_precision = precision
            graphed(ids(1, 5))
            assert graphed.captures == captures
    finally:
        matmul.fp32_precision = before


def test_training_between_two_calls_costs_no_recording() -> None:
    _, fused = pair()
    graphed, x = rerun(fused), ids(2, 6)
    graphed(x)
    with torch.enable_grad():
        optimizer = torch.optim.SGD(fused.parameters(), 0.1)
        fused.train()(x).last_hidden_state.square().sum().backward()
        optimizer.step()
    graphed(x)
    fused.eval()
    assert_close(graphed(x).last_hidden_state, fused(x).last_hidden_state, atol=2e-6)
    assert graphed.plain == {"the model is in training mode: call model.eval()": 1}
    assert (graphed.captures, graphed.replays) == (1, 2)


# Warming up, and what cannot be wrapped.


def test_warming_up_records_every_bucket_largest_first(capsys: pytest.CaptureFixture[str]) -> None:
    _, fused = pair()
    graphed = rerun(fused)
    graphed(ids(1, 30))
    assert graphed.warm_up(progress=True) is graphed
    assert "Recording" in capsys.readouterr().out
    assert graphed._recorder.sizes == [40, 64, 16]  # type: ignore[attr-defined]
    for shape in ((1, 5), (5, 8), (4, 15)):
        x = ids(*shape)
        assert_close(graphed(x).last_hidden_state, fused(x).last_hidden_state, atol=2e-6)
    assert graphed.captures == 3


def test_warming_up_needs_no_inference_mode() -> None:
    _, fused = pair()
    with torch.enable_grad():
        assert rerun(fused).warm_up().captures == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="says that there is no GPU")
def test_without_a_gpu_there_is_a_clear_error() -> None:
    _, fused = pair()
    with pytest.raises(RuntimeError, match=r"need a GPU, and the model is on cpu: move it with model\.to\('cuda'\)"):
        fastbert.graphed(fused)


def test_what_is_no_fused_encoder_is_an_error() -> None:
    plain, fused = pair()
    with pytest.raises(ValueError, match="BertModel is a decoder or not fused"):
        rerun(plain)
    with pytest.raises(ValueError, match="BertModel is a decoder or not fused"):
        rerun(fastbert.BertLMHeadModel(tiny_config(is_decoder=True)))
    with pytest.raises(ValueError, match="Sequential is neither a BertModel nor one of Hugging Face's heads"):
        rerun(nn.Sequential(fused))


def test_a_head_that_keeps_its_keywords_is_an_error() -> None:
    class Kept(fastbert.BertForTokenClassification):
        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            return super().forward(input_ids)

    with pytest.raises(RuntimeError, match="Kept does not pass its keywords on to its bert"):
        rerun(Kept(tiny_config()).eval())(ids())


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_replays_on_a_gpu_are_bit_equal_to_the_model_on_the_bucket(device: torch.device, dtype: torch.dtype) -> None:
    _, fused = pair(device)
    fused.to(dtype)
    graphed = fastbert.graphed(fused, (16, 40, 64), 6).warm_up()
    batches = [(ids(5, 11, device), gaps(device)), (ids(1, 40, device), None), (ids(2, 3, device), None)]
    outputs = [graphed(x, mask).last_hidden_state for x, mask in batches * 2]
    for output, (x, mask) in zip(outputs, batches * 2, strict=True):
        mask = torch.ones_like(x) if mask is None else mask
        lengths = mask.sum(1)
        bucket = choose_bucket(graphed.buckets, int(lengths.sum()), x.shape[0], int(lengths.max()))
        assert bucket is not None
        assert torch.equal(output, on_the_bucket(fused, bucket, x, mask))
    assert (graphed.captures, graphed.replays, graphed.plain.total()) == (3, 6, 0)


@pytest.mark.gpu
def test_buckets_on_a_gpu_share_their_memory(device: torch.device) -> None:
    config = tiny_config(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, max_position_embeddings=512)
    fused = fastbert.BertModel(config).to(device).eval()
    graphed = fastbert.graphed(fused, range(1024, 4097, 256))
    torch.cuda.empty_cache()
    start = torch.cuda.memory_reserved(device)
    graphed(ids(8, 500, device))
    largest = torch.cuda.memory_reserved(device)
    graphed.warm_up()
    assert graphed.captures == 13
    assert torch.cuda.memory_reserved(device) - largest <= 2 * (largest - start)  # apart it would be over six times


@pytest.mark.gpu
def test_streams_of_a_gpu_take_turns(device: torch.device) -> None:
    _, fused = pair(device)
    graphed = fastbert.graphed(fused, (64,), 6)
    batches = [ids(2, 30, device) for _ in range(4)]
    wanted = [graphed(x).last_hidden_state for x in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in batches]
    outputs = []
    for i in range(40):
        with torch.cuda.stream(streams[i % 4]):
            outputs.append(graphed(batches[i % 4]).last_hidden_state)
    torch.cuda.synchronize()
    assert all(torch.equal(output, wanted[i % 4]) for i, output in enumerate(outputs))


@pytest.mark.gpu
def test_a_gpus_recordings_see_new_values_and_follow_moved_ones(device: torch.device) -> None:
    _, fused = pair(device)
    graphed, x = fastbert.graphed(fused, (16, 40)), ids(2, 6, device)
    for change in (lambda p: p.add_(0.1), lambda p: setattr(p, "data", p.data + 0.1)):
        graphed(x)
        for p in fused.parameters():
            change(p)
        torch.cuda.empty_cache()
        assert_close(graphed(x).last_hidden_state, fused(x).last_hidden_state, atol=1e-5)
    assert graphed.captures == 2


@pytest.mark.gpu
def test_a_gpu_takes_plain_pytorch_and_checks_by_the_models_own_path(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fused = pair(device)
    graphed, x = fastbert.graphed(fused, (16,)), ids(2, 6, device)
    with backend("torch"):
        assert torch.equal(graphed(x).last_hidden_state, fused(x).last_hidden_state)
    monkeypatch.setenv("FASTBERT_CHECK", "1")
    graphed(x)
    assert graphed.plain.total() == 2
    assert graphed.captures == 0


def test_the_recorder_of_graphs_names_the_device() -> None:
    with pytest.raises(RuntimeError, match="the model is on cpu"):
        CudaRecorder(torch.device("cpu"))

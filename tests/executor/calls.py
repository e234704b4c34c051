"""Calls of every op with its gradients, and a step of a small model in training: what the tests here run."""

import torch
import transformers

import fastbert
from fastbert.tuning.problems import Op, Problem, Sizes, by_kernels, checked_problem, cotangents_of
from fastbert_kernels import backend
from fastbert_kernels.tuned import Launch

Switches = tuple[str, ...]
#: An op by its first kernel, dtype and width, and the switches of the call.
Call = tuple[Launch, Switches]


def op_calls(dtype: torch.dtype, *, head_dim: int, features: int) -> list[Call]:
    """Every op in training: all of its kernels, forward and backward."""
    return [
        (Launch("attention_forward", dtype, head_dim, False), ("CU_SEQLENS", "DROPOUT")),
        (Launch("attention_forward", dtype, head_dim, True), ("CU_SEQLENS", "DROPOUT", "PROBS")),
        (Launch("attention_forward", dtype, head_dim, True), ("BIAS", "HEAD_MASK")),
        (Launch("relation_forward", dtype, head_dim, False), ("CU_SEQLENS", "SOFTMAX")),
        (Launch("relation_forward", dtype, head_dim, False), ()),
        (Launch("add_layer_norm_forward", dtype, features, False), ("BIAS", "RESIDUAL", "DROPOUT")),
        (Launch("embed_forward", dtype, features, False), ("WORD_TABLE", "DROPOUT")),
        (Launch("bias_activation_forward", dtype, features, False), ("BIAS", "gelu")),
        (Launch("feed_forward_forward", dtype, features, False), ("gelu", "PRE")),
        (Launch("feed_forward_backward", dtype, features, False), ("gelu",)),
    ]


def problem(call: Call, sizes: Sizes) -> Problem:
    launch, switches = call
    return checked_problem(launch, switches, sizes, torch.device("cpu"))


def results(problem: Problem) -> list[torch.Tensor]:
    """Outputs and gradients of the kernels."""
    return of_op(by_kernels(problem.op), problem, None)


def of_op(op: Op, problem: Problem, dtype: torch.dtype | None) -> list[torch.Tensor]:
    """Outputs and gradients of one way to compute a problem, its inputs in another dtype if one is given."""
    inputs = [x.detach().to(dtype).requires_grad_(problem.differentiable) for x in problem.inputs]
    outputs = op(*inputs)
    if not problem.differentiable:
        return list(outputs)
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, inputs, cotangents_of(outputs))]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits: NaN is NaN, and 0 is not -0."""
    return torch.equal(*(x.reshape(-1).contiguous().view(torch.uint8) for x in (a, b)))


def model_step(name: str, dtype: torch.dtype, lengths: list[int], dropout_p: float) -> list[torch.Tensor]:
    """Loss, states and gradients of two layers in training, on a ragged batch.

    Args:
        name: of the backend.
        dtype: of the model.
        lengths: of the sequences.
    """
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        vocab_size=97,
        max_position_embeddings=80,
        initializer_range=0.2,
        hidden_dropout_prob=dropout_p,
        attention_probs_dropout_prob=dropout_p,
    )
    model = fastbert.BertModel(config).to(dtype).train()
    ids = torch.randint(1, 97, (len(lengths), max(lengths)))
    mask = (torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]).long()
    with backend(name):
        torch.manual_seed(1)
        output = model(ids, mask, output_attentions=True, output_hidden_states=True)
        states = [output.last_hidden_state, output.pooler_output, *output.hidden_states, *output.attentions]
        drawn = torch.Generator().manual_seed(2)
        terms = [(state.double() * torch.randn(state.shape, generator=drawn)).sum() for state in states]
        loss = torch.stack(terms).sum()
        loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    return [loss.detach(), *(state.detach() for state in states), *gradients]

"""Query, key and value as one matrix product over three parameters.

The three weights are kept as neighbouring views of one storage, so that the stacked matrix is a view and costs
nothing. They stay three parameters: in the state dict, in the optimizer, in `named_parameters`.
"""

import itertools
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastbert.notices import warn_once
from fastbert_kernels import uses_triton
from fastbert_kernels.backend import is_traced
from fastbert_kernels.stacked import ContextUse, SideBySide, stacked

from .readable import describe, is_plain_linear

#: Why the three projections may be three products although each is plain.
APART = "query, key and value are three products: something else holds their parameters (FSDP, a flat buffer)"


def project(dense: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dense(x), and the bias still to be added where a fused kernel will add it.

    Args:
        dense: a linear layer; called as a module unless plain.
        x: (..., in_features).

    Returns:
        (..., out_features), and `dense.bias` if it was left out: (out_features,) or None.
    """
    if not is_plain_linear(dense):
        _say_called(dense)
        return dense(x), None
    weight, bias = dense._parameters["weight"], dense._parameters["bias"]
    assert weight is not None
    return (F.linear(x, weight), bias) if uses_triton(x) else (F.linear(x, weight, bias), None)


def _say_called(module: nn.Module) -> None:
    if not is_plain_linear(module):
        warn_once(f"fastbert: {describe(module, nn.Linear)} is called as a module; the layer around it stays fused")


def seen_as_one(parts: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
    """Tensors (rows, ...) that lie one after the other, without a gap, in one storage as (sum of rows, ...), detached;
    None where they do not."""
    end = parts[0].data_ptr()
    if end == 0:
        return None
    for part in parts:
        if part.data_ptr() != end or not part.is_contiguous():
            return None
        end += part.nbytes
    first = parts[0].detach()
    try:
        return first.as_strided((sum([part.shape[0] for part in parts]), *first.shape[1:]), first.stride())
    except RuntimeError:  # it would leave the first one's storage
        return None


def adjacent(parts: tuple[torch.Tensor, ...]) -> bool:
    """Whether the tensors can be seen as one."""
    return seen_as_one(parts) is not None


def _movable(parts: tuple[torch.Tensor, ...]) -> bool:
    """Whether tensors may be moved: they are parameters of one kind, and nothing else refers to their storages.

    Whoever else does would go on filling the old storage, which nobody reads any more: a sharding engine the
    parameters it gathers or its flat buffer, another process the memory it shares.
    """
    first = parts[0]
    if any(type(p) is not nn.Parameter or p.dtype != first.dtype or p.device != first.device for p in parts):
        return False
    if first.is_meta or (first.is_cpu and any(p.is_shared() for p in parts)):  # on a GPU is_shared is always True
        return False
    if len({p.data_ptr() for p in parts}) < len(parts):  # tied, as keys to queries: they stay so
        return False
    storages = [p.untyped_storage() for p in parts]
    held = Counter(storage._cdata for storage in storages)
    # The storage's own Python object, alive in the list above, is one more reference.
    return all(torch._C._storage_Use_Count(storage) == count + 1 for storage, count in held.items())


def can_be_neighbours(parts: tuple[torch.Tensor, ...]) -> bool:
    """Whether tensors are adjacent or may be made so."""
    return all(type(p) is nn.Parameter for p in parts) and (adjacent(parts) or _movable(parts))


def rehome(parts: tuple[nn.Parameter, ...]) -> bool:
    """Move parameters next to each other in a new storage, unless they are already; whether they are now."""
    if adjacent(parts):
        return True
    if not _movable(parts) or (parts[0].is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    with torch.inference_mode(False), torch.no_grad():  # a parameter made in inference mode could not be trained
        home = torch.cat([p.detach() for p in parts])
        start = 0
        for p in parts:
            p.data = home[start : start + p.shape[0]]
            start += p.shape[0]
    return True


def made_one(parts: tuple[nn.Parameter, ...]) -> torch.Tensor | None:
    """The parameters seen as one, moved next to each other if they are not; None where they cannot be."""
    whole = seen_as_one(parts)
    return seen_as_one(parts) if whole is None and rehome(parts) else whole


def separate(parts: tuple[nn.Parameter, ...]) -> None:
    """Undo `rehome`: give each parameter a storage of its own."""
    if not parts[0].is_meta and adjacent(parts):
        for p in parts:
            p.data = p.detach().clone()


def stack_parameters(
    groups: list[tuple[nn.Parameter, ...]], use: ContextUse | None = None
) -> tuple[torch.Tensor, ...] | None:
    """Each group's parameters (rows, ...) as one (sum of rows, ...), a view; None where some cannot be neighbours.

    Compiled code sees copies instead, which it may fold away: no graph has a view across parameters.
    """
    if is_traced():
        return tuple(torch.cat(parts) for parts in groups)
    views = []
    for parts in groups:
        view = made_one(parts)
        if view is None:
            return None
        views.append(view)
    return stacked(tuple(views), tuple(itertools.chain(*groups)), use)


def project_qkv(
    query: nn.Module, key: nn.Module, value: nn.Module, x: torch.Tensor, use: ContextUse | None = None
) -> torch.Tensor:
    """The three projections side by side: x (..., in) to (..., 3 * out).

    One product if all three are plain and their parameters can be neighbours, else three. Given the `use` of the
    context that is made of them, values have a gradient only where that has one.
    """
    return project_together((query, key, value), x, use)


def project_together(linears: tuple[nn.Module, ...], x: torch.Tensor, use: ContextUse | None = None) -> torch.Tensor:
    """`project_qkv` for any neighbours among the three."""
    if can_stack(*linears):
        stacked = stack_parameters(qkv_parameters(*linears), use)
        if stacked is not None:
            return F.linear(x, *stacked)
        warn_once(f"fastbert: {APART}; the layer around them stays fused")
    else:
        for linear in linears:
            _say_called(linear)
    projected = [linear(x) for linear in linears]
    return torch.cat(projected, dim=-1) if use is None else SideBySide.apply(use, *projected)


def qkv_parameters(*linears: Any) -> list[tuple[nn.Parameter, ...]]:
    """The parameters of stackable layers that belong side by side: the weights, and the biases if any."""
    parameters = [linear._parameters for linear in linears]  # a module's attributes are looked up slowly
    weights = tuple([p["weight"] for p in parameters])
    return [weights] if parameters[0]["bias"] is None else [weights, tuple([p["bias"] for p in parameters])]


def can_stack(*linears: nn.Module) -> bool:
    """Whether the layers are plain, and all of them have a bias or none."""
    biases = 0
    for linear in linears:
        if not is_plain_linear(linear):
            return False
        biases += linear._parameters["bias"] is not None
    return biases in (0, len(linears))


def in_own_storage(part: torch.Tensor) -> torch.Tensor:
    """A detached tensor's memory as a tensor whose storage holds nothing else."""
    if type(part) is not torch.Tensor or part.is_meta or part.untyped_storage().nbytes() == part.nbytes:
        return part
    return torch.from_dlpack(part)

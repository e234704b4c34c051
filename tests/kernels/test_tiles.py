"""Which tiles a launch of an attention kernel takes."""

import itertools
from typing import Any

import pytest
import torch

from fastbert_kernels import attention, backend, tiles
from fastbert_kernels.catalogue import SHORT


@pytest.mark.parametrize(
    ("max_seqlen", "planes", "processors", "up_to"),
    [
        (1, 12 * 64, 132, 32),
        (32, 12 * 64, 132, 32),
        (33, 12 * 64, 132, 64),
        (64, 12 * 64, 132, 64),
        (65, 12 * 64, 132, None),
        (512, 12 * 64, 132, None),
        # Fewer programs than multiprocessors.
        (128, 132, 132, None),
        (128, 131, 132, 64),
        (512, 12, 132, 64),
        (32, 12, 132, 32),
        (512, 0, 132, 64),
    ],
)
def test_the_class_is_by_length_and_by_the_size_of_the_grid(
    max_seqlen: int, planes: int, processors: int, up_to: int | None
) -> None:
    assert tiles.short_class(max_seqlen, planes, processors) == up_to


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [20, 50, 80])
def test_every_kernel_s_tiles_are_of_its_longest_sequence(
    length: int, packed: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int | None]] = []
    table = tiles.attention_table

    def spy(target: str, kernel: str, itemsize: int, head_dim: int, maps: bool, up_to: int | None, tf32: bool) -> Any:
        asked.append((kernel, up_to))
        return table(target, kernel, itemsize, head_dim, maps, up_to, tf32)

    monkeypatch.setattr(tiles, "attention_table", spy)
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: 1)
    qkv = torch.randn(2 * length, 3, 1, 16, device=device, requires_grad=True)
    ends = torch.tensor([0, length, 2 * length], dtype=torch.int32, device=device) if packed else None
    with backend("triton"):
        attention(qkv, ends, length)[0].square().sum().backward()
    up_to = next((up_to for up_to in SHORT if length <= up_to), None)
    assert asked == [(kernel, up_to) for kernel in ("forward", "backward_dq", "backward_dkv")]


@pytest.mark.parametrize(
    ("target", "itemsize", "head_dim", "maps", "tf32", "precision"),
    [
        ("sm_90", 4, 64, False, False, "tf32x3"),
        ("sm_90", 4, 64, False, True, "tf32"),
        ("sm_80", 4, 32, False, False, "tf32x3"),
        ("sm_80", 4, 48, False, True, "ieee"),
        ("sm_80", 4, 128, False, True, "ieee"),
        ("sm_86", 4, 64, False, True, "ieee"),
        ("sm_80", 4, 64, True, True, "ieee"),
        ("sm_80", 2, 64, False, False, "ieee"),
        ("gfx942", 4, 64, False, True, "ieee"),
        ("interpreter", 4, 64, False, True, "ieee"),
    ],
)
def test_how_float32_is_multiplied(
    target: str, itemsize: int, head_dim: int, maps: bool, tf32: bool, precision: str
) -> None:
    for kernel, up_to in itertools.product(("forward", "backward_dq", "backward_dkv"), (*SHORT, None)):
        assert tiles.attention_table(target, kernel, itemsize, head_dim, maps, up_to, tf32)["PRECISION"] == precision


@pytest.mark.parametrize(
    ("target", "itemsize", "dims", "tf32", "precision"),
    [
        ("sm_90", 4, (32, 64), False, "tf32x3"),
        ("sm_90", 4, (64, 32), True, "tf32"),
        ("sm_80", 4, (32, 32), False, "tf32x3"),
        ("sm_80", 4, (48, 64), True, "ieee"),
        ("sm_80", 4, (64, 128), True, "ieee"),
        ("sm_86", 4, (64, 64), True, "ieee"),
        ("sm_80", 2, (64, 64), True, "ieee"),
        ("gfx942", 4, (64, 64), True, "ieee"),
        ("interpreter", 4, (64, 64), True, "ieee"),
    ],
)
def test_how_float32_relations_are_multiplied(
    target: str, itemsize: int, dims: tuple[int, int], tf32: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "arch", lambda device: target)
    monkeypatch.setattr(tiles, "allows_tf32", lambda: tf32)
    dtype = torch.float32 if itemsize == 4 else torch.bfloat16
    student, teacher = (torch.empty(0, 1, dim, dtype=dtype) for dim in dims)
    for kernel in ("forward", "backward_a", "backward_b"):
        chosen = tiles.relation_tiles(kernel, student, teacher)
        assert chosen["PRECISION"] == precision
        assert chosen == tiles.relation_table(target, kernel, itemsize, max(dims), min(dims), tf32)
        if itemsize == 4:  # the wider dtype decides
            assert tiles.relation_tiles(kernel, student, teacher.half()) == chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_follows_where_torch_is_told_of_tf32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "arch", lambda device: "sm_80")
    qkv, matmul = torch.empty(0, 3, 1, 32, dtype=dtype), torch.backends.cuda.matmul
    before, found = matmul.fp32_precision, []
    try:
        for precision in ("ieee", "tf32", "none"):
            matmul.fp32_precision = precision
            found.append(tiles.attention_tiles(qkv, False, 30, 1, "forward")[0]["PRECISION"])
    finally:
        matmul.fp32_precision = before
    assert found == (["tf32x3", "tf32", "tf32x3"] if dtype == torch.float32 else ["ieee"] * 3)

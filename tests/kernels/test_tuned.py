"""The file of measured tiles: where it lies, when it is read, and what makes it ignored."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbert.tuning.problems import COMPILED
from fastbert_kernels import tuned
from fastbert_kernels.catalogue import KERNELS, TUNABLE, Launch, Product

TILES = {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}
LAUNCH = Launch("attention_forward", torch.bfloat16, 64)
PRODUCT = Product(torch.bfloat16, 768, "gelu")


def entry(launch: Launch = LAUNCH, **tiles: Any) -> dict[str, Any]:
    names = {"kernel": launch.kernel, "dtype": "bfloat16", "width": launch.width, "maps": launch.maps}
    names |= {"up_to": launch.up_to, "tf32": launch.tf32}
    return names | {"tiles": TILES | tiles}


def product_entry(**changed: Any) -> dict[str, Any]:
    names = {"kernel": "feed_forward_fused", "dtype": "bfloat16", "width": 768, "activation": "gelu"}
    return names | {"fused_from": 4096} | changed


@pytest.fixture
def name(device: torch.device) -> str:
    return tuned.kind(device)


def change(path: Path, how: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(how(json.loads(path.read_text()))))


def test_what_is_written_is_in_force_for_its_launch_alone(
    tuned_folder: Path, device: torch.device, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tuned.write(name, [entry()], {"date": "2026-01-01"})
    assert path.parent == tuned_folder
    assert json.loads(path.read_text())["provenance"] == {"date": "2026-01-01"}
    shipped = {"BLOCK_M": 16}
    x = torch.zeros(1, dtype=torch.bfloat16, device=device)
    assert tuned.tuned_tiles("attention_forward", x, 64, shipped) == TILES
    for kernel, like, width, maps, up_to in (
        ("attention_backward_dq", x, 64, False, None),
        ("attention_forward", x.half(), 64, False, None),
        ("attention_forward", x, 32, False, None),
        ("attention_forward", x, 64, True, None),
        ("attention_forward", x, 64, False, 32),
    ):
        assert tuned.tuned_tiles(kernel, like, width, shipped, maps, up_to) is shipped
    assert caplog.records == []


@pytest.mark.parametrize("start", [1, 4096, None])
def test_a_products_start_is_in_force_for_it_alone(
    tuned_folder: Path, device: torch.device, name: str, start: int | None
) -> None:
    tuned.write(name, [product_entry(fused_from=start)], {})
    assert tuned.measured(device) == {PRODUCT: start}
    assert tuned.tuned_start(device, PRODUCT, 8192) == start
    for other in (
        PRODUCT._replace(dtype=torch.float16),
        PRODUCT._replace(hidden=384),
        PRODUCT._replace(activation="relu"),
    ):
        assert tuned.tuned_start(device, other, 8192) == 8192
        assert tuned.tuned_start(device, other, None) is None


def test_without_a_file_the_shipped_tiles_run_and_nothing_is_said(
    tuned_folder: Path, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    assert tuned.measured(device) == {}
    assert not tuned_folder.exists()
    assert caplog.records == []


def test_the_file_is_read_once(tuned_folder: Path, device: torch.device, name: str) -> None:
    path = tuned.write(name, [entry()], {})
    assert tuned.measured(device) == {LAUNCH: TILES}
    path.unlink()
    tuned.write(name, [entry(BLOCK_M=128)], {})
    assert tuned.measured(device) == {LAUNCH: TILES}


def test_the_switch_leaves_it_unread(
    tuned_folder: Path, device: torch.device, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned.write(name, [entry()], {})
    monkeypatch.setenv("FASTBERT_TUNED", "0")
    assert tuned.measured(device) == {}


def test_the_folder_is_the_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTBERT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert tuned.folder() == Path.home() / ".cache" / "fastbert"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.folder() == tmp_path / "fastbert"
    monkeypatch.setenv("FASTBERT_CACHE", str(tmp_path / "own"))
    assert tuned.path_of("NVIDIA H200 (SXM)") == tmp_path / "own" / "tiles-nvidia-h200-sxm.json"


def _but(**changed: Any) -> Callable[[Any], Any]:
    return lambda content: content | changed


def _entries(*entries: Any) -> Callable[[Any], Any]:
    return _but(entries=list(entries))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (_but(device="NVIDIA A100"), "its device is 'NVIDIA A100', here it is"),
        (_but(triton="3.0.0"), "its triton is '3.0.0', here it is"),
        (_but(format=1), "its format is 1, here it is 3"),
        (_but(kernels="0123"), "measured with other kernels than this version of fastbert has"),
        (_but(entries=None), "damaged: TypeError"),
        (lambda content: [content], "damaged: no JSON object"),
        (_entries({"kernel": "attention_forward"}), "damaged: KeyError: 'dtype'"),
        (_entries(7), "damaged: TypeError"),
        (_entries(entry() | {"dtype": "int8"}), "damaged: KeyError: 'int8'"),
        (_entries(entry() | {"width": "64"}), "of width '64', up_to None, cannot have"),
        (
            _entries(entry() | {"kernel": "attention_sideways"}),
            "'attention_sideways' of width 64, up_to None, cannot have",
        ),
        (_entries(entry() | {"up_to": 48}), "up_to 48, cannot have"),
        (_entries(entry(Launch("embed_forward", torch.bfloat16, 64, up_to=32))), "up_to 32, cannot have"),
        (_entries(entry(BLOCK_M=48)), "cannot have {'BLOCK_M': 48"),
        (_entries(entry(BLOCK_M=8)), "cannot have {'BLOCK_M': 8"),
        (_entries(entry(num_warps=64)), "'num_warps': 64"),
        (_entries(entry(num_stages=0)), "'num_stages': 0"),
        (_entries(entry(num_stages=9)), "'num_stages': 9"),
        (_entries(entry(BLOCK_M=1024)), "'BLOCK_M': 1024"),
        (_entries(entry(BLOCK_N=2**40)), "'BLOCK_N': 1099511627776"),
        (_entries(entry(Launch("embed_forward", torch.bfloat16, 64), BLOCK_N=4096)), "'BLOCK_N': 4096"),
        (_entries(entry(BLOCK_N=True)), "'BLOCK_N': True"),
        (_entries(entry(Launch("feed_forward_forward", torch.bfloat16, 768), BLOCK_M=8)), "cannot have {'BLOCK_M': 8"),
        (_entries({"kernel": "feed_forward_fused"}), "damaged: KeyError: 'dtype'"),
        (_entries(product_entry(fused_from=0)), "products of 768 features with 'gelu' cannot be fused from 0 tokens"),
        (_entries(product_entry(fused_from="all")), "cannot be fused from 'all' tokens on"),
        (_entries(product_entry(fused_from=True)), "cannot be fused from True tokens on"),
        (_entries(product_entry(width="768")), "products of '768' features"),
        (_entries(product_entry(activation=["gelu"])), "with ['gelu'] cannot be"),
        # Half a row would be normalized as if it were the whole.
        (
            _entries(entry(Launch("embed_forward", torch.bfloat16, 100))),
            "'embed_forward' of width 100, up_to None, cannot have",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_ignored_with_one_warning(
    tuned_folder: Path,
    device: torch.device,
    name: str,
    caplog: pytest.LogCaptureFixture,
    how: Callable[[Any], Any],
    reason: str,
) -> None:
    path = tuned.write(name, [entry()], {})
    change(path, how)
    with caplog.at_level(logging.WARNING):
        assert tuned.measured(device) == {}
        assert tuned.measured(device) == {}
        tuned._tables.clear()  # as on a second device of the kind
        assert tuned.measured(device) == {}
    (record,) = caplog.records
    assert record.name == "fastbert"
    assert str(path) in record.message
    assert reason in record.message


def test_half_a_file_is_ignored(
    tuned_folder: Path, device: torch.device, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tuned.write(name, [entry()], {})
    path.write_bytes(path.read_bytes()[:40] + b"\xff")
    assert tuned.measured(device) == {}
    assert "it cannot be read" in caplog.text


def test_an_interrupted_write_leaves_what_was_there(
    tuned_folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tuned.write(name, [entry()], {})
    before = path.read_bytes()

    def interrupted(source: str, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned.write(name, [], {})
    assert path.read_bytes() == before
    assert list(tuned_folder.iterdir()) == [path]


def test_another_table_for_a_block(tuned_folder: Path, device: torch.device) -> None:
    with tuned.in_force(device, {LAUNCH: TILES}):
        assert tuned.measured(device) == {LAUNCH: TILES}
        with tuned.in_force(device, {}):
            assert tuned.measured(device) == {}
        assert tuned.measured(device) == {LAUNCH: TILES}
    assert tuned.measured(device) == {}


def test_every_kernel_named_is_one_that_attends_or_holds_rows_or_neither() -> None:
    kernels = [KERNELS[name] for name in TUNABLE]
    assert {x.name for x in kernels if not x.attends and not x.whole_rows} == {
        "bias_activation_forward",
        "bias_activation_backward",
        "feed_forward_forward",
        "feed_forward_backward",
    }
    assert not any(x.multiplies and x.whole_rows for x in kernels)


def test_the_catalogue_has_a_row_for_every_kernel() -> None:
    assert set(KERNELS) == set(COMPILED)
    for name, kernel in KERNELS.items():
        assert COMPILED[name].__name__.removeprefix("_") == name == kernel.name
        assert name in (kernel.op, f"{kernel.op}_{kernel.step}")
        assert kernel.backward == ("backward" in name or name == "column_sums")


def test_a_file_is_of_one_state_of_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(tuned.__file__).parent
    for file in source.glob("*.py"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(tuned, "__file__", str(tmp_path / "tuned.py"))
    tuned.identity.cache_clear()
    try:
        before = tuned.identity("some GPU")
        with (tmp_path / "numerics.py").open("a") as file:
            file.write("# another state\n")
        tuned.identity.cache_clear()
        assert tuned.identity("some GPU")["kernels"] != before["kernels"]
    finally:
        tuned.identity.cache_clear()

"""Other ways to run attention's forward pass: they compute what the shipped kernel does, with the same dropout mask;
and what the run on a GPU says of them."""

import json
from typing import Any

import pytest
import torch
from rich.console import Console
from uninterpreted import run_uninterpreted

from bench.gpu import candidates
from bench.gpu.attention_variants import CONTENDERS, SHIPPED, VARIANTS, attend, drawn_call
from bench.gpu.sections import Kept

TILES = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_computes_what_the_shipped_kernel_does(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, variant: str, dropout: bool
) -> None:
    call = drawn_call((1, 30, 64, 65, 130), 2, 16, torch.float16, dropout, device)
    want, want_stats = attend(SHIPPED, call, TILES)
    empty = torch.Tensor.new_empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:  # so that an element that no program writes shows
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    out, stats = attend(variant, call, TILES)
    torch.testing.assert_close(stats, want_stats, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, want, rtol=2e-3, atol=1e-3)


def variant(name: str, us: float | None, faster: bool = False, problem: str | None = None) -> dict[str, Any]:
    about = dict.fromkeys(("modelled_us", "registers", "spills", "resident"))
    times = None if us is None else [us, us - 1, us + 1]
    return {"call": "some", "variant": name, "us": times, "faster": faster, "problem": problem, **about}


def test_a_kernel_that_is_faster_or_wrong_is_what_to_do_next() -> None:
    kept = Kept({}, {"one": {"rows": [variant("shipped", 60.0), variant("persistent", 50.0, True)], "problem": None}})
    right, following = candidates.CANDIDATES.tell(Console(quiet=True), kept)
    assert right
    assert following.startswith("from attention_variants.py to attention_forward")
    assert following.endswith(": persistent (some, 1.20x)")
    kept.steps["one"]["rows"] = [variant("shipped", 60.0), variant("persistent", None, problem="spills")]
    _, following = candidates.CANDIDATES.tell(Console(quiet=True), kept)
    assert following == "mend, or delete, in attention_variants.py: persistent (some: spills)"


def test_a_kernel_whose_results_are_not_the_shipped_ones_is_not_timed() -> None:
    def fails() -> Any:
        raise ValueError("no such thing")

    want = torch.linspace(-1, 1, 12).bfloat16(), torch.linspace(-8, 8, 12)
    assert candidates._difference(lambda: want, want) is None
    assert candidates._difference(lambda: (want[0] * 1.01, want[1]), want) is None
    far = candidates._difference(lambda: (want[0] * 1.03, want[1]), want)
    assert far is not None
    assert far.startswith("not the shipped kernel's results: 3.1e-02, may be 1.6e-02")
    assert candidates._difference(lambda: (want[0], want[1] * 1.001), want) is not None
    assert candidates._difference(lambda: (want[0] * float("nan"), want[1]), want) is not None
    assert candidates._difference(fails, want) == "ValueError: no such thing"


@pytest.mark.slow
def test_no_variant_spills() -> None:
    code = (
        "import json\nfrom bench.gpu.candidates import VARIED\nfrom bench.gpu.modelled import modelled_variants\n"
        "for launch in VARIED:\n  for target in ('sm_80', 'sm_90', 'sm_100'):\n"
        "    for row in modelled_variants(launch, target): print(json.dumps(row | {'target': target}))"
    )
    rows = [json.loads(line) for line in run_uninterpreted("-c", code).splitlines()]
    assert len(rows) == len(candidates.VARIED) * 3 * 2 * len(CONTENDERS)
    for row in rows:
        assert row["problem"] is None, row
        assert row["modelled_us"] > 0
        assert row["resident"] >= 1

"""What a GPU would not forgive is noticed in the real kernels: one fault is planted at a time."""

import json

import pytest

from tests.helpers.uninterpreted import run_uninterpreted

KINDS = {
    "barrier removed",
    "wait removed",
    "one more group in flight",
    "commit removed",
    "transposition lost",
    "zeros not filled in",
    "address shifted",
    "predicate lost",
}


@pytest.mark.slow
def test_every_fault_is_noticed_or_harmless() -> None:
    shown = run_uninterpreted("-m", "tests.executor.mutants")
    print(shown[shown.index("kind ") :])
    planted = [json.loads(line) for line in shown.splitlines() if line.startswith("[")]
    assert {kind for _, kind, *_ in planted} == KINDS
    # Nothing but a reason makes up for a fault that is not noticed.
    assert [fault for *fault, noticed, reason in planted if not noticed and not reason] == []
    assert sum(bool(noticed) for *_, noticed, _ in planted) > 0.8 * len(planted)

"""What a layer keeps for its backward pass."""

import json

from uninterpreted import run_uninterpreted

_COUNT = """
import json, fastbert, transformers
from bench.kept import kept_vectors
counts = [kept_vectors(fastbert, "eager", autocast, 32) for autocast in (False, True)]
print(json.dumps([*counts, kept_vectors(transformers, "sdpa", False, 32)]))
"""


def test_a_layer_keeps_eleven_vectors_a_token() -> None:
    half, autocast, sdpa = json.loads(run_uninterpreted("-c", _COUNT))
    # The input, query, key, value, the context, two norms and four of the pre-activation; and numbers a row or head.
    statistics = (2 * 12 + 2) * 4 / (2 * 768)
    assert half == autocast == 11 + statistics
    assert 16 < sdpa < 16.1

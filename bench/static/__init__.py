"""The static kernel report: what the kernels compile to on seven targets, and the least time they can take.

Needs no GPU: `python -m bench.static`, or `make bench-static`.
"""

from fastbert_kernels.backend import require_triton

require_triton("bench.static")

"""The static kernel report: what the kernels compile to on four targets, and the least time they can take.

Needs no GPU: `python -m bench.static`, or `make bench-static`.
"""

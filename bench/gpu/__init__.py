"""The GPU run, whole in one command: `python -m bench.gpu --out DIR`.

Sections come in the order that matters when time is short: facts and ceilings, every op's results, `compute-sanitizer`,
a real checkpoint, kernels against their floors, other tiles beside what the model of `bench.static` said of them and
other kernels of attention beside the shipped one, models against their peers, `fastbert tune`, compiled peers of the
kernels, and the test suite. Each has a share of the time, says what it left out and what to do next, and keeps each
step on disk as it is done: whatever ends the run, the same command goes on from there.

Not yet run on a GPU: its tests run every section on stand-ins for one.
"""

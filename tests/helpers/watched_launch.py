"""What Triton's own launch sees, set after a kernel's launch is known here, on a GPU that is not there.

Prints as JSON whether each was seen, and whether launches are looked up here again when nothing is set any more. Run by
`test_launched.py` in a process whose Triton is not the interpreter.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton

from bench.stand_in import as_on_a_gpu
from fastbert_kernels import bias_activation
from fastbert_kernels.bias_activation import _bias_activation_forward

KERNEL: Any = _bias_activation_forward
runtime, compilation = triton.knobs.runtime, triton.knobs.compilation


def launch(dtype: torch.dtype = torch.bfloat16) -> None:
    bias_activation(torch.zeros(4, 128, dtype=dtype), None)


def compiled() -> int:
    return sum(len(caches[0]) for caches in KERNEL.device_caches.values())


@contextlib.contextmanager
def added(hooks: Any) -> Iterator[list[Any]]:
    """A hook in a chain of Triton's, and what it was called with."""
    calls: list[Any] = []
    hooks.add(calls.append)
    yield calls
    hooks.remove(calls.append)


def pre_run_hook() -> bool:
    calls: list[Any] = []
    KERNEL.add_pre_run_hook(lambda *args, **kwargs: calls.append(kwargs))
    launch()
    KERNEL.pre_run_hooks.clear()
    return len(calls) == 1


def launch_hooks() -> bool:
    with added(runtime.launch_enter_hook) as entered, added(runtime.launch_exit_hook) as left:
        launch()
    return [x.get()["name"] for x in entered + left] == 2 * ["_bias_activation_forward"]


def compiles_anew(owner: Any, name: str, value: Any, dtype: torch.dtype = torch.bfloat16) -> Callable[[], bool]:
    """Whether a kernel is compiled apart for a value, and what was compiled before is launched after it."""

    def seen() -> bool:
        launch(dtype)
        before = compiled()
        with mock.patch.object(owner, name, value):
            launch(dtype)
        anew = compiled() - before
        launch(dtype)
        return anew == 1 and compiled() == before + 1

    return seen


def stages_hook() -> bool:
    calls: list[Any] = []

    def hook(*given: Any) -> tuple[str, str]:
        calls.append(given)
        return "own stages", "own stages"

    with mock.patch.object(runtime, "add_stages_inspection_hook", hook):
        launch()
    return bool(calls)


def compile_hooks() -> bool:
    """Those are of compilation: they see a kernel that is new, and do not see one that is known."""
    before, after = mock.Mock(return_value=None), mock.Mock(return_value=None)
    with mock.patch.multiple(runtime, jit_cache_hook=before, jit_post_compile_hook=after):
        launch()
        launch(torch.float32)
    return before.call_count == after.call_count == 1


def emptied_cache() -> bool:
    """A kernel whose cache was emptied, as for `always_compile` or an override, is compiled anew."""
    KERNEL.device_caches.clear()
    with mock.patch.object(compilation, "always_compile", True), mock.patch.object(compilation, "override", True):
        launch()
    return compiled() == 1


SEEN: dict[str, Callable[[], bool]] = {
    "pre-run hook": pre_run_hook,
    "launch hooks": launch_hooks,
    "debug": compiles_anew(runtime, "debug", True),
    "the kernel's debug": compiles_anew(KERNEL, "debug", True, torch.float16),
    "instrumentation": compiles_anew(compilation, "instrumentation_mode", "fpsan"),
    "stages hook": stages_hook,
    "compile hooks": compile_hooks,
    "emptied cache": emptied_cache,
}


def main() -> None:
    found: dict[str, bool] = {}
    with as_on_a_gpu():
        launch()
        for name, seen in SEEN.items():
            found[name] = seen()
            launch()
        with mock.patch.object(KERNEL, "run", side_effect=AssertionError):
            launch()
    print(json.dumps(found))


if __name__ == "__main__":
    main()

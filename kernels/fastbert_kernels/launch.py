"""How ops are registered, and how their kernels are launched."""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import reference
from .backend import INTERPRETED, is_watched
from .gradients import refuse_batched, second_derivative_error
from .language import MISSING, triton

#: Functions of one kernel, whose arguments are put in: what a launch is looked up by, and the launch.
_LAUNCH = """
def key({names}, {options}):
    return {device}, {parts}, {options}

def is_watched():
    return {watched}

def launch(grid, {names}, {options}):
    device = {device}
    found = find((device, {parts}, {options}))
    here = found is not None and device.index == cuda.current_device()
    if not here or caches.get(found.device) is not found.cache or {watched}:
        look_up(grid, {arguments})
    else:
        found.compiled[grid]({names})
"""

#: What Triton is told besides a kernel's arguments: of every kernel the tiles say it.
_OPTIONS = ("num_warps", "num_stages")

#: What Triton looks at in each launch, beside what it compiles for: where one is set, Triton's own launch sees to it.
#: Hooks of launches, its compiled kernels see to themselves; all else is looked at when a kernel is compiled or loaded,
#: but for the globals that a kernel reads, which are constants of this package.
_WATCHED = {
    "knobs.runtime": ("debug", "add_stages_inspection_hook"),
    "knobs.compilation": ("instrumentation_mode",),
    "kernel": ("debug", "pre_run_hooks"),
}


class _Found(NamedTuple):
    """What is launched for some arguments, and where Triton keeps it: for which of its devices, and in what cache."""

    compiled: Any
    device: Any
    cache: Any


class _Launcher:
    """A kernel to be launched on its tensors' device, with the compile options whose defaults Triton may change.

    What Triton compiled for such arguments is looked up here: its own lookup takes longer than all else in a launch. As
    Triton does for that, this writes a function for the kernel, which knows its arguments by name.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.found: dict[tuple[Any, ...], _Found] = {}
        names = [p.name for p in kernel.params]
        self.functions: dict[str, Any] = {
            "find": self.found.get,
            "look_up": self.look_up,
            "cuda": torch.cuda,
            "caches": kernel.device_caches,
            "knobs": triton.knobs,
            "kernel": kernel,
        }
        source = _LAUNCH.format(
            names=", ".join(names),
            device=f"{names[0]}.device",
            parts=", ".join(map(_varies, kernel.params)),
            options=", ".join(_OPTIONS),
            arguments="{" + ", ".join(f"{name!r}: {name}" for name in (*names, *_OPTIONS)) + "}",
            watched=" or ".join(_watched(kernel)),
        )
        exec(source, self.functions)
        self.launch: Callable[..., Any] = self.functions["launch"]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return functools.partial(self.launch, (*grid, 1, 1)[:3])

    def look_up(self, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        """Launch by Triton itself, and keep what it launches, unless it was compiled for what is looked at."""
        device = arguments[self.kernel.arg_names[0]].device
        guard = contextlib.nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)
        with guard:
            compiled = self.kernel.run(grid=grid, warmup=False, enable_fp_fusion=True, **arguments)
            tritons = triton.runtime.driver.active.get_current_device()
        # Not on HIP, for which Triton compiles by the sizes of tensors, too.
        if type(compiled) is triton.compiler.CompiledKernel and not torch.version.hip:
            if not self.functions["is_watched"]():
                found = _Found(compiled, tritons, self.kernel.device_caches[tritons])
                self.found[self.functions["key"](**arguments)] = found


def _watched(kernel: Any) -> list[str]:
    """Expressions of what makes a launch Triton's own; not every version has every name."""
    known = {"knobs.runtime": triton.knobs.runtime, "knobs.compilation": triton.knobs.compilation, "kernel": kernel}
    return [f"{x}.{name}" for x, names in _WATCHED.items() for name in names if hasattr(known[x], name)]


def _varies(parameter: Any) -> str:
    """An expression of what Triton compiles a kernel for in an argument: of a tensor its dtype and whether it starts at
    a multiple of 16 bytes; of an integer whether it is wider than 32 bits, and if told to, 1 or a multiple of 16."""
    name = parameter.name
    if parameter.is_constexpr:
        return name
    if name.endswith("_ptr"):
        return f"{name}.dtype, {name}.data_ptr() & 15"
    of_number = f"{name} >> 31" if parameter.do_not_specialize else f"({name} == 1, {name} & 15 == 0, {name} >> 31)"
    return f"{of_number} if type({name}) is int else type({name})"


#: By the kernel's id: its hash is that of its source. No kernel is ever freed.
_launchers: dict[int, _Launcher] = {}


def wrap_triton(kernel: Any) -> Any:
    """Make a kernel visible to `torch.compile`, which has its own compile options; else ready to launch."""
    if INTERPRETED:
        return kernel
    wrapped = torch.library.wrap_triton(kernel) if is_watched() else kernel
    if wrapped is not kernel:
        return wrapped
    launcher = _launchers.get(id(kernel))
    if launcher is None:
        launcher = _launchers[id(kernel)] = _Launcher(kernel)
    return launcher


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own, which device code may call too, costs a few microseconds here."""
    return (a + b - 1) // b


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a device has, for grids that fill it once; the interpreter has two."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def row_multiple(*widths: int) -> int:
    """What a kernel is told that all of its rows' widths are multiples of: a power of two up to 16."""
    return math.gcd(16, *widths)


def dropout_arguments(x: torch.Tensor, dropout_p: float, seed: torch.Tensor | None, stream: int) -> dict[str, Any]:
    """The arguments by which every kernel draws its dropout. An absent seed is stood in for by x, never read."""
    return {
        "seed_ptr": x if seed is None else seed,
        "site": stream,
        "keep_threshold": reference.dropout_threshold(dropout_p),
        "keep_scale": 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0,
        "HAS_DROPOUT": dropout_p > 0.0,
    }


class Op:
    """The torch op `fastbert::name`, called past the dispatcher where nobody watches: its Python costs more there than
    a launch.

    Compiled kernels are a `triton_op`, which `torch.compile` sees into; interpreted ones an opaque `custom_op`.
    """

    def __init__(self, name: str, fn: Callable[..., Any], fake: Callable[..., Any]) -> None:
        opaque = INTERPRETED or MISSING is not None
        register: Any = torch.library.custom_op if opaque else torch.library.triton_op
        self.name = name
        self.fn = self.recorded = fn
        self.registered: Any = register(f"fastbert::{name}", fn, mutates_args=())
        self.registered.register_fake(fake)

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """As `torch.library.register_autograd`, with the same arguments."""
        self.registered.register_autograd(backward, setup_context=setup_context)
        fn = self.fn

        def forward(ctx: Any, *args: Any) -> Any:
            output = fn(*args)
            setup_context(ctx, args, output)
            return output

        # With a `setup_context` of its own an autograd.Function inspects its signature in each call.
        def one_at_a_time(ctx: Any, *grads: Any) -> Any:
            refuse_batched(self.name, grads)
            return backward(ctx, *grads)

        methods = {"forward": staticmethod(forward), "backward": staticmethod(one_at_a_time)}
        # By the class autograd names the step: add_layer_norm's is AddLayerNormBackward.
        class_name = self.name.title().replace("_", "")
        function = type(class_name, (torch.autograd.Function,), methods)
        # Its `apply` first looks whether functorch, which `is_watched` rules out, has wrapped an argument.
        self.recorded = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def forbid_double_backward(self, name: str, *instead: str) -> None:
        """Make differentiating a backward op an error that says what to do instead, not a silently missing gradient."""

        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            raise second_derivative_error(name, *instead)

        self.register_autograd(backward, setup_context=lambda ctx, inputs, output: None)

    def __call__(self, *args: Any) -> Any:
        if is_watched() or type(args[0]) is not torch.Tensor:
            return self.registered(*args)
        return self.recorded(*args) if torch.is_grad_enabled() else self.fn(*args)


def register_op(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Op]:
    """Register a function that launches kernels as the torch op `fastbert::name`.

    Args:
        name: the op's name in the namespace `torch.ops.fastbert`.
        fake: the op on fake tensors: same signature, outputs of the right shape, dtype and device.
    """
    return lambda fn: Op(name, fn, fake)

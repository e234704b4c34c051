"""Which life of an op runs, and how its kernels are registered and launched.

An op lives three times: in plain PyTorch (`reference.py`), as a Triton kernel under Triton's interpreter, and as the
same kernel compiled for a GPU. The tensor's device decides, here and nowhere else:

| device | life |
|---|---|
| GPU | the compiled kernel |
| CPU | plain PyTorch; whole layers by oneDNN |
| CPU, `FASTBERT_BACKEND=triton` with `TRITON_INTERPRET=1` | the kernel, interpreted |

`FASTBERT_BACKEND=torch` runs plain PyTorch everywhere.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import torch
import triton
from packaging.version import Version
from torch._C import _are_functorch_transforms_active, _is_tracing, _len_torch_dispatch_stack
from triton.compiler import CompiledKernel

#: True when Triton kernels run in Triton's interpreter. Triton reads the variable when a kernel is defined, so it must
#: be set before the first import.
INTERPRETED: bool = triton.knobs.runtime.interpret


def check_interpreter(triton_version: str, numpy_version: str) -> None:
    """Raise ImportError for a Triton whose interpreter fails in every loop with that NumPy."""
    if Version(triton_version) < Version("3.7") and Version(numpy_version) >= Version("2.4"):
        raise ImportError(
            f"the interpreter of Triton {triton_version} does not work with NumPy {numpy_version}: install triton>=3.7 "
            "or numpy<2.4, or unset TRITON_INTERPRET"
        )


if INTERPRETED:
    check_interpreter(triton.__version__, version("numpy"))

#: Dtypes the kernels have. Everything else is an error on the Triton path.
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_BACKENDS = ("auto", "torch", "triton")


def _checked(name: str) -> str:
    if name not in _BACKENDS:
        raise ValueError(f"unknown fastbert backend {name!r}: FASTBERT_BACKEND takes one of {', '.join(_BACKENDS)}")
    return name


_backend: str = _checked(os.environ.get("FASTBERT_BACKEND", "auto"))


def get_backend() -> str:
    """The backend in force: `"auto"`, `"torch"` or `"triton"`."""
    return _backend


def set_backend(name: str) -> None:
    """Override the choice of backend for this process.

    Args:
        name: `"auto"` (by device), `"torch"` or `"triton"`.

    Raises:
        ValueError: for any other name.
    """
    global _backend
    _backend = _checked(name)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run a block under another backend, e.g. `with backend("triton"): ...`."""
    before = get_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether ops on `tensor` run as Triton kernels.

    Raises:
        RuntimeError: when the Triton backend is asked for on a CPU tensor without the interpreter.
        TypeError: when the Triton backend is in force and no kernel has the tensor's dtype.
    """
    if _backend == "torch" or (_backend == "auto" and not tensor.is_cuda):
        return False
    if not tensor.is_cuda and not INTERPRETED:
        raise RuntimeError(
            f"FASTBERT_BACKEND=triton cannot run on {tensor.device} tensors without Triton's interpreter: set "
            "TRITON_INTERPRET=1 before importing fastbert, move the model to a GPU, or use FASTBERT_BACKEND=torch"
        )
    if tensor.dtype not in KERNEL_DTYPES:
        raise TypeError(
            f"no fastbert kernel has dtype {tensor.dtype}: cast the model to one of "
            f"{', '.join(map(str, KERNEL_DTYPES))}, or run plain PyTorch with FASTBERT_BACKEND=torch"
        )
    return True


def uses_cpu_layers(tensor: torch.Tensor) -> bool:
    """Whether layers on `tensor`, on which no kernel runs, are those of `cpu_layer.py`, and not the definition."""
    return (
        _backend == "auto"
        and tensor.is_cpu
        and tensor.dtype in KERNEL_DTYPES
        and not is_watched()
        and not torch.is_autocast_enabled("cpu")  # which knows the products of the definition, not oneDNN's
        and torch.autograd.forward_ad._current_level < 0
    )


def check_mode() -> bool:
    """Whether `FASTBERT_CHECK=1` asks for the checks that cost a device synchronisation (ids in range, lengths)."""
    return os.environ.get("FASTBERT_CHECK", "0") == "1"


def check_same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError naming each tensor's device unless all given tensors share one."""
    first = None
    for tensor in tensors.values():
        if tensor is None:
            continue
        if first is None:
            first = tensor.device
        elif tensor.device != first:
            break
    else:
        return
    listing = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items() if tensor is not None)
    raise ValueError(f"{op} needs every tensor on one device, got {listing}: move them with .to(device)")


#: Functions of one kernel, whose arguments are put in: what a launch is looked up by, and the launch.
_LAUNCH = """
def key({names}, **options):
    return {device}, {parts}, *options.values()

def launch(grid, {names}, **options):
    compiled = find(({device}, {parts}, *options.values()))
    if compiled is None or {device}.index != current_device():
        look_up(grid, {arguments} | options)
    else:
        compiled[grid]({names})
"""


class _Launcher:
    """A kernel to be launched on its tensors' device, with the compile options whose defaults Triton may change.

    What Triton compiled for such arguments is looked up here: its own lookup takes longer than all else in a launch. As
    Triton does for that, this writes a function for the kernel, which knows its arguments by name.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[tuple[Any, ...], CompiledKernel] = {}
        names = [p.name for p in kernel.params]
        self.functions: dict[str, Any] = {
            "find": self.compiled.get,
            "look_up": self.look_up,
            "current_device": lambda: torch.cuda.current_device(),
        }
        source = _LAUNCH.format(
            names=", ".join(names),
            device=f"{names[0]}.device",
            parts=", ".join(map(_varies, kernel.params)),
            arguments="{" + ", ".join(f"{name!r}: {name}" for name in names) + "}",
        )
        exec(source, self.functions)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return functools.partial(self.functions["launch"], (*grid, 1, 1)[:3])

    def look_up(self, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        """Launch by Triton itself, and keep what it launches."""
        device = arguments[self.kernel.arg_names[0]].device
        guard = contextlib.nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)
        with guard:
            compiled = self.kernel.run(grid=grid, warmup=False, enable_fp_fusion=True, **arguments)
        # Not on HIP, for which Triton compiles by the sizes of tensors, too.
        if type(compiled) is CompiledKernel and not torch.version.hip:
            self.compiled[self.functions["key"](**arguments)] = compiled


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


def is_traced() -> bool:
    """Whether a compiler, a tracer or a functorch transform is to see what runs, and not only torch's dispatcher."""
    return torch.compiler.is_compiling() or _are_functorch_transforms_active() or _is_tracing()


def is_watched() -> bool:
    """Whether any of these, or a dispatch mode, is to see ops, and not what they are made of."""
    return is_traced() or _len_torch_dispatch_stack() > 0


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


class Op:
    """The torch op `fastbert::name`, called past the dispatcher where nobody watches: its Python costs more there than
    a launch.

    Compiled kernels are a `triton_op`, which `torch.compile` sees into; interpreted ones an opaque `custom_op`.
    """

    def __init__(self, name: str, fn: Callable[..., Any], fake: Callable[..., Any]) -> None:
        register: Any = torch.library.custom_op if INTERPRETED else torch.library.triton_op
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
        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        function = type(fn.__name__, (torch.autograd.Function,), methods)
        # Its `apply` first looks whether functorch, which `is_watched` rules out, has wrapped an argument.
        self.recorded = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def __call__(self, *args: Any) -> Any:
        if is_watched() or type(args[0]) is not torch.Tensor:
            return self.registered(*args)
        return self.recorded(*args) if torch.is_grad_enabled() else self.fn(*args)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own, which device code may call too, costs a few microseconds here."""
    return (a + b - 1) // b


def register_op(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Op]:
    """Register a function that launches kernels as the torch op `fastbert::name`.

    Args:
        name: the op's name in the namespace `torch.ops.fastbert`.
        fake: the op on fake tensors: same signature, outputs of the right shape, dtype and device.
    """
    return lambda fn: Op(name, fn, fake)


def second_derivative_error(
    name: str, instead: str = "run plain PyTorch with FASTBERT_BACKEND=torch, or fastbert.unfuse(model)"
) -> NotImplementedError:
    return NotImplementedError(
        f"fastbert's {name} kernel has no second derivative: for gradients of gradients {instead}"
    )


def forbid_double_backward(op: Op, name: str, *instead: str) -> None:
    """Make differentiating a backward op an error that says what to do instead, not a silently missing gradient."""

    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise second_derivative_error(name, *instead)

    op.register_autograd(backward, setup_context=lambda ctx, inputs, output: None)


@functools.cache
def arch(device: torch.device) -> str:
    """The row of the tile tables for a device: `"sm_80"`, `"sm_90"`, `"sm_100"`, `"gfx942"` or `"interpreter"`.

    GPUs without a row of their own take that of the nearest smaller one: tiles that fit there fit here.
    """
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    if major in (10, 11):
        return "sm_100"
    return "sm_90" if major == 9 else "sm_80"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a device has, for grids that fill it once; the interpreter has two."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2

"""Triton, or where there is none, as on macOS and Windows, a stand-in: kernels are then defined, and never run.

Every module that defines a kernel imports `triton` and `tl` from here.
"""

from typing import Any

__all__ = ["MISSING", "tl", "triton"]


class _StandIn:
    """Has every attribute, and can be called, with itself as the answer: enough for decorators and annotations."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self


#: Why Triton cannot be imported; None where it can.
MISSING: str | None = None

try:
    import triton
    import triton.language as tl
except ImportError as error:
    MISSING = str(error)
    triton = tl = _StandIn()

"""Triton's interpreter without what it does over and over: two fifths of the time of a model's interpreted kernels.

For each launch, and for each call of one device function by another, it looks through all names of `triton.language` to
put its own functions in the place of the language's. Within a launch they are there already.
"""

import inspect
from types import FunctionType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def _is_patched(language: Any) -> bool:
    return language.static_print is print


def speed_up() -> None:
    """Leave out, in this process, what is done already."""
    patch, patch_attribute = interpreter._patch_lang, interpreter._patch_attr
    #: By the address of a module's names: the names themselves, which keeps them, and the languages among them.
    languages: dict[int, tuple[dict[str, Any], list[Any]]] = {}
    builtins: dict[Any, list[str]] = {}

    def patch_language(function: FunctionType) -> Any:
        names = function.__globals__
        if id(names) not in languages:
            values = list(names.values())
            languages[id(names)] = names, [x for x in (tl, tl.core) if any(value is x for value in values)]
        _, found = languages[id(names)]
        # Without a language Triton's own function has the error to raise.
        return interpreter._LangPatchScope() if found and all(map(_is_patched, found)) else patch(function)

    def patch_builtins(package: Any, builder: Any, scope: Any) -> None:
        if package not in builtins:
            builtins[package] = [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
        for name in builtins[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):
                patch_attribute(package, name, member, builder, scope)

    interpreter._patch_lang, interpreter._patch_builtin = patch_language, patch_builtins

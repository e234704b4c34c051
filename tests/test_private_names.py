"""CONTRIBUTING lists every name that fastbert uses and that torch, transformers or Triton keep to themselves."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
TREES = [
    ast.parse(path.read_text(encoding="utf-8"))
    for folder in ("fastbert", "kernels/fastbert_kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


#: Private names of fastbert's that it writes as text or puts on what is not its own; and two that are public.
OURS = {"_ptr", "_row_stride", "_zero_types", "_unfused_attn_implementation", "_fields", "_replace"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own() -> set[str]:
    """Private names that the packages give themselves."""
    nodes = [node for tree in TREES for node in ast.walk(tree)]
    found = {x.name for x in nodes if isinstance(x, ast.FunctionDef | ast.ClassDef)}
    found |= {x.id for x in nodes if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
    return found | {
        x.attr
        for x in nodes
        if isinstance(x, ast.Attribute)
        and isinstance(x.ctx, ast.Store)
        and isinstance(x.value, ast.Name)
        and x.value.id == "self"
    }


def used() -> Iterator[str]:
    for tree in TREES:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                yield node.attr
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield from (node.module or "").split(".")
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"_\w+", node.value):
                yield node.value  # what is read by name, as of a module's state


def test_every_private_name_in_use_is_listed_with_its_reason_and_no_other() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("## Private names of others", 1)[1].split("\n## ", 1)[0]
    listed = set(re.findall(r"`(_\w+)`", section))
    found = {name for name in used() if is_private(name)} - OURS
    assert found - own() <= listed
    assert listed <= found

"""Which names of config.json a model file of mlx-lm reads, and which numbers it writes out."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from functools import cache

import mlx.nn as nn

Read = frozenset[str | float]


def names_read(model: nn.Module) -> Read:
    """The attributes and keys that the model files of `model` read anywhere but in a check, and the
    numbers that are written out in them."""
    files = {
        base.__module__
        for module in model.modules()
        for base in type(module).__mro__
        if base.__module__.startswith("mlx_lm.models.")
        and hasattr(sys.modules[base.__module__], "ModelArgs")
    }
    return frozenset().union(*(_names(file) for file in files))


@cache
def _names(module: str) -> Read:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return frozenset(_read(tree))


def _read(node: ast.AST) -> Iterator[str | float]:
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        yield node.attr
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        yield node.func.id  # swiglu(gate, up)
    if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
        return  # head_dim ** -0.5
    if (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.FloorDiv)
        and isinstance(node.right, ast.Constant)
        and isinstance(node.right.value, int)
    ):
        yield 1 / node.right.value  # head_dim // 2
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float)):
        yield node.value
    if isinstance(node, ast.ClassDef) and any(
        "dataclass" in ast.dump(d) for d in node.decorator_list
    ):
        # The arguments themselves often check a value that nobody uses: there it must be passed on.
        for part in ast.walk(node):
            if isinstance(part, (ast.Assign, ast.Return)) and part.value is not None:
                yield from _read(part.value)
        return
    for child in ast.iter_child_nodes(node):
        yield from _read(child)

"""Calls in Python syntax: `f(a=1)`, `[f(a=1), g(b=2)]`, `print(f(a=1))`, `x = f(a=1)`.

Values are read from the syntax tree and never evaluated: a bare name is its text, a nested call
without keywords is its source. Only arithmetic on numbers is folded.
"""

from __future__ import annotations

import ast
import operator
from typing import Any

from .calls import Call, Unreadable

_ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def python_calls(text: str) -> list[Call]:
    """All calls of `text`, which must hold nothing else."""
    try:
        statements = ast.parse(text.strip()).body
    except (SyntaxError, ValueError):
        raise Unreadable("the answer is neither JSON nor a call in Python syntax") from None
    return [call for statement in statements for call in _statement(statement)]


def _statement(statement: ast.stmt) -> list[Call]:
    if isinstance(statement, (ast.Expr, ast.Assign)):
        value = statement.value
        elements = value.elts if isinstance(value, (ast.List, ast.Tuple)) else [value]
        return [call for element in elements for call in _element(element)]
    raise Unreadable("the answer has Python statements besides its calls")


def _element(node: ast.expr) -> list[Call]:
    if not isinstance(node, ast.Call):
        raise Unreadable("the answer has Python values besides its calls")
    if isinstance(node.func, ast.Name) and node.func.id == "print" and not node.keywords:
        # Gemma prints what it calls; print(result) of an assigned call calls nothing more.
        return [call for a in node.args if not isinstance(a, ast.Name) for call in _element(a)]
    return [_call(node)]


def _call(node: ast.Call) -> Call:
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise Unreadable("the call has arguments without names")
    arguments = {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}
    return Call(_dotted(node.func), arguments)


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    raise Unreadable("what is called has no plain name")


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        return "..." if node.value is ... else node.value
    if isinstance(node, ast.List):
        return [_value(element) for element in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_value(element) for element in node.elts)
    if isinstance(node, ast.Dict):
        return _dictionary(node)
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Subscript) or (isinstance(node, ast.Call) and not node.keywords):
        return ast.unparse(node)
    if isinstance(node, ast.Call):
        call = _call(node)
        return {call.name: call.arguments}
    return _number(node)


def _dictionary(node: ast.Dict) -> dict[Any, Any]:
    result = {}
    for key, value in zip(node.keys, node.values, strict=True):
        if not isinstance(key, ast.Constant):
            raise Unreadable("a dictionary has keys that are not constants")
        result[key.value] = _value(value)
    return result


def _number(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _number(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        try:
            result = _ARITHMETIC[type(node.op)](_number(node.left), _number(node.right))
            return result if isinstance(result, float) else int(str(result))
        except (ArithmeticError, ValueError):  # such as 1 / 0, or more digits than Python prints
            raise Unreadable("arithmetic on numbers has no result") from None
    raise Unreadable("a value is Python code that only running it could give")

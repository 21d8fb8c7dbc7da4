"""Rewrites of qualified parameters and of vectors constructed from parts."""

from __future__ import annotations

import re

from .tokens import SyntaxProblem, Tokens

_SCALARS = [
    "bool",
    "char",
    "uchar",
    "short",
    "ushort",
    "int",
    "uint",
    "long",
    "ulong",
    "float",
    "half",
    "bfloat",
]
_VECTORS = {f"{scalar}{n}" for scalar in _SCALARS for n in (2, 3, 4)}
_DECLARES = re.compile(rf"^\W*(const|size_t|{'|'.join(_SCALARS)})\d?\b(?!\s*\()")


def parameters_and_constructions(tokens: Tokens) -> set[str]:
    """Rewrite them. Returns "file:line" of each `const thread T&` that lost its `thread`."""
    dropped: set[str] = set()
    classes = {
        tokens.text(tokens.next(at))
        for at, token in enumerate(tokens)
        if token.text in ("struct", "class")
    }
    depth = 0  # of round brackets since the last statement or block began
    for at, token in enumerate(tokens):
        text = token.text
        if token.kind == "word":
            if text == "constant" and depth:
                _imply_const(tokens, at)
            elif text == "vec":
                _construct_vec(tokens, at)
            elif text == "__private":
                _drop_thread(tokens, at, classes, depth, dropped)
            elif text in _VECTORS and depth == 0:
                _construct_variable(tokens, at)
        elif text == "(":
            depth += 1
        elif text == ")":
            depth -= 1
        elif text in ("{", "}", ";"):
            depth = 0
    return dropped


def _imply_const(tokens: Tokens, at: int) -> None:
    """A `constant T&` parameter is const in Metal; OpenCL C++ wants to read it."""
    if tokens.text(tokens.previous(at)) == "const":
        return
    if tokens.text(tokens.next(at)) not in ("const", "{", ":", ";", ")", ","):
        tokens[at].text = "const __constant"


def _construct_vec(tokens: Tokens, at: int) -> None:
    """`vec<T, N>(...)`: see include/msl/convert.h."""
    opening = tokens.next(at)
    if tokens.text(opening) != "<" or tokens.text(tokens.previous(at)) == "operator":
        return
    end = tokens.close(opening)
    if tokens.text(tokens.next(end)) == "(":
        if tokens.text(tokens.previous(at)) == "::":  # metal::vec
            tokens[at].text = "_make<::metal::vec"
        else:
            tokens[at].text = "::metal::_make<::metal::vec"
        tokens[end].text = ">>"


def _construct_variable(tokens: Tokens, at: int) -> None:
    """`int2 v(a, b);` is a construction too, unless it declares a function."""
    name = tokens.next(at)
    opening = tokens.next(name)
    if name >= len(tokens) or tokens[name].kind != "word" or tokens.text(opening) != "(":
        return
    end = tokens.close(opening)
    if tokens.text(tokens.next(end)) == ";" and tokens.next(opening) != end:
        if any(_DECLARES.match(part) for part in tokens.join(opening + 1, end).split(",")):
            return
        tokens[opening].text = f" = ::metal::_make<::{tokens[at].text}>("


def _drop_thread(tokens: Tokens, at: int, classes: set[str], depth: int, dropped: set[str]) -> None:
    """A temporary has no address space in OpenCL C++: neither constructors nor const references
    to one may be qualified `thread`."""
    before = tokens.previous(at)
    if tokens.text(before) == "const":
        before = tokens.previous(before)
    after = tokens.text(tokens.next(at))
    if tokens.text(before) == ")" and after in ("{", ":", ";", "noexcept", "="):
        if tokens.text(tokens.previous(_open_before(tokens, before))) in classes:
            tokens[at].text = ""
    elif depth and _is_const_reference(tokens, at):
        dropped.add(tokens.where(at))
        tokens[at].text = ""


def _open_before(tokens: Tokens, at: int) -> int:
    """Index of the ( that the ) at `at` closes."""
    depth = 0
    while at >= 0:
        depth += {")": 1, "(": -1}.get(tokens[at].text, 0)
        if depth == 0:
            return at
        at -= 1
    raise SyntaxProblem("unbalanced ')'")


def _is_const_reference(tokens: Tokens, at: int) -> bool:
    const = tokens.text(tokens.previous(at)) == "const"
    depth = 0
    for token in tokens[at:]:
        text = token.text
        depth += {"<": 1, ">": -1}.get(text, 0)
        if depth == 0 and text in (",", ")", "*", "&", ";", "("):
            return const and text == "&"
        const |= depth == 0 and text == "const"
    return False

"""Preprocessed Metal source to "C++ for OpenCL 2021": the few forms that clang cannot take as is.

Line markers and line breaks stay, so messages and debug information name the .metal line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .constructions import parameters_and_constructions
from .launcher import Parameter, parameters
from .tokens import INCLUDE, Token, Tokens

# Words of OpenCL C that Metal leaves to the author.
_OPENCL_WORDS = frozenset(
    [
        "global",
        "local",
        "private",
        "generic",
        "pipe",
        "read_only",
        "write_only",
        "read_write",
        "event_t",
        "queue_t",
        "clk_event_t",
        "reserve_id_t",
    ]
)


@dataclass
class Unit:
    """What a rewritten source defines."""

    text: str = ""
    kernels: dict[str, list[Parameter]] = field(default_factory=dict)
    templates: set[str] = field(default_factory=set)
    host_names: dict[str, str] = field(default_factory=dict)  # name: kernel expression
    constants: dict[str, tuple[int, str]] = field(default_factory=dict)  # name: (index, type)
    threadgroup_variables: list[str] = field(default_factory=list)
    stray: list[str] = field(default_factory=list)  # threadgroup variables outside kernels
    dropped_thread: set[str] = field(default_factory=set)  # file:line of `const thread T&`


def rewrite(preprocessed: str, libraries: Sequence[Path] = (INCLUDE,)) -> Unit:
    """Rewrite one source. Raises SyntaxProblem for a form it does not understand."""
    tokens, unit = Tokens.of(preprocessed, libraries), Unit()
    bodies = _kernels(tokens, unit)
    _words(tokens)
    _function_constants(tokens, unit)
    _threadgroup_variables(tokens, unit, bodies)
    unit.dropped_thread = parameters_and_constructions(tokens)
    unit.text = str(tokens)
    return unit


def _words(tokens: Tokens) -> None:
    for at, token in enumerate(tokens):
        if token.kind == "number" and re.fullmatch(r"[\d.eE+-]+bf", token.text):
            token.text = f"((__bf16){token.text[:-2]}f)"
        elif token.kind != "word":
            continue
        elif token.text in _OPENCL_WORDS:
            token.text += "_"
        elif token.text == "noexcept" and tokens.text(tokens.next(at)) == "{":
            token.text = ""


def _kernels(tokens: Tokens, unit: Unit) -> list[tuple[int, int]]:
    """Note kernels and host names; drop the `kernel` word. Returns the extents of the bodies."""
    bodies = []
    for at, token in enumerate(tokens):
        if token.text == "template" and tokens.text(tokens.next(at)) == "[[":
            _host_name(tokens, at, unit)
        elif token.text == "kernel" and token.kind == "word":
            in_brackets = tokens.text(tokens.previous(at)) in ("[[", ",")
            if (name := _kernel_name(tokens, at)) is not None:
                opening = tokens.next(name)
                closing = tokens.close(opening)
                unit.kernels[tokens[name].text] = parameters(tokens, opening, closing)
                if _is_template(tokens, at):
                    unit.templates.add(tokens[name].text)
                if tokens.text(body := tokens.next(closing)) == "{":
                    bodies.append((body, tokens.close(body)))
            if not in_brackets:
                token.text = ""
    return bodies


def _kernel_name(tokens: Tokens, at: int) -> int | None:
    """Index of the name in `kernel void name(`, if the word at `at` starts such a thing."""
    after = tokens.next(at)
    while tokens.text(after) in ("]]", ",", "[["):  # [[kernel]], [[kernel, max_total...(n)]]
        if tokens.text(after) == ",":
            after = tokens.close(_opening(tokens, at))
        elif tokens.text(after) == "[[":
            after = tokens.close(after)
        after = tokens.next(after)
    name = tokens.next(after)
    is_kernel = tokens.text(after) == "void" and tokens.text(tokens.next(name)) == "("
    return name if is_kernel else None


def _opening(tokens: Tokens, at: int) -> int:
    while tokens.text(at) != "[[":
        at -= 1
    return at


def _is_template(tokens: Tokens, at: int) -> bool:
    at = tokens.previous(at)
    while at >= 0 and tokens[at].text not in (";", "}", "{"):
        if tokens[at].text == "template":
            return True
        at = tokens.previous(at)
    return False


def _host_name(tokens: Tokens, at: int, unit: Unit) -> None:
    """`template [[host_name("n")]] [[kernel]] decltype(f<..>) f<..>;` names an instantiation."""
    bracket = tokens.next(at)
    if tokens.text(tokens.next(bracket)) != "host_name":
        return
    end = tokens.close(bracket)
    name = "".join(t.text[1:-1] for t in tokens[bracket:end] if t.kind == "string")
    start = end
    while tokens.text(start) not in ("decltype", "void"):
        start += 1
    if tokens.text(start) == "decltype":
        opening = tokens.next(start)
        expression = tokens.join(opening + 1, tokens.close(opening))
    else:
        opening = start + 1
        while tokens.text(opening) != "(":
            opening = (tokens.close(opening) if tokens.text(opening) == "<" else opening) + 1
        expression = tokens.join(start + 1, opening)
    unit.host_names[name] = expression
    while tokens.text(end) != ";":
        end += 1
    tokens.replace(at, end + 1, "")


def _function_constants(tokens: Tokens, unit: Unit) -> None:
    """`constant T x [[function_constant(n)]];` becomes an extern that the test sets."""
    for at, token in enumerate(tokens):
        if token.text != "function_constant" or tokens.text(tokens.previous(at)) != "[[":
            continue
        bracket = tokens.previous(at)
        start = bracket
        while tokens.text(start) != "constant":
            start = tokens.previous(start)
        words = [
            t.text
            for t in tokens[start + 1 : bracket]
            if not t.blank and t.text not in ("static", "constexpr", "const")
        ]
        end = tokens.close(bracket)
        index = int("".join(t.text for t in tokens[at:end] if t.kind == "number"))
        name, kind = words[-1], " ".join(words[:-1])
        while tokens.text(before := tokens.previous(start)) in ("static", "constexpr", "const"):
            start = before
        unit.constants[name] = (index, kind)
        declaration = (
            f'extern "C" {{ extern __constant {kind} {name}; '
            f"extern __constant bool {name}__defined; }}"
        )
        tokens.replace(start, tokens.next(end) + 1, declaration)


def _threadgroup_variables(tokens: Tokens, unit: Unit, bodies: list[tuple[int, int]]) -> None:
    """`threadgroup T a[N];` becomes a reference into memory that the whole threadgroup shares."""
    for at, token in enumerate(tokens):
        before = tokens.text(tokens.previous(at)).rstrip()
        if token.text != "__local" or before[-1:] not in (";", "{", "}", ":"):
            continue
        end = _declaration_end(tokens, at)
        if end is None:
            continue
        declared = _declarators([t for t in tokens[at + 1 : end] if t.kind != "marker"])
        while tokens.text(end) != ";":  # Metal ignores an initialiser of such a variable
            end += 1
        text = []
        for kind, name, dimensions in declared:
            site = len(unit.threadgroup_variables)
            whole = f"{kind}{dimensions}"
            target = f"(&{name}){dimensions}" if dimensions else f"&{name}"
            pointer = f"(*){dimensions}" if dimensions else "*"
            text.append(
                f"__local {kind} {target} = *(__local {kind} {pointer})"
                f"__msl_threadgroup_slot({site}, sizeof({whole}), alignof({whole}));"
            )
            unit.threadgroup_variables.append(name)
            if not any(start <= at <= stop for start, stop in bodies):
                unit.stray.append(name)
        tokens.replace(at, end + 1, " ".join(text))


def _declaration_end(tokens: Tokens, at: int) -> int | None:
    """Index of the `;` or `=` if a variable is declared, None for a pointer or a reference."""
    depth, words = 0, 0
    for i in range(at + 1, len(tokens)):
        text = tokens[i].text
        if depth == 0 and text in (";", "="):
            return i if words >= 2 else None
        if depth == 0 and text in ("(", "{", ")", "*", "&"):
            return None
        depth += {"<": 1, "[": 1, "[[": 2, ">": -1, "]": -1, "]]": -2}.get(text, 0)
        words += tokens[i].kind == "word"
    return None


def _declarators(declaration: list[Token]) -> list[tuple[str, str, str]]:
    """(type, name, dimensions) of each variable in `T a[N], b`."""
    pieces: list[list[Token]] = [[]]
    depth, head = 0, True  # `<` opens a template list only before the first name ends
    for token in declaration:
        if token.text == "," and depth == 0:
            pieces.append([])
            continue
        if token.text in ("[", "[["):
            head = False
        depth += {"[": 1, "[[": 2, "]": -1, "]]": -2}.get(token.text, 0)
        if head:
            depth += {"<": 1, ">": -1}.get(token.text, 0)
        pieces[-1].append(token)
    found = []
    kind = ""
    for piece in pieces:
        bracket = next((i for i, t in enumerate(piece) if t.text in ("[", "[[")), len(piece))
        name = max(i for i in range(bracket) if piece[i].kind == "word")
        if not kind:
            kind = _flat(piece[:name])
        found.append((kind, piece[name].text, _flat(piece[bracket:])))
    return found


def _flat(tokens: list[Token]) -> str:
    return re.sub(r"\s+", " ", "".join(t.text for t in tokens)).strip()

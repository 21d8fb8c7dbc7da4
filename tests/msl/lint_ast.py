"""What the lint reads from clang's AST dump and from LLVM IR."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator

# In a dump every place is relative to the last one printed: file:line:column, line:L:C or col:C.
_PLACE = re.compile(r"(?:(?P<file>/[^:<>]+|<[\w ]+>):|line:)(?P<line>\d+):\d+")
_NODE = re.compile(r"^[|` -]*(?P<kind>\w+Decl) 0x[0-9a-f]+ (?P<rest>.*)$")
_NAMED = re.compile(r"\b(?P<name>\w+) '(?P<type>[^']*)'")


def unqualified_declarations(dump: str, dropped_thread: set[str]) -> Iterator[str]:
    """Pointers and references whose pointee is in the generic space: no qualifier was written.

    `dropped_thread` has the "file:line" of const references that were `thread` before the rewrite.
    """
    file, line = "", 0
    for text in dump.splitlines():
        for place in _PLACE.finditer(text.split("'", 1)[0]):
            file, line = place.group("file") or file, int(place.group("line"))
        node = _NODE.match(text)
        if node is None or node.group("kind") not in ("ParmVarDecl", "VarDecl", "FieldDecl"):
            continue
        if "/msl/include/" in file or file.startswith("<") or " implicit" in node.group("rest"):
            continue
        named = _NAMED.search(node.group("rest"))
        if named is None or not re.search(r"__generic\b[^*&]*[*&]", named.group("type")):
            continue
        name = named.group("name")
        if name in ("used", "referenced", "invalid") or name.isdigit():
            continue  # a parameter without a name, of a member that the compiler made
        if f"{file}:{line}" not in dropped_thread:
            written = named.group("type").replace("__generic ", "")
            yield f"{file}:{line}: `{name}` of type `{written}` has no address space"


def recursive_functions(code: str) -> list[str]:
    """Names of functions in LLVM IR that can reach themselves, one a cycle."""
    calls: dict[str, set[str]] = {}
    current = ""
    for line in code.splitlines():
        if m := re.match(r'define .*?@("?)([\w.$]+)\1\(', line):
            current = m.group(2)
            calls[current] = set()
        elif line == "}":
            current = ""
        elif current:
            calls[current].update(re.findall(r"call .*?@([\w.$]+)\(", line))
    found: list[str] = []
    for function in calls:
        if function in _reachable(calls, function) and not any(
            function in _reachable(calls, other) for other in found
        ):
            found.append(function)
    return [_demangled(name) for name in found]


def _reachable(calls: dict[str, set[str]], start: str) -> set[str]:
    reached: set[str] = set()
    waiting = list(calls[start])
    while waiting:
        function = waiting.pop()
        if function not in reached:
            reached.add(function)
            waiting += calls.get(function, ())
    return reached


def _demangled(name: str) -> str:
    if not shutil.which("c++filt"):
        return name
    return subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()

"""Strict lint: reject what Apple's compiler would, and what we do not want, without a Mac.

    python -m tests.msl.lint metal/*.metal

clang's C++ for OpenCL already refuses exceptions, `new`, virtual functions, double, std headers and
mixed address spaces. The rest is here: warnings made errors, words that are no Metal, attributes,
pointers with no address space, recursion. Not known: registers, occupancy, whether Apple's library
has every overload that ours has.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from .build import LANGUAGE, CompileError, compiler_errors, find_clang, preprocess
from .launcher import BUILTINS, PRELUDE, Parameter, UnboundParameter, launcher
from .lint_ast import recursive_functions, unqualified_declarations
from .rewrite import Unit, rewrite
from .symbols import in_metal
from .tokens import INCLUDE, SyntaxProblem, Tokens

_NO_METAL = frozenset(
    (
        *("goto", "asm", "__asm__", "alloca", "setjmp", "typeid", "register", "thread_local"),
        *("co_await", "co_yield", "co_return"),
    )
)
_MISSING = (
    "-cl_khr_fp64,-__opencl_c_fp64,-__opencl_c_program_scope_global_variables,"
    "-__opencl_c_device_enqueue,-__opencl_c_pipes,-__opencl_c_images,-__opencl_c_3d_image_writes,"
    "-__opencl_c_read_write_images,-cl_khr_3d_image_writes"
)
_STRICT = [
    *(flag for flag in LANGUAGE if not flag.startswith("-cl-ext") and flag != "-Xclang"),
    *("-Xclang", f"-cl-ext={_MISSING}", "-fno-lax-vector-conversions", "-pedantic-errors"),
    *("-Werror=vla", "-Werror=uninitialized", "-Werror=sometimes-uninitialized"),
    *("-Werror=return-type", "-Wimplicit-float-conversion", "-fno-color-diagnostics"),
    *("-Wno-unknown-attributes", "-Wno-gnu", "-Wno-vla-extension", "-Wno-unknown-pragmas"),
    *("-Wno-language-extension-token", "-Wno-unused-value", "-ferror-limit=0"),
]
_MAX_BUFFERS = 31
# Positions and sizes of one launch: Metal wants vectors of one length, and these pairs alike.
_PLACES = BUILTINS[:7]
_PAIRS = (
    ("thread_position_in_grid", "threads_per_grid"),
    ("thread_position_in_threadgroup", "threads_per_threadgroup"),
)


def lint(
    path: str | Path,
    kernels: Sequence[str] | None = None,
    include: Sequence[str | Path] = (),
    define: Sequence[str] = (),
    only_own: bool = False,
) -> list[str]:
    """Problems of a source as "file:line: what"; empty if there are none.

    Args:
        kernels: expressions ("qmv<half, 64>") to instantiate as well; host names and kernels that
            are no template always are.
        only_own: leave out problems in the files that it includes.
    """
    path = Path(path)
    try:
        text = preprocess(path, include, define)
        unit = rewrite(text)
        launchers = _launchers(unit, kernels or ())
    except CompileError as error:
        return compiler_errors(str(error)) or [str(error)]
    except (SyntaxProblem, UnboundParameter) as error:
        return [f"{path}: {error}"]
    source = _library_as_system(unit.text) + '\n# 1 "<launcher>" 3\n' + PRELUDE + launchers
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lint.cl"
        file.write_text(source)
        errors, code = _compile(file)
        problems = [*_words(text), *_declarations(path, unit), *errors]
        if not problems:
            ast = _run([*_STRICT, "-w", "-fsyntax-only", "-Xclang", "-ast-dump", str(file)]).stdout
            problems += unqualified_declarations(ast, unit.dropped_thread)
            problems += [f"{path}: recursion in {name}" for name in recursive_functions(code)]
    own = [p for p in problems if p.startswith(str(path))]
    return own if only_own else problems


def _run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    clang = find_clang()
    if clang is None:
        raise CompileError("no clang 17 or newer")
    return subprocess.run([*clang, *arguments], capture_output=True, text=True)


def _launchers(unit: Unit, kernels: Sequence[str]) -> str:
    plain = [name for name in unit.kernels if name not in unit.templates]
    asked = [*plain, *unit.host_names.values(), *kernels]
    text = ""
    for number, expression in enumerate(dict.fromkeys(asked)):
        base = expression.split("<")[0].strip().rsplit("::", 1)[-1]
        text += launcher(expression, unit.kernels[base], number)
    return text


def _library_as_system(text: str) -> str:
    """Mark our standard library as a system header: only the author's code is judged."""
    marker = re.compile(rf'^(# \d+ "{re.escape(str(INCLUDE))}[^"]*")((?: \d)*)$', re.MULTILINE)
    return marker.sub(lambda m: f"{m.group(1)}{m.group(2).replace(' 3', '')} 3", text)


def _words(preprocessed: str) -> Iterator[str]:
    tokens = Tokens.of(preprocessed)
    for at, token in enumerate(tokens):
        if token.kind == "word" and token.text in _NO_METAL:
            yield f"{tokens.where(at)}: `{token.text}` is not Metal"
        elif token.kind not in ("library", "marker") and not token.text.isascii():
            yield f"{tokens.where(at)}: {token.text!r} is not ASCII"


def _declarations(path: Path, unit: Unit) -> Iterator[str]:
    for name in unit.stray:
        yield f"{path}: threadgroup variable `{name}` declared outside a kernel"
    for kernel, parameters in unit.kernels.items():
        for problem in _attributes(parameters):
            yield f"{path}: kernel {kernel}: {problem}"


def _attributes(parameters: list[Parameter]) -> Iterator[str]:
    seen: dict[tuple[str, int], str] = {}
    places: dict[str, str] = {}
    for p in parameters:
        if p.kind == "buffer" and "buffer" not in p.text:
            yield f"`{p.text}` has no [[buffer(i)]]"
        if p.kind == "buffer" and p.slot >= _MAX_BUFFERS:
            yield f"`{p.text}`: buffer indices end at {_MAX_BUFFERS - 1}"
        if p.kind != "builtin" and (p.kind, p.slot) in seen:
            yield f"`{p.text}` has the index of `{seen[p.kind, p.slot]}`"
        seen[p.kind, p.slot] = p.text
        if p.kind == "builtin" and BUILTINS[p.slot] in _PLACES:
            places[BUILTINS[p.slot]] = re.sub(r"\bconst\b", "", p.text).split()[0]
    lengths = {kind[-1] for kind in places.values() if kind[-1].isdigit()}
    if len(lengths) > 1:
        yield f"positions are vectors of different lengths: {', '.join(places.values())}"
    for one, other in _PAIRS:
        if one in places and other in places and places[one] != places[other]:
            yield f"{one} is {places[one]}, but {other} is {places[other]}"


def _compile(file: Path) -> tuple[list[str], str]:
    """(errors, LLVM IR)"""
    done = _run([*_STRICT, "-O0", "-S", "-emit-llvm", "-o", "-", str(file)])
    # Metal has no implicit conversion to bfloat; clang has, and only warns.
    to_bfloat = re.compile(r"warning: implicit conversion .* to '[^']*(bfloat|__bf16)")
    warned = [in_metal(line) for line in done.stderr.splitlines() if to_bfloat.search(line)]
    return compiler_errors(done.stderr) + warned, done.stdout


def main(paths: Sequence[str]) -> int:
    """Lint the files; 1 if there is a problem."""
    problems = [problem for path in paths for problem in lint(path)]
    print("\n".join(problems) or f"{len(paths)} files, no problem")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

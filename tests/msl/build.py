"""Find a clang, compile a Metal source with it, keep what was compiled."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .launcher import PRELUDE, Parameter, launcher
from .rewrite import Unit, rewrite
from .symbols import in_metal
from .tokens import INCLUDE

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = Path(os.environ.get("MSL_CACHE", ROOT / "build" / "msl"))
KEEP_SECONDS = 14 * 86400

_ARCH = ["-march=x86-64-v3"]  # half conversions and fused multiply-adds in one instruction
LANGUAGE = [
    *("-x", "cl", "-cl-std=CLC++2021", "-cl-no-stdinc", "-target", "x86_64-linux-gnu"),
    *("-Xclang", "-cl-ext=-cl_khr_fp64,-__opencl_c_fp64"),  # Metal has no double
]
# Defined overflow, and no fast-math.
_CODE = ["-fPIC", "-g1", "-fno-strict-aliasing", "-fwrapv", "-fno-math-errno"]
# Apple's compiler makes an fma of a * b + c, without fast-math as well: its AIR has llvm.fmuladd.
_CONTRACT = {True: ["-ffp-contract=on"], False: ["-ffp-contract=off"]}
# Indices of fixed-size arrays, and frames that would jump over the guard page of a stack.
_CODE += ["-fsanitize=array-bounds,local-bounds", "-fsanitize-trap=local-bounds"]
_CODE += ["-fno-sanitize-recover=array-bounds", "-fstack-clash-protection"]
_MODES = {
    "fast": ["-O2"],
    # The thread sanitizer's calls before every access; rt/check.cpp answers them. Wide vector
    # accesses would go without, so nothing is vectorised.
    "check": [
        *("-O1", "-fsanitize=thread"),
        *("-mllvm", "-tsan-instrument-func-entry-exit=0"),
        *("-mllvm", "-tsan-instrument-read-before-write=1"),
        *("-fno-vectorize", "-fno-slp-vectorize", "-ftrivial-auto-var-init=pattern"),
    ],
}


class CompileError(RuntimeError):
    """The Metal source does not compile; the message has the compiler's lines."""


@functools.cache
def find_clang() -> tuple[str, ...] | None:
    """The command of a clang 17 or newer: $MSL_CLANG, clang-N, clang, or ziglang's."""
    if chosen := os.environ.get("MSL_CLANG"):
        return tuple(chosen.split())
    for name in ("clang-19", "clang-20", "clang-21", "clang-22", "clang-18", "clang-17", "clang"):
        if (path := shutil.which(name)) and _version(path) >= 17:
            return (path,)
    if (spec := importlib.util.find_spec("ziglang")) and spec.origin:
        return (str(Path(spec.origin).with_name("zig")), "clang")
    return None


def _version(path: str) -> int:
    dumped = subprocess.run([path, "-dumpversion"], capture_output=True, text=True)
    return int(dumped.stdout.split(".")[0] or 0) if dumped.returncode == 0 else 0


@functools.cache
def unavailable() -> str | None:
    """Why this machine cannot run the emulator, with the fix; None if it can."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "the Metal emulator runs on x86-64 Linux only"
    flags = Path("/proc/cpuinfo").read_text().split()
    if missing := {"avx2", "f16c", "fma", "bmi2"} - set(flags):
        return f"the Metal emulator needs a processor with {', '.join(sorted(missing))}"
    if find_clang() is None:
        return "no clang 17 or newer: apt-get install clang-19, or pip install ziglang==0.17.1"
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "no C++ compiler: apt-get install g++"
    return None


@dataclass
class Built:
    """A compiled module; `seconds` is empty when it came from the cache."""

    library: Path
    kernels: dict[str, list[Parameter]]  # by the name the caller gave, in order of msl_entry_N
    constants: dict[str, tuple[int, str]]
    threadgroup_variables: list[str]
    seconds: dict[str, float] = field(default_factory=dict)


def build(
    path: Path,
    kernels: dict[str, str] | Sequence[str] | None,
    mode: str,
    include: Sequence[str | Path] = (),
    define: Sequence[str] = (),
    contract: bool = True,
) -> Built:
    """Compile `path` (or take it from the cache). `kernels` maps names to kernel expressions."""
    started = time.perf_counter()
    text = preprocess(path, include, define)
    key = _key(text, repr(kernels), mode, str(contract))
    library, record = CACHE / f"{key}.so", CACHE / f"{key}.json"
    if library.exists() and record.exists():
        os.utime(library)
        os.utime(record)
        return _load(library, record)
    seconds = {"preprocess": time.perf_counter() - started}
    started = time.perf_counter()
    unit = rewrite(text)
    wanted = expressions(unit, kernels)
    signatures = {name: unit.kernels[_base(e)] for name, e in wanted.items()}
    source = unit.text + '\n# 1 "<launcher>"\n' + PRELUDE
    for number, (name, expression) in enumerate(wanted.items()):
        source += launcher(expression, signatures[name], number)
    seconds["rewrite"] = time.perf_counter() - started
    CACHE.mkdir(parents=True, exist_ok=True)
    _compile(source, unit, key, mode, contract, seconds)
    built = Built(library, signatures, unit.constants, unit.threadgroup_variables, seconds)
    _write(record, json.dumps({**asdict(built), "library": library.name}))
    _prune()
    return built


def preprocess(path: Path, include: Sequence[str | Path] = (), define: Sequence[str] = ()) -> str:
    """The source after macros, with our standard library in place of Apple's."""
    paths = [f"-I{p}" for p in (INCLUDE, *include)]
    defines = [f"-D{d}" for d in define]
    done = _clang([*LANGUAGE, "-w", "-E", *paths, *defines, str(path)])
    if done.returncode:
        raise CompileError(done.stderr)
    return done.stdout


def expressions(unit: Unit, kernels: dict[str, str] | Sequence[str] | None) -> dict[str, str]:
    """Name to kernel expression. None asks for all that have a host name or are no template."""
    if kernels is None:
        plain = {name: name for name in unit.kernels if name not in unit.templates}
        return {**plain, **unit.host_names}
    asked = kernels if isinstance(kernels, dict) else {name: name for name in kernels}
    found = {name: unit.host_names.get(e, e) for name, e in asked.items()}
    for expression in found.values():
        if _base(expression) not in unit.kernels:
            known = ", ".join([*unit.kernels, *unit.host_names]) or "none"
            raise KeyError(f"no kernel {expression!r}; this source has: {known}")
    return found


def _base(expression: str) -> str:
    return expression.split("<")[0].strip().rsplit("::", 1)[-1]


def _compile(
    source: str, unit: Unit, key: str, mode: str, contract: bool, seconds: dict[str, float]
) -> None:
    # Other processes may build the same: what is not renamed into place has a name of its own.
    text, code = CACHE / f"{key}.cl", CACHE / f"{key}.{os.getpid()}.o"
    _write(text, source)
    started = time.perf_counter()
    done = _clang(
        [
            *(*LANGUAGE, "-w", *_ARCH, *_CODE, *_CONTRACT[contract], *_MODES[mode]),
            *("-c", str(text), "-o", str(code)),
        ]
    )
    if done.returncode:
        raise CompileError("\n".join(compiler_errors(done.stderr)) or done.stderr[:4000])
    seconds["compile"] = time.perf_counter() - started
    beside = []
    if unit.constants:
        definitions = CACHE / f"{key}.c"
        _write(definitions, _constant_definitions(unit))
        beside = ["-x", "c", str(definitions), "-x", "none"]
    started = time.perf_counter()
    link(code, CACHE / f"{key}.so", mode, beside)
    seconds["link"] = time.perf_counter() - started


def link(code: Path, library: Path, mode: str, beside: Sequence[str] = ()) -> None:
    """An object file, which goes, with the runtime."""
    command = [os.environ.get("CXX", "c++"), "-shared", "-fPIC", str(code)]
    part = library.with_name(f"{library.name}.{os.getpid()}")
    last = ["-Wl,-z,defs,-Bsymbolic", "-lm", "-o", str(part)]
    _run([*command, str(build_runtime(mode)), *beside, *last])
    part.rename(library)
    code.unlink()


def _constant_definitions(unit: Unit) -> str:
    types = "typedef unsigned short ushort; typedef unsigned uint; typedef unsigned long ulong;\n"
    return types + "".join(
        f"{kind.replace('bool', '_Bool')} {name}; _Bool {name}__defined;\n"
        for name, (_, kind) in unit.constants.items()
    )


def build_runtime(mode: str) -> Path:
    """The object file of rt/, compiled with $CXX or c++."""
    target = CACHE / f"runtime-{mode}-{_runtime_hash()}.o"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}")
        checks = ["-DMSL_CHECK"] if mode == "check" else []
        flags = ["-std=c++17", "-O2", "-fPIC", "-fno-exceptions", "-U_FORTIFY_SOURCE", *_ARCH]
        source = HERE / "rt" / "runtime.cpp"
        compiler = os.environ.get("CXX", "c++")
        _run([compiler, *flags, *checks, "-c", str(source), "-o", str(part)])
        part.rename(target)
    return target


def compiler_errors(output: str) -> list[str]:
    """Clang's errors in Metal's words; one in our library or a launcher is put where it is used."""
    found: list[str] = []
    foreign = ""  # an error whose place is not the author's, until a note says who caused it
    for line in output.splitlines():
        if re.search(r": (fatal )?error: ", line):
            found += [foreign] if foreign else []
            foreign = line if line.startswith(("<launcher>", str(INCLUDE))) else ""
            found += [] if foreign else [line]
        elif foreign and "requested here" in line and not line.startswith(str(INCLUDE)):
            found.append(f"{line.split(' note: ')[0]} {foreign.split(': ', 1)[1]}")
            foreign = ""
    found += [foreign] if foreign else []
    own = [line for line in found if not line.startswith("<launcher>")]
    return [in_metal(line) for line in own or found]


def _clang(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    clang = find_clang()
    if clang is None:
        raise CompileError(str(unavailable()))
    return subprocess.run([*clang, *arguments], capture_output=True, text=True)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{' '.join(command)}\n{done.stderr[:4000]}")


def _key(*parts: str) -> str:
    digest = hashlib.sha256(_own_hash().encode())
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:24]


@functools.cache
def _runtime_hash() -> str:
    digest = hashlib.sha256(os.environ.get("CXX", "c++").encode())
    for path in sorted((HERE / "rt").iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _own_hash() -> str:
    """Of all that decides what a source compiles to, beside the source."""
    digest = hashlib.sha256(_runtime_hash().encode())
    for name in ("tokens.py", "rewrite.py", "constructions.py", "launcher.py", "build.py"):
        digest.update((HERE / name).read_bytes())
    clang = find_clang()
    digest.update(_clang(["--version"]).stdout.encode() if clang else b"")
    return digest.hexdigest()


def _load(library: Path, record: Path) -> Built:
    saved = json.loads(record.read_text())
    return Built(
        library=library,
        kernels={name: [Parameter(*p) for p in ps] for name, ps in saved["kernels"].items()},
        constants={name: (index, kind) for name, (index, kind) in saved["constants"].items()},
        threadgroup_variables=saved["threadgroup_variables"],
    )


def _write(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(text)
    part.rename(path)


def _prune() -> None:
    """Forget what no test has used for two weeks."""
    limit = time.time() - KEEP_SECONDS
    for path in CACHE.iterdir():
        if path.suffix in (".so", ".json", ".cl", ".c") and path.stat().st_mtime < limit:
            path.unlink(missing_ok=True)

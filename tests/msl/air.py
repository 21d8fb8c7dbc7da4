"""Kernels as Apple's compiler made them, on the emulator: LLVM code (AIR) out of a .metallib.

    kernel = module(Metallib(path), "sdpa_vector_float16_t_64_64", {"has_mask": 0, ...})
    (o,), counters = kernel("sdpa_vector_float16_t_64_64", {0: q, ...}, grid, threads)

The code is read and compiled by the emulator's own clang. What is changed in it: address spaces go,
as on any CPU; threadgroup variables lie in the runtime's memory, so that they are checked; function
constants get their values, as when Metal specializes a function; and what Apple leaves to the GPU
(`air.simd_sum` and so on) are our functions for Metal sources (air_shims.metal).
"""

from __future__ import annotations

import functools
import mmap
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path

from .build import (
    _ARCH,
    _CODE,
    _CONTRACT,
    _MODES,
    CACHE,
    HERE,
    LANGUAGE,
    Built,
    CompileError,
    _clang,
    _key,
    _write,
    link,
    preprocess,
)
from .emulator import Module
from .launcher import BUILTINS, Parameter
from .rewrite import rewrite

TARGET = ["-x", "ir", "-target", "x86_64-linux-gnu", "-w"]
# Lane l holds the first two of the 64 elements: those that `thread_elements()` names.
MATRIX = "air.simdgroup_matrix_8x8_multiply_accumulate.v64f32.v64f32.v64f32.v64f32"
MULTIPLY = (
    f"declare void @__msl_multiply(ptr)\n"
    f"define internal <64 x float> @{MATRIX}(<64 x float> %0, <64 x float> %1, <64 x float> %2) "
    "alwaysinline {\n  %six = alloca [6 x float]\n"
    + "".join(
        f"  %e{i} = extractelement <64 x float> %{i // 2}, i32 {i % 2}\n"
        f"  %p{i} = getelementptr float, ptr %six, i32 {i}\n  store float %e{i}, ptr %p{i}\n"
        for i in range(6)
    )
    + "  call void @__msl_multiply(ptr %six)\n"
    "  %x = load float, ptr %p0\n  %y = load float, ptr %p1\n"
    "  %r = insertelement <64 x float> %2, float %x, i32 0\n"
    "  %s = insertelement <64 x float> %r, float %y, i32 1\n  ret <64 x float> %s\n}\n"
)
# Clang calls it for each conversion, but only once the shims that have it were chosen.
ROUNDS_TO_BFLOAT = (
    "declare bfloat @__truncsfbf2(float)\n"
    '@llvm.used = appending global [1 x ptr] [ptr @__truncsfbf2], section "llvm.metadata"\n'
)


class Metallib:
    """The functions of a .metallib, by name."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self.data[:4] != b"MTLB":
            raise ValueError(f"{path} is not a .metallib: it does not begin with MTLB")
        self.places = self._places()

    def code(self, name: str) -> bytes:
        if name not in self.places:
            raise KeyError(f"no function {name!r} among the {len(self.places)} of the library")
        at, size = self.places[name]
        return self.data[at : at + size]

    def _places(self) -> dict[str, tuple[int, int]]:
        """Where each function's bitcode lies."""
        (at,) = struct.unpack_from("<Q", self.data, 24)
        (first,) = struct.unpack_from("<Q", self.data, 72)  # of all bitcode
        (count,) = struct.unpack_from("<I", self.data, at)
        at += 4
        places = {}
        for _ in range(count):
            (size,) = struct.unpack_from("<I", self.data, at)
            fields, field = {}, at + 4
            while (tag := self.data[field : field + 4]) != b"ENDT":
                (length,) = struct.unpack_from("<H", self.data, field + 4)
                fields[tag] = self.data[field + 6 : field + 6 + length]
                field += 6 + length
            offsets, sizes = struct.unpack("<3Q", fields[b"OFFT"]), fields[b"MDSZ"]
            place = first + offsets[2], *struct.unpack("<Q", sizes)
            places[fields[b"NAME"].rstrip(b"\0").decode()] = place
            at += size
        return places


def module(
    library: Metallib, name: str, constants: Mapping[str, int] | None = None, mode: str = "check"
) -> Module:
    """One function of the library, with values for all its function constants."""
    return Module.of(_build(library.code(name), name, dict(constants or {}), mode), mode)


def _build(code: bytes, name: str, constants: dict[str, int], mode: str) -> Built:
    shims = _shims(mode)
    key = _key(Path(__file__).read_text(), code.hex(), shims.name, repr(constants), mode)
    bitcode, text = CACHE / f"{key}.bc", CACHE / f"{key}.ll"
    if not text.exists():
        bitcode.write_bytes(code)
        _emit([*TARGET, "-S", "-emit-llvm", "-Xclang", "-disable-llvm-passes", str(bitcode)], text)
    ir = text.read_text()
    parameters, sizes, types = _parameters(ir)
    made, variables = adapted(ir, name, constants)
    library = CACHE / f"{key}.so"
    if not library.exists():
        adapted_text, object_file = CACHE / f"{key}.adapted.ll", CACHE / f"{key}.{os.getpid()}.o"
        _write(adapted_text, made + launcher(name, parameters, sizes, types))
        with_shims = ["-Xclang", "-mlink-builtin-bitcode", "-Xclang", str(shims)]
        code_flags = [flag for flag in _CODE if "sanitize" not in flag]
        flags = [*TARGET, *_ARCH, *code_flags, *_MODES[mode], *with_shims]
        _emit([*flags, "-c", str(adapted_text)], object_file)
        link(object_file, library, mode)
    return Built(library, {name: parameters}, {}, variables)


@functools.cache
def _shims(mode: str) -> Path:
    source = HERE / "air_shims.metal"
    text = rewrite(preprocess(source)).text
    key = _key(text, mode, "shims")
    target, cl = CACHE / f"{key}.bc", CACHE / f"{key}.cl"
    if not target.exists():
        _write(cl, text)
        flags = [*LANGUAGE, "-w", *_ARCH, *_CODE, *_CONTRACT[True], *_MODES[mode]]
        # What is put in the kernel is optimized there.
        _emit([*flags, "-emit-llvm", "-Xclang", "-disable-llvm-passes", "-c", str(cl)], target)
    return target


def _emit(arguments: list[str], target: Path) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}")
    done = _clang([*arguments, "-o", str(part)])
    if done.returncode:
        raise CompileError(done.stderr[:4000])
    part.rename(target)


def adapted(ir: str, name: str, constants: Mapping[str, int]) -> tuple[str, list[str]]:
    """The code for a CPU, and the names of its threadgroup variables."""
    ir = _with_constants(ir, constants)
    shared = re.findall(r"^(@\S+) = .*addrspace\(3\) global (.*) undef, align (\d+)$", ir, re.M)
    ir = re.sub(r"^@\S+ = .*addrspace\(3\) global .*\n", "", ir, flags=re.M)
    ir = re.sub(r" addrspace\(\d\)", "", ir).replace("addrspacecast", "bitcast")
    ir = re.sub(r"(@llvm\.mem\w+?)(?:\.p\d)+\.i64", _one_space, ir)
    ir = re.sub(r',? section "air\.\w+"', "", ir)
    ir = ir.replace(f"define weak_odr void @{name}(", f"define internal void @{name}(")
    functions = re.split(r"(?m)^(?=define )", ir)
    ir = functions[0] + "".join(_with_slots(f, shared) for f in functions[1:])
    # Accesses are checked, but for those when the library is loaded, where function constants are
    # stored.
    groups = re.findall(r"^define (?!.*@_GLOBAL__sub_I_).*#(\d+)", ir, re.M)
    for group in set(groups):
        ir = ir.replace(f"attributes #{group} = {{", f"attributes #{group} = {{ sanitize_thread")
    if MATRIX in ir:
        ir = re.sub(rf"^declare .*@{re.escape(MATRIX)}\(.*\n", MULTIPLY, ir, flags=re.M)
    ir = _once(ir)
    if shared:
        ir += "declare ptr @__msl_threadgroup_slot(i32, i32, i32)\n"
    return ir + ROUNDS_TO_BFLOAT, [variable for variable, *_ in shared]


def _with_constants(ir: str, constants: Mapping[str, int]) -> str:
    found = re.findall(r'^!\d+ = !\{.*@(\S+), !"(\w+)", !"(\w+)", i32 \d+, i1 \w+\}', ir, re.M)
    if set(constants) != {name for _, _, name in found}:
        known = ", ".join(name for _, _, name in found) or "none"
        raise ValueError(f"values for {', '.join(constants) or 'none'}; the function has {known}")
    for variable, _, name in found:
        ir = re.sub(
            rf"^(@{re.escape(variable)} = .*) externally_initialized (constant i\d+) undef",
            rf"\1 \2 {int(constants[name])}",
            ir,
            flags=re.M,
        )
    return ir


def _one_space(match: re.Match[str]) -> str:
    spaces = match[0].count(".p")
    return match[1] + ".p0" * spaces + ".i64"


def _with_slots(function: str, shared: list[tuple[str, str, str]]) -> str:
    """Threadgroup variables as pointers that the function asks for when it begins."""
    head, body = function.split("\n", 1)
    lines = []
    for site, (variable, kind, align) in enumerate(shared):
        if variable not in body:
            continue
        bytes_ = f"ptrtoint (ptr getelementptr ({kind}, ptr null, i32 1) to i32)"
        lines.append(
            f"  %slot{site} = call ptr @__msl_threadgroup_slot(i32 {site}, i32 {bytes_}, "
            f"i32 {align})"
        )
        places = re.compile(rf"getelementptr inbounds \([^()]*{re.escape(variable)}\b[^()]*\)")
        for number, place in enumerate(sorted(set(places.findall(body)))):
            body = body.replace(place, f"%slot{site}at{number}")
            made = re.sub(r"\((.*)\)", r"\1", place).replace(variable, f"%slot{site}")
            lines.append(f"  %slot{site}at{number} = {made}")
        body = re.sub(rf"{re.escape(variable)}\b", f"%slot{site}", body)
    return "\n".join([head, *lines, body])


def _once(ir: str) -> str:
    """Without a second declaration of what differed in address spaces."""
    seen: set[str] = set()
    lines = []
    for line in ir.split("\n"):
        if line.startswith("declare "):
            declared = line.split("@")[1].split("(")[0]
            if declared in seen:
                continue
            seen.add(declared)
        lines.append(line)
    return "\n".join(lines)


def _parameters(ir: str) -> tuple[list[Parameter], list[int], list[str]]:
    """Of the kernel: parameters, bytes of an element of each buffer, types in LLVM."""
    nodes = dict(re.findall(r"^!(\d+) = (?:distinct )?!\{(.*)\}$", ir, re.M))
    (kernel,) = re.findall(r"^!air\.kernel = !\{!(\d+)\}", ir, re.M)
    arguments = nodes[kernel].split("!")[-1]
    parameters, sizes, types = [], [], []
    for node in re.findall(r"!(\d+)", nodes[arguments]):
        text = nodes[node]
        said = dict(re.findall(r'"air\.(\w+)", (?=(?:i32 |!")(\w+))', text))
        label = f"{said['arg_type_name']} {said['arg_name']}"
        if '"air.buffer"' in text:
            parameters.append(Parameter("buffer", int(said["location_index"]), label))
            sizes.append(int(said["arg_type_size"]) | ("buffer_size" in said) << 31)
            types.append("ptr")
            continue
        (builtin,) = (b for b in BUILTINS if f'"air.{b}"' in text)
        parameters.append(Parameter("builtin", BUILTINS.index(builtin), label))
        (axes,) = re.findall(r"^uint([23]?)$", said["arg_type_name"])
        types.append(f"<{axes} x i32>" if axes else "i32")
    return parameters, sizes, types


def launcher(name: str, parameters: list[Parameter], sizes: list[int], types: list[str]) -> str:
    """What launcher.py makes in C++: `msl_entry_0` and `msl_sizes_0`."""
    lines, given = [], []
    for i, (parameter, kind) in enumerate(zip(parameters, types, strict=True)):
        place = 3 * parameter.slot if parameter.kind == "builtin" else parameter.slot
        of, item = ("%context", "i32") if parameter.kind == "builtin" else ("%buffers", "ptr")
        lines += [
            f"  %from{i} = getelementptr {item}, ptr {of}, i32 {place}",
            f"  %value{i} = load {kind}, ptr %from{i}, align 4",
        ]
        given.append(f"{kind} %value{i}")
    numbers = ", ".join(f"i32 {size}" for size in [*sizes, 0])
    return (
        f"@msl_sizes_0 = constant [{len(sizes) + 1} x i32] [{numbers}]\n"
        "define void @msl_entry_0(ptr %buffers, ptr %memory, ptr %context) {\n"
        + "\n".join(lines)
        + f"\n  call void @{name}({', '.join(given)})\n  ret void\n}}\n"
    )

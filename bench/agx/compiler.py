"""Compiles a Metal kernel to the instruction set of Apple's M1 and M2 GPUs, with Mesa's compiler.

    metal -> C++ for OpenCL (tests/msl/rewrite.py) -> clang 19 -> LLVM -O2 -> SPIR-V -> NIR -> AGX

`make agx` builds what this needs into build/agx, a Debian trixie tree whose programs run in place.
Nothing is executed: all that comes out is counted in the code.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from tests.msl import tokens
from tests.msl.launcher import SIGNATURE, Parameter
from tests.msl.rewrite import rewrite

HERE = Path(__file__).resolve().parent
TREE = HERE.parents[1] / "build" / "agx"
CACHE = TREE / "figures"
SHIM, LIBRARY = HERE / "include", tokens.INCLUDE
MLX = Path(mx.__file__).parent / "include"

# clang knows no __bf16 on SPIR-V, so it is told x86 with SPIR-V's address spaces; `lower_bfloat`
# takes the type out of the IR, and the IR's target is changed before anything is optimised.
LANGUAGE = ["-x", "cl", "-cl-std=CLC++2021", "-cl-no-stdinc", "-target", "x86_64-linux-gnu", "-w"]
LANGUAGE += ["-Xclang", "-ffake-address-space-map", "-Xclang", "-ffloat16-excess-precision=none"]
LANGUAGE += ["-Xclang", "-cl-ext=-cl_khr_fp64,-__opencl_c_fp64"]
# The data layout that Apple's AIR has.
LAYOUT = (
    'target datalayout = "e-i64:64-v16:16-v24:32-v32:32-v48:64-v96:128-v192:256-v256:256-v512:512'
    '-v1024:1024-n8:16:32-G1"\ntarget triple = "spir64-unknown-unknown"'
)
CODE = ["-O2", "-fno-discard-value-names", "-ffp-contract=on", "-fno-math-errno"]
CODE += ["-fno-strict-aliasing", "-Xclang", "-disable-llvm-passes"]

PRELUDE = (
    f"""
namespace agx_launch {{{SIGNATURE}"""
    + """\
template <class T> struct argument<T*> {
  typedef T* type;
  static T* of(T* p) { return p; }
};
template <class T> struct argument<T&> {
  typedef T* type;
  static T& of(T* p) { return *p; }
};
template <class T> struct position {
  static T of(uint x, uint, uint) { return T(x); }
};
template <class E, int N> struct position<metal::vec<E, N>> {
  static metal::vec<E, N> of(uint x, uint y, uint z) {
    metal::vec<E, N> v;
    v[0] = E(x), v[1] = E(y);
    if constexpr (N == 3) { v[2] = E(z); }
    return v;
  }
};
}
"""
)
_XYZ = "(uint){0}(0), (uint){0}(1), (uint){0}(2)"
POSITIONS = {
    "thread_position_in_grid": _XYZ.format("get_global_id"),
    "thread_position_in_threadgroup": _XYZ.format("get_local_id"),
    "threadgroup_position_in_grid": _XYZ.format("get_group_id"),
    "threads_per_grid": _XYZ.format("get_global_size"),
    "threads_per_threadgroup": _XYZ.format("get_local_size"),
    "threadgroups_per_grid": "32u, 1u, 1u",  # which Mesa's compiler leaves to its driver
    "dispatch_threads_per_threadgroup": _XYZ.format("get_local_size"),
    "thread_index_in_threadgroup": "(uint)get_local_linear_id(), 0, 0",
    "simdgroup_index_in_threadgroup": "get_sub_group_id(), 0, 0",
    "thread_index_in_simdgroup": "get_sub_group_local_id(), 0, 0",
    "simdgroups_per_threadgroup": "get_num_sub_groups(), 0, 0",
    "threads_per_simdgroup": "32, 0, 0",
    "thread_execution_width": "32, 0, 0",
}


class AgxError(RuntimeError):
    """A step of the compilation failed, or the kernel has what Mesa's compiler cannot do."""


def built() -> bool:
    return (TREE / "proto" / "agx_static").exists()


def compile_kernel(
    source: Path, expression: str, threads: Sequence[int], values: Mapping[str, str] = {}
) -> dict[str, dict[str, Any]]:
    """The figures of one kernel, by part: "main", "preamble" (once a threadgroup), "total".

    `values` are those of function constants. Raises AgxError.
    """
    include = [f"-I{p}" for p in (SHIM, LIBRARY, source.parent, MLX)]
    unit = rewrite(_run("clang-19", *LANGUAGE, "-E", *include, source), (SHIM, LIBRARY))
    base = expression.split("<")[0].strip().rsplit("::", 1)[-1]
    if base not in unit.kernels:
        raise AgxError(f"{source} has no kernel {base}; it has {', '.join(unit.kernels)}")
    text = _constants(unit.text, unit.constants, values) + PRELUDE
    text += _wrapper(expression, unit.kernels[base], threads)
    tool = (TREE / "proto" / "agx_static").stat().st_size
    key = hashlib.sha256(f"{text}{CODE}{tool}{Path(__file__).read_text()}".encode()).hexdigest()
    kept = CACHE / f"{key[:24]}.json"
    if not kept.exists():
        lines = _compile(text)
        CACHE.mkdir(exist_ok=True)
        kept.write_text(json.dumps({line["part"]: line for line in lines}))
    figures: dict[str, dict[str, Any]] = json.loads(kept.read_text())
    return figures


def _compile(text: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="agx") as folder:
        names = ("k.cl", "k.ll", "optimised.ll", "k.spv")
        cl, ir, optimised, spirv = (Path(folder) / name for name in names)
        cl.write_text(text)
        _run("clang-19", *LANGUAGE, *CODE, "-emit-llvm", "-S", cl, "-o", ir)
        ir.write_text(lower_bfloat(_place_threadgroup_memory(ir.read_text())))
        _run(
            "opt-19", "-S", "-passes=internalize,default<O2>",
            "-internalize-public-api-list=agx_kernel", "-vectorize-loops=false",
            "-vectorize-slp=false", ir, "-o", optimised,
        )  # fmt: skip
        # SPIR-V has no disjoint `or`, and NIR joins memory accesses only where it sees a sum.
        optimised.write_text(optimised.read_text().replace("= or disjoint ", "= add "))
        bitcode = optimised.with_suffix(".bc")
        _run("llvm-as-19", optimised, "-o", bitcode)
        _run("llvm-spirv-19", "--spirv-max-version=1.4", bitcode, "-o", spirv)
        printed = _run("agx_static", spirv)
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


def _run(name: str, *arguments: object) -> str:
    """A program of the tree, run in place by the tree's own dynamic loader."""
    lib = TREE / "usr/lib/x86_64-linux-gnu"
    path = TREE / ("proto/agx_static" if name == "agx_static" else f"usr/bin/{name}")
    if path.is_symlink():
        path = path.parent / path.readlink()
    loader = [lib / "ld-linux-x86-64.so.2", "--library-path", f"{lib}:{TREE}/usr/lib/llvm-19/lib"]
    done = subprocess.run(
        [str(a) for a in (*loader, path, *arguments)], capture_output=True, text=True
    )
    if done.returncode:
        raise AgxError(f"{name} {' '.join(map(str, arguments))}\n{done.stderr[-4000:]}")
    return done.stdout


def _wrapper(expression: str, signature: list[Parameter], threads: Sequence[int]) -> str:
    """A kernel of OpenCL that calls this one."""
    kinds = f"agx_launch::signature<decltype({expression})>"
    declared, passed = [], []
    for i, p in enumerate(signature):
        kind = f"{kinds}::at<{i}>"
        if p.kind == "buffer":  # AIR says "air-buffer-no-alias"
            declared.append(f"agx_launch::argument<{kind}>::type __restrict p{i}")
            passed.append(f"agx_launch::argument<{kind}>::of(p{i})")
        elif p.kind == "builtin":
            at = next(text for name, text in POSITIONS.items() if re.search(rf"\b{name}\b", p.text))
            passed.append(f"agx_launch::position<{kind}>::of({at})")
        else:
            raise AgxError(f"{expression}: nothing here binds `{p.text}`")
    size = ", ".join(map(str, threads))
    return (
        f"\n__kernel __attribute__((reqd_work_group_size({size}))) void agx_kernel("
        f"{', '.join(declared)}) {{ {expression}({', '.join(passed)}); }}\n"
    )


def _constants(text: str, names: Mapping[str, tuple[int, str]], values: Mapping[str, str]) -> str:
    for name, (_, kind) in names.items():
        declaration = (
            rf'extern "C" {{ extern __constant {re.escape(kind)} {name}; '
            rf"extern __constant bool {name}__defined; }}"
        )
        value = values.get(name)
        text = re.sub(
            declaration,
            f"constexpr __constant {kind} {name} = {value or '0'}; "
            f"constexpr __constant bool {name}__defined = {'true' if value else 'false'};",
            text,
        )
    return text


def _place_threadgroup_memory(ir: str) -> str:
    """Workgroup variables in place of the calls: OpenCL allows them in kernels' own scope only."""
    ir = re.sub(r"^target datalayout.*\ntarget triple.*", LAYOUT, ir, flags=re.M)
    ir = re.sub(r"^!opencl\.cxx\.version.*$", "", ir, flags=re.M)  # llvm-spirv: builtins of C only
    variables: dict[str, tuple[str, int]] = {}

    def variable(match: re.Match[str]) -> str:
        site, size, align = match.group(2, 3, 4)
        variables[name := f"@agx_threadgroup_{site}_{size}"] = (size, max(16, int(align)))
        return f"{match.group(1)}getelementptr i8, ptr addrspace(3) {name}, i64 0"

    number = r"i32[^,\n]* (\d+)"
    call = rf"call [^@\n]*@__msl_threadgroup_slot\({number}, {number}, {number}\)[^\n]*"
    ir = re.sub(rf"(= ){call}", variable, ir)
    for name, (size, align) in variables.items():
        ir += f"\n{name} = internal addrspace(3) global [{size} x i8] undef, align {align}\n"
    return ir


_BFLOAT = """
define internal float @agx_bf_ext(i16 %x) alwaysinline {
  %a = zext i16 %x to i32
  %b = shl i32 %a, 16
  %c = bitcast i32 %b to float
  ret float %c
}
define internal i16 @agx_bf_trunc(float %x) alwaysinline {
  %a = bitcast float %x to i32
  %b = lshr i32 %a, 16
  %c = and i32 %b, 1
  %d = add i32 %c, 32767
  %e = add i32 %a, %d
  %f = lshr i32 %e, 16
  %g = trunc i32 %f to i16
  ret i16 %g
}
"""


def lower_bfloat(ir: str) -> str:
    """bfloat becomes i16; only conversions to and from float are left of it, and those are code.

    llvm-spirv would take bfloat for half, without a word.
    """
    if not re.search(r"\bbfloat\b", ir):
        return ir
    value = r"(%[\w.]+|%\"[^\"]*\"|0xR[0-9A-F]{4})"
    ir = re.sub(
        rf"= fpext (?:\w+ )*?bfloat {value} to float", r"= call float @agx_bf_ext(i16 \1)", ir
    )
    ir = re.sub(
        r"= fptrunc (?:\w+ )*?float (\S+) to bfloat", r"= call i16 @agx_bf_trunc(float \1)", ir
    )
    arithmetic = r"fadd|fmul|fsub|fdiv|fcmp|fneg|fptrunc|fpext|.itofp|fpto.i"
    if left := re.search(rf".*= (?:{arithmetic})\b.*\bbfloat\b.*", ir):
        raise AgxError(f"arithmetic of bfloat: {left.group()}")
    ir = re.sub(r"0xR([0-9A-F]{4})", lambda m: str(int(m.group(1), 16)), ir)
    # flags of floating-point results that are integers now
    flags = r"(?: (?:contract|nnan|ninf|nsz|arcp|afn|reassoc|fast))+"
    ir = re.sub(rf"= ((?:tail |notail )?call|phi|select){flags}(?= (?:\w+ )*bfloat\b)", r"= \1", ir)
    ir = re.sub(rf"= select{flags}(?= i1 [^,]*, bfloat\b)", "= select", ir)
    return re.sub(r"\bbfloat\b", "i16", ir) + _BFLOAT

"""The lint rejects planted violations by name, and takes good Metal and MLX's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .build import ROOT
from .emulator import needs_emulator
from .lint import lint, main
from .mlx_headers import INCLUDE, QUANTIZED, SDPA_VECTOR

pytestmark = needs_emulator

HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"
KERNEL = (
    "kernel void k(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],\n"
    "    uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]]) {\n"
)

GOOD = {
    "plain": KERNEL + "y[i] = x[i]; }",
    "helper": "static float f(device const float* p, thread float& a) { a += p[0]; return a; }\n"
    + KERNEL
    + "float a = 0; y[i] = f(x, a); }",
    "auto pointer": KERNEL + "auto p = x + i; device float* q = y; q[i] = *p; }",
    "array parameter": "float g(thread const float (&a)[4]) { return a[0]; }\n"
    + KERNEL
    + "float a[4] = {1, 2, 3, 4}; y[i] = g(a); }",
    "const thread reference": "float g(const thread float& a) { return a; }\n"
    + KERNEL
    + "y[i] = g(x[i]) + g(1.0f); }",
    "method": "struct S { float v; float get() const { return v; } };\n"
    + KERNEL
    + "S s; s.v = x[i]; y[i] = s.get(); }",
    "device struct": "struct S { float a, b; };\nkernel void k(device const S* x [[buffer(0)]], "
    "device S* y [[buffer(1)]], uint i [[thread_position_in_grid]]) "
    "{ S s = x[i]; s.a += 1; y[i] = s; }",
    "vectors": KERNEL
    + "float4 v = float4(x[i]); v.xy = v.zw; half4 h = half4(v); int4 n = int4(v); "
    "y[i] = float(h.x) + dot(v, float4(n)); }",
    "double literal": KERNEL + "y[i] = x[i] * 2.0; }",
    "constant table": "constant float tab[4] = {1, 2, 3, 4};\n" + KERNEL + "y[i] = tab[i & 3]; }",
    "if constexpr": "template <int N> float f() { if constexpr (N > 1) return 1; else return 2; }\n"
    + KERNEL
    + "y[i] = f<3>(); }",
    "lambda": KERNEL + "auto f = [=](float a) { return a * 2; }; y[i] = f(x[i]); }",
    "template": "template <typename T, int N> METAL_FUNC T f(const device T* p) "
    "{ T s = 0; for (int j = 0; j < N; j++) s += p[j]; return s; }\n"
    + KERNEL
    + "y[i] = f<float, 4>(x); }",
    "explicit bfloat": KERNEL + "bfloat b = bfloat(x[i]); y[i] = float(b); }",
    "threadgroup array": KERNEL
    + "threadgroup float a[32]; a[t] = x[i]; "
    + "threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = a[t ^ 1]; }",
    "simdgroup": KERNEL + "y[i] = simd_sum(x[i]) + float(simd_shuffle_xor(ushort(t), 1)); }",
    "opencl words": KERNEL + "float local = x[i], global = 2; y[i] = local * global; }",
}

# name: (code, what the report says)
BAD = {
    "kernel pointer": (
        "kernel void k(float* x [[buffer(0)]], uint i [[thread_position_in_grid]]) { x[i] = 0; }",
        "no attribute binds|address space",
    ),
    "helper pointer": (
        "float f(const float* p) { return p[0]; }\n" + KERNEL + "y[i] = f(x); }",
        "`p` of type .* has no address space",
    ),
    "helper reference": (
        "void f(float& p) { p = 1; }\n" + KERNEL + "float a; f(a); y[i] = a; }",
        "`p` of type .* has no address space",
    ),
    "local pointer": (
        KERNEL + "float a = 1; float* p = &a; y[i] = *p; }",
        "`p` of type .* has no address space",
    ),
    "pointer member": (
        "struct S { const float* p; };\n" + KERNEL + "S s; s.p = x; y[i] = s.p[i]; }",
        "`p` of type .* has no address space",
    ),
    "device as thread": (
        "float f(thread const float* p) { return p[0]; }\n" + KERNEL + "y[i] = f(x); }",
        "no matching function",
    ),
    "threadgroup as device": (
        KERNEL + "threadgroup float a[32]; device float* p = a; y[i] = *p; }",
        "device float",
    ),
    "member of another space": (
        "struct S { thread float* p; };\n" + KERNEL + "S s; s.p = y; }",
        "thread float",
    ),
    "dropped const": (KERNEL + "device float* p = x; p[i] = 0; }", "discards qualifiers|const"),
    "write to constant": (
        "kernel void k(constant float* x [[buffer(0)]], uint i [[thread_position_in_grid]]) "
        "{ x[i] = 0; }",
        "read-only|const",
    ),
    "std header": ("#include <vector>\n" + KERNEL + "}", "vector.* not found"),
    "std::min": (KERNEL + "y[i] = std::min(x[i], 1.0f); }", "undeclared identifier 'std'"),
    "double": (KERNEL + "double d = x[i]; y[i] = d; }", "double"),
    "long double": (KERNEL + "long double d = 1; }", "double"),
    "recursion": (
        "float f(int n) { return n ? f(n - 1) : 0; }\n" + KERNEL + "y[i] = f(3); }",
        "recursion in f",
    ),
    "mutual recursion": (
        "float g(int n);\nfloat f(int n) { return n ? g(n - 1) : 0; }\n"
        "float g(int n) { return f(n); }\n" + KERNEL + "y[i] = f(3); }",
        "recursion in [fg]",
    ),
    "throw": (KERNEL + "if (i) throw 1; }", "throw|exceptions"),
    "try": (KERNEL + "try { y[i] = 0; } catch (...) {} }", "try|exceptions"),
    "new": (KERNEL + "thread float* p = new float[4]; y[i] = p[0]; }", "new"),
    "virtual": ("struct S { virtual float f() { return 1; } };\n" + KERNEL + "}", "virtual"),
    "virtual destructor": ("struct A { virtual ~A() {} };\n" + KERNEL + "}", "virtual"),
    "typeid": (KERNEL + "y[i] = typeid(float) == typeid(int); }", "typeid"),
    "goto": (KERNEL + "goto e; e: y[i] = 0; }", "`goto` is not Metal"),
    "asm": (KERNEL + 'asm("nop"); }', "`asm` is not Metal"),
    "thread_local": (KERNEL + "thread_local int a; }", "thread_local"),
    "static local": (KERNEL + "static int a = 0; a++; y[i] = a; }", "static|constant"),
    "function pointer": (
        "float g(float a) { return a; }\n" + KERNEL + "float (*f)(float) = g; y[i] = f(x[i]); }",
        "pointers to functions",
    ),
    "concept": (
        "template <class T> concept C = true; template <C T> T f(T a) { return a; }\n"
        + KERNEL
        + "y[i] = f(x[i]); }",
        "concept|unknown type",
    ),
    "auto parameter": ("auto f(auto a) { return a; }\n" + KERNEL + "y[i] = f(x[i]); }", "auto"),
    "designated initialiser": (
        "struct S { int a, b; };\n" + KERNEL + "S s = {.a = 1, .b = 2}; y[i] = s.a; }",
        "designated initializers",
    ),
    "spaceship": (KERNEL + "y[i] = (i <=> t) < 0; }", "<=>|expected expression"),
    "template lambda": (
        KERNEL + "auto f = []<class T>(T a) { return a; }; y[i] = f(x[i]); }",
        "lambda",
    ),
    "global variable": ("int counter = 0;\n" + KERNEL + "}", "program scope|constant"),
    "printf": (KERNEL + 'printf("%d", i); }', "printf"),
    "implicit bfloat": (KERNEL + "bfloat b = x[i]; y[i] = float(b); }", "implicit conversion"),
    "half4 of float4": (KERNEL + "half4 h = float4(x[i]); y[i] = h.x; }", "half4"),
    "int4 of float4": (KERNEL + "int4 h = float4(x[i]); y[i] = h.x; }", "int4"),
    "float3 of float4": (KERNEL + "float3 v = float4(1); y[i] = v.x; }", "float3"),
    "max of int and uint": (KERNEL + "y[i] = max(int(i), t); }", "ambiguous"),
    "max of bfloat": (
        KERNEL + "y[i] = float(max(bfloat(x[i]), bfloat(1))); }",
        "ambiguous|no match",
    ),
    "simd_sum of bfloat": (KERNEL + "y[i] = float(simd_sum(bfloat(x[i]))); }", "bfloat: use float"),
    "threadgroup in a helper": (
        "float f(uint t) { threadgroup float a[32]; a[t] = 1; return a[t]; }\n"
        + KERNEL
        + "y[i] = f(t); }",
        "threadgroup variable `a` declared outside a kernel",
    ),
    "misspelt attribute": (
        "kernel void k(device float* y [[buffer(0)]], uint i [[thread_position_in_gird]]) "
        "{ y[i] = 0; }",
        "no attribute binds `uint i",
    ),
    "no attribute": (
        "kernel void k(device float* y, uint i [[thread_position_in_grid]]) { y[i] = 0; }",
        "has no .*buffer",
    ),
    "same index twice": (
        "kernel void k(device float* y [[buffer(0)]], device float* z [[buffer(0)]]) { y[0] = 0; }",
        "has the index of",
    ),
    "buffer 31": ("kernel void k(device float* y [[buffer(31)]]) { y[0] = 0; }", "end at 30"),
    "mixed positions": (
        "kernel void k(device float* y [[buffer(0)]], uint2 i [[thread_position_in_grid]], "
        "uint3 n [[threads_per_grid]]) { y[i.x] = n.x; }",
        "different lengths",
    ),
    "variable length array": (
        KERNEL + "float a[t]; y[i] = a[0]; }",
        "array size is not a constant|variable length",
    ),
    "unknown function": (KERNEL + "y[i] = metal::frobnicate(x[i]); }", "frobnicate"),
    "uninitialised": (KERNEL + "float s; s += x[i]; y[i] = s; }", "uninitialized"),
    "no return": (
        "float f(float a) { if (a > 0) return a; }\n" + KERNEL + "y[i] = f(x[i]); }",
        "return",
    ),
    "not ascii": (KERNEL + "y[i] = x[i]; /* fine here */ float größe = 0; }", "ASCII"),
}


def problems(tmp_path: Path, code: str, **options: list[str]) -> list[str]:
    path = tmp_path / "snippet.metal"
    path.write_text(HEADER + code + "\n")
    return lint(path, **options)


@pytest.mark.parametrize("name", GOOD)
def test_good_metal_is_accepted(tmp_path: Path, name: str) -> None:
    assert problems(tmp_path, GOOD[name]) == []


@pytest.mark.parametrize("name", BAD)
def test_violations_are_rejected(tmp_path: Path, name: str) -> None:
    code, expected = BAD[name]
    found = "\n".join(problems(tmp_path, code))
    assert found
    assert re.search(expected, found), found
    assert "snippet.metal" in found


def test_templates_are_judged_where_they_are_instantiated(tmp_path: Path) -> None:
    code = (
        "template <typename T> kernel void k(device T* y [[buffer(0)]]) {y[0] = max(*y, 1.0h);}\n"
    )
    assert problems(tmp_path, code) == []
    assert problems(tmp_path, code, kernels=["k<half>"]) == []
    assert "ambiguous" in "\n".join(problems(tmp_path, code, kernels=["k<float>"]))


@pytest.mark.parametrize(
    ("source", "kernels"),
    [
        (
            QUANTIZED,
            ["affine_qmv_fast<half, 64, 4, false>", "affine_qmm_t<half, 64, 4, true, false>"],
        ),
        (SDPA_VECTOR, ["sdpa_vector<half, 128, 128>", "sdpa_vector_2pass_1<half, 128, 128>"]),
    ],
    ids=["quantized", "sdpa"],
)
def test_mlx_has_no_error(tmp_path: Path, source: str, kernels: list[str]) -> None:
    path = tmp_path / "mlx.metal"
    path.write_text(source)
    found = lint(path, kernels=kernels, include=[INCLUDE])
    # Apple only warns where MLX leaves out the space of a reference to a pointer, and numbers
    # arguments that have no attribute; we ask for both.
    assert [p for p in found if not re.search(r"has no (address space|\[\[buffer)", p)] == []


def test_the_library_is_in_its_namespace(tmp_path: Path) -> None:
    path = tmp_path / "snippet.metal"
    code = "kernel void k(device float* y [[buffer(0)]]) { y[0] = metal::exp(%s(y[0])); }\n"
    path.write_text("#include <metal_stdlib>\n" + code % "metal::exp")
    assert lint(path) == []
    path.write_text("#include <metal_stdlib>\n" + code % "exp")
    assert "use of undeclared identifier 'exp'" in "\n".join(lint(path))


@pytest.mark.parametrize("path", sorted((ROOT / "metal").glob("*.metal")), ids=lambda p: p.name)
def test_our_kernels_are_clean(path: Path) -> None:
    assert lint(path) == []


def test_main_reports_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.metal", tmp_path / "bad.metal"
    good.write_text(HEADER + GOOD["plain"] + "\n")
    bad.write_text(HEADER + BAD["goto"][0] + "\n")
    assert main([str(good)]) == 0
    assert main([str(good), str(bad)]) == 1
    assert f"{bad}:5: `goto` is not Metal" in capsys.readouterr().out

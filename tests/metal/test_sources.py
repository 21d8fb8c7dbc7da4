"""The texts that Metal will compile: strict lint, ASCII, nothing left to include."""

from __future__ import annotations

import re

import pytest

from tests.msl.emulator import Module, needs_emulator
from tests.msl.lint import lint

from .launcher import METAL, plan_quantized_matmul

SOURCES = sorted(METAL.glob("*.metal"))
# One of each kernel, so that the bodies of the templates are linted too.
KERNELS = {
    "qmv.metal": [
        *(f"qmv<{x}, {s}, 380, 3, 4, 8, 2, true>" for x, s in (("half", "bfloat"), ("float",) * 2)),
        "qmv_mixed<bfloat, bfloat, 380, 1, 4, 16, 2, false>",
        "qmv_gather<half, half, 380, 4, 8, 2>",
    ],
    "qmm.metal": [
        "qmm<half, half, 380, 64, 64, true, false>",
        "qmm<half, half, 380, 32, 32, true, true>",
        "qmm<bfloat, float, 380, 32, 64, false, false>",
        "qmm_mixed<bfloat, bfloat, 380, 64, 32, false>",
        "qmm_mixed<half, half, 380, 64, 32, true>",
        "qmm_merge<half, bfloat>",
        "qmm_gather<half, half, 380, 32, 64>",
    ],
    "kl_divergence.metal": [
        "kl_ranges<float, 0, bfloat, 3>",
        "kl_ranges<half, 4, float, 0>",
        "kl_merge<float>",
    ],
    "quantize.metal": [
        *(f"quantize_{how}<bfloat, 3, 32>" for how in ("minmax", "search")),
        *(f"quantize_{how}<float, 8, 128>" for how in ("minmax", "search")),
    ],
    "attention.metal": [
        "attention<half, 80, 80, 3, 32, 8, 64, 1, false, true>",
        "attention<bfloat, 128, 64, 16, 32, 5, 64, 4, true, false>",
        "attention<float, 96, 256, 6, 64, 16, 32, 2, false, true>",
        *(f"attention_merge<{t}, 80>" for t in ("half", "bfloat")),
    ],
    "attention_vector.metal": [
        "attention_vector<half, 80, 80, 3, 32, 8, 64, 1, true, false, true>",
        "attention_vector<bfloat, 128, 64, 16, 32, 5, 64, 4, false, true, false>",
        "attention_vector<float, 8, 256, 6, 32, 4, 64, 3, true, false, true>",
    ],
    "quantize_kv.metal": ["quantize_kv<bfloat, 3, 32>", "quantize_kv<float, 8, 64>"],
    "low_rank.metal": [f"low_rank_{way}<{t}>" for way in ("down", "up") for t in ("half", "float")],
    "copy.metal": [f"copy_rows<{t}>" for t in ("uchar", "ushort", "uint", "ulong")],
}


@needs_emulator
@pytest.mark.parametrize("name", KERNELS)
def test_strict_lint(name: str) -> None:
    assert lint(METAL / name, KERNELS[name]) == []


@pytest.mark.parametrize("path", [*SOURCES, *METAL.glob("*.h")], ids=lambda p: p.name)
def test_ascii_and_own_headers_only(path) -> None:  # type: ignore[no-untyped-def]
    text = path.read_bytes()
    assert text.isascii()
    for system, own in re.findall(r'#include (?:<(\S+)>|"(\S+)")', text.decode()):
        assert system in ("", "metal_stdlib", "metal_simdgroup_matrix", "cstdint")
        assert not own or (METAL / own).exists()


@needs_emulator
@pytest.mark.parametrize(("rows", "transpose"), [(1, True), (6, True), (40, True), (3, False)])
def test_the_text_given_to_metal(rows: int, transpose: bool) -> None:
    """What the encoder hands over: one flattened text whose instantiation has the planned name."""
    plan = plan_quantized_matmul(rows, 64, [(64, (64, 4))], transpose=transpose)
    (launch,) = plan["launches"]
    text = launch["library_source"]
    assert text.isascii()
    assert '#include "' not in text
    assert text.rstrip().endswith(f"{launch['instantiation']};")
    assert launch["kernel"] in launch["library_name"]
    assert Module(source=text, kernels=[launch["kernel"]]).kernels == (launch["kernel"],)


def test_a_library_is_named_after_its_text() -> None:
    """MLX keeps libraries by name, so another text or another kernel must have another name."""
    names = set()
    for rows in (1, 2, 40):
        (launch,) = plan_quantized_matmul(rows, 64, [(64, (64, 4))])["launches"]
        names.add(launch["library_name"])
    assert len(names) == 3

"""Packed weights of others against brute force, value by value, and refusals of one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from optiq.errors import SourceError
from optiq.quantize.export import export
from optiq.sources import load, resolve
from optiq.sources.packed import Packing, unpacked
from tests.families.table import family_folder
from tests.planned import uniform
from tests.tiny import tiny_folder

TOKENS = mx.array([[1, 5, 9, 200, 17, 33, 4]])
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
GROUP = 32
Packer = Callable[[np.ndarray, np.random.Generator], tuple[dict[str, np.ndarray], np.ndarray]]


def e4m3(code: int) -> float:
    """A byte as a float of 4 and 3 bits, without infinities."""
    sign, exponent, mantissa = code >> 7, (code >> 3) & 15, code & 7
    size = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def bf16(values: np.ndarray) -> np.ndarray:
    return np.array(mx.array(values, mx.float32).astype(mx.bfloat16).astype(mx.float32))


def fp8(shape: tuple[int, ...], rng: np.random.Generator, scales: str) -> Any:
    """Codes, what has the scales, and the values; blocks of 32 by 48, which do not divide."""
    rows, columns = shape
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[(codes & 127) == 127] = 0  # NaN
    plain = np.array([[e4m3(int(c)) for c in row] for row in codes])
    if scales == "blocks":
        s = rng.uniform(0.001, 0.003, (-(-rows // 32), -(-columns // 48))).astype(np.float32)
        for i in range(rows):
            for j in range(columns):
                plain[i, j] *= s[i // 32, j // 48]
    elif scales == "rows":
        s = rng.uniform(0.001, 0.003, (rows, 1)).astype(np.float32)
        plain *= s
    else:
        s = np.array(0.002, np.float32)
        plain *= s
    return codes, s, bf16(plain)


def awq(shape: tuple[int, ...], rng: np.random.Generator) -> Any:
    rows, columns = shape
    order = (0, 4, 1, 5, 2, 6, 3, 7)
    q = rng.integers(0, 16, (columns, rows))
    zeros = rng.integers(0, 16, (columns // GROUP, rows))
    scales = rng.uniform(0.01, 0.03, zeros.shape).astype(np.float16)
    plain = np.zeros(shape)
    for o in range(rows):
        for i in range(columns):
            plain[o, i] = (q[i, o] - zeros[i // GROUP, o]) * float(scales[i // GROUP, o])

    def pack(values: np.ndarray) -> np.ndarray:
        words = np.zeros((len(values), rows // 8), np.uint32)
        for place, bits in enumerate(order):
            words |= (values[:, place::8] << (4 * bits)).astype(np.uint32)
        return words.view(np.int32)

    return {"qweight": pack(q), "qzeros": pack(zeros), "scales": scales}, plain


def gptq(shape: tuple[int, ...], rng: np.random.Generator, bits: int, order: str) -> Any:
    rows, columns = shape
    q = rng.integers(0, 2**bits, (columns, rows))
    zeros = rng.integers(1, 2**bits, (columns // GROUP, rows))
    scales = rng.uniform(0.01, 0.03, zeros.shape).astype(np.float16)
    groups = np.arange(columns) // GROUP
    if order == "other":
        groups = rng.permutation(groups)
    plain = np.zeros(shape)
    for o in range(rows):
        for i in range(columns):
            plain[o, i] = (q[i, o] - zeros[groups[i], o]) * float(scales[groups[i], o])
    per = 32 // bits
    packed = np.zeros((columns // per, rows), np.uint32)
    stored = np.zeros((len(zeros), rows // per), np.uint32)
    for k in range(per):
        packed |= (q[k::per] << (bits * k)).astype(np.uint32)
        stored |= ((zeros[:, k::per] - 1) << (bits * k)).astype(np.uint32)
    parts = {"qweight": packed.view(np.int32), "qzeros": stored.view(np.int32), "scales": scales}
    return parts | {"g_idx": groups.astype(np.int32)} if order != "none" else parts, plain


def compressed(shape: tuple[int, ...], rng: np.random.Generator, bits: int, zero: bool) -> Any:
    rows, columns = shape
    q = rng.integers(0, 2**bits, shape)
    scales = rng.uniform(0.01, 0.03, (rows, columns // GROUP)).astype(np.float32)
    zeros = (
        rng.integers(0, 2**bits, scales.shape) if zero else np.full(scales.shape, 2 ** (bits - 1))
    )
    plain = np.zeros(shape)
    for o in range(rows):
        for i in range(columns):
            plain[o, i] = (q[o, i] - zeros[o, i // GROUP]) * float(scales[o, i // GROUP])
    per = 32 // bits
    words = sum((q[:, k::per] << (bits * k)).astype(np.uint32) for k in range(per))
    parts = {
        "weight_packed": np.asarray(words, np.uint32).view(np.int32),
        "weight_scale": scales,
        "weight_shape": np.array(shape, np.int64),
    }
    if zero:
        stored = sum((zeros[k::per] << (bits * k)).astype(np.uint32) for k in range(per))
        parts["weight_zero_point"] = np.asarray(stored, np.uint32).view(np.int32)
    return parts, plain


INT: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, awq),
    "gptq": ({"quant_method": "gptq", "bits": 4}, lambda s, r: gptq(s, r, 4, "none")),
    "gptq 8 bits": ({"quant_method": "gptq", "bits": 8}, lambda s, r: gptq(s, r, 8, "plain")),
    "gptq in another order": (
        {"quant_method": "gptq", "bits": 4, "desc_act": True},
        lambda s, r: gptq(s, r, 4, "other"),
    ),
    "compressed int4": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        lambda s, r: compressed(s, r, 4, False),
    ),
    "compressed int4 with zeros": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        lambda s, r: compressed(s, r, 4, True),
    ),
    "compressed int8": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        lambda s, r: compressed(s, r, 8, False),
    ),
}


def packed_folder(parent: Path, settings: dict[str, Any], pack: Callable[..., Any]) -> Any:
    """A tiny llama with its blocks' matrices packed, and the same with what they stand for."""
    folders = []
    for name in ("packed", "plain"):
        folders.append(tiny_folder(parent, dtype="bfloat16", name=name))
    rng = np.random.default_rng(0)
    file = folders[0] / "model.safetensors"
    weights: Any = mx.load(str(file))
    plain = dict(weights)
    for name in list(weights):
        if name.endswith("proj.weight"):
            parts, values = pack(weights.pop(name).shape, rng)
            base = name.removesuffix("weight")
            weights |= {base + part: mx.array(array) for part, array in parts.items()}
            plain[name] = mx.array(values, mx.float32).astype(mx.bfloat16)
    mx.save_safetensors(str(file), weights)
    mx.save_safetensors(str(folders[1] / "model.safetensors"), plain)
    config = json.loads((folders[0] / "config.json").read_text())
    (folders[0] / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folders


@pytest.mark.parametrize("kind", INT)
def test_integers_are_the_values_they_stand_for(tmp_path: Path, kind: str) -> None:
    """Value by value: two bfloat16 apart at most, where scales are float16."""
    settings, pack = INT[kind]
    packed, plain = packed_folder(tmp_path, settings, pack)
    got, want = load(resolve(str(packed))).model, load_model(plain)[0]
    for name in ("q_proj", "o_proj"):
        a, b = (m.layers[1].self_attn[name].weight.astype(mx.float32) for m in (got, want))
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=2**-7)
    assert got.layers[0].mlp.up_proj.weight.dtype == mx.bfloat16


def test_a_packed_model_is_exported_as_any_other(tmp_path: Path) -> None:
    settings, pack = INT["gptq"]
    packed, plain = packed_folder(tmp_path, settings, pack)
    source = resolve(str(packed))
    export(source, uniform(source), tmp_path / "out")
    other = resolve(str(plain))
    export(other, uniform(other), tmp_path / "other")
    got, want = (load_model(tmp_path / name)[0](TOKENS) for name in ("out", "other"))
    assert np.abs(np.array((got - want).astype(mx.float32))).max() < 0.5  # other roundings
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == config["quantization"]


@pytest.mark.parametrize("scales", ["blocks", "rows", "one"])
@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
def test_fp8_in_blocks_rows_and_whole(scales: str, name: str) -> None:
    rng = np.random.default_rng(1)
    codes, s, want = fp8((70, 100), rng, scales)
    how = Packing("fp8", {"weight_block_size": [32, 48]})
    weights = {"a.weight": mx.array(codes), f"a.{name}": mx.array(s), "a.input_scale": mx.ones(1)}
    found = unpacked(weights, how)
    assert found.keys() == {"a.weight"}
    np.testing.assert_array_equal(np.array(found["a.weight"].astype(mx.float32)), want)


def test_scales_of_8_bits_are_powers_of_two() -> None:
    codes = mx.array([[0x38, 0xB8]], mx.uint8)  # 1 and -1
    how = Packing("fp8", {"weight_block_size": [1, 1]})
    weights = {"a.weight": codes, "a.weight_scale_inv": mx.array([[128, 125]], mx.uint8)}
    assert unpacked(weights, how)["a.weight"].tolist() == [[2.0, -0.25]]


def test_mxfp4_of_gpt_oss(tmp_path: Path) -> None:
    """The experts' two matrices are interleaved by rows in the files."""
    folder = family_folder(tmp_path, "gpt_oss", dtype="bfloat16")
    file = folder / "model.safetensors"
    weights: Any = mx.load(str(file))
    rng = np.random.default_rng(2)
    wanted: dict[str, np.ndarray] = {}
    for name in [n for n in weights if n.endswith("experts.gate_proj.weight")]:
        base = name.removesuffix("gate_proj.weight")
        for file_name, parts in (
            ("gate_up_proj", ("gate_proj", "up_proj")),
            ("down_proj", ("down_proj",)),
        ):
            shapes = [weights.pop(f"{base}{part}.weight").shape for part in parts]
            biases = [weights.pop(f"{base}{part}.bias") for part in parts]
            experts, rows, columns = shapes[0]
            rows *= len(parts)
            blocks = rng.integers(0, 256, (experts, rows, columns // 32, 16)).astype(np.uint8)
            scales = rng.integers(118, 126, blocks.shape[:-1]).astype(np.uint8)
            nibbles = np.stack([blocks & 15, blocks >> 4], -1).reshape(*blocks.shape[:-1], 32)
            signs = np.where(nibbles & 8, -1.0, 1.0)
            values = signs * np.array(E2M1)[nibbles & 7] * 2.0 ** (scales[..., None] - 127.0)
            plain = values.reshape(experts, rows, columns)
            for i, part in enumerate(parts):
                wanted[f"{base}{part}"] = plain[:, i :: len(parts)]
            bias = mx.stack(biases, -1).reshape(experts, -1)
            weights |= {
                f"{base}{file_name}_blocks": mx.array(blocks),
                f"{base}{file_name}_scales": mx.array(scales),
                f"{base}{file_name}_bias": bias,
            }
    mx.save_safetensors(str(file), weights)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    model = load(resolve(str(folder))).model
    modules = dict(model.named_modules())
    assert wanted
    for path, values in wanted.items():
        got = modules[path].weight.astype(mx.float32)
        np.testing.assert_array_equal(np.array(got), values)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"quant_method": "awq", "version": "marlin"}, "in the layout 'marlin', and only gemm"),
        ({"quant_method": "awq", "bits": 8}, "in 8 bits, and only 4 are read"),
        ({"quant_method": "gptq", "bits": 3}, "in 3 bits, and only 2, 4 and 8 are read"),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
            "in the format 'nvfp4-pack-quantized', which is not read",
        ),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], why: str
) -> None:
    packed, _ = packed_folder(tmp_path, settings, INT["gptq"][1])
    with pytest.raises(SourceError, match=why) as caught:
        load(resolve(str(packed)))
    assert "give the unquantized original model" in str(caught.value)
    assert "\n" not in str(caught.value)

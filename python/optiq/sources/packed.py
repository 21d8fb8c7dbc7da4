"""Weights that others have quantized, as plain numbers again: lazily, one when it is used.

`unpacked` takes the tensors of the files by name and gives those that the unquantized model's files
would have. What it does not know it refuses by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..errors import SourceError
from .config import Json, holders

Weights = dict[str, mx.array]

METHODS = ("fp8", "mxfp4", "awq", "gptq", "compressed-tensors")
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # of AWQ's values in a word, from the lowest bits
_GPTQ_BITS = (2, 4, 8)


@dataclass(frozen=True)
class Packing:
    """How config.json says that weights are packed."""

    method: str
    settings: Json

    def refused(self, why: str) -> SourceError:
        return SourceError(
            f"its weights are quantized ({self.method}) {why}; give the unquantized original model"
        )


def packing(config: Json) -> Packing | None:
    """The packing of a config.json, if it is one that `unpacked` reads."""
    for _, holder in holders(config):
        settings = holder.get("quantization_config")
        if isinstance(settings, dict) and settings.get("quant_method") in METHODS:
            return Packing(settings["quant_method"], settings)
    return None


def unpacked(weights: Mapping[str, mx.array], how: Packing) -> Weights:
    """The tensors with plain weights in place of packed ones. SourceError for a kind not known."""
    found = dict(weights)
    unpack: Callable[[Weights, Packing], None] = {
        "fp8": _fp8,
        "mxfp4": _mxfp4,
        "awq": _awq,
        "gptq": _gptq,
        "compressed-tensors": _compressed,
    }[how.method]
    unpack(found, how)
    return found


def _fp8(weights: Weights, how: Packing) -> None:
    """Codes of 8 bits with a scale for each block, row or matrix."""
    block = how.settings.get("weight_block_size") or (128, 128)
    for name in [n for n in weights if re.search(r"\.weight_scale(_inv)?$", n)]:
        scales = weights.pop(name)
        path = re.sub(r"_scale(_inv)?$", "", name)
        if path not in weights:
            raise how.refused(f"and {path} is missing")
        codes = weights[path]
        if codes.dtype != mx.uint8:
            raise how.refused(f"but {path} holds {codes.dtype}")
        weights[path] = _scaled(mx.from_fp8(codes, mx.float32), scales, block, how)
    for name in [n for n in weights if re.search(r"\.(input|activation|output)_scale$", n)]:
        del weights[name]


def _scaled(values: mx.array, scales: mx.array, block: Any, how: Packing) -> mx.array:
    """`values` times the scales of their blocks; scales of 8 bits are powers of two."""
    if scales.dtype == mx.uint8:
        scales = _powers(scales)
    if scales.ndim < 2:  # of the matrix, or of its rows
        scales = scales.reshape(-1, 1) if scales.size > 1 else scales.reshape(())
    elif scales.shape[-1] > 1 or scales.shape[-2] != values.shape[-2]:
        rows, columns = values.shape[-2:]
        whole = (-(-rows // block[0]), -(-columns // block[1]))
        if tuple(scales.shape[-2:]) != whole:
            raise how.refused(
                f"with scales of shape {tuple(scales.shape)}, where blocks of {tuple(block)} need "
                f"{whole}"
            )
        scales = mx.repeat(mx.repeat(scales, block[0], -2), block[1], -1)
        scales = scales[..., :rows, :columns]
    return (values * scales.astype(mx.float32)).astype(mx.bfloat16)


def _powers(codes: mx.array) -> mx.array:
    return mx.power(2.0, codes.astype(mx.float32) - 127)


def _mxfp4(weights: Weights, how: Packing) -> None:
    """gpt-oss: groups of 32 values of 4 bits in 16 bytes, the lower half of a byte first."""
    for name in [n for n in weights if n.endswith("_blocks")]:
        base = name.removesuffix("_blocks")
        blocks, scales = weights.pop(name), weights.pop(f"{base}_scales", None)
        if scales is None or blocks.shape[-1] != 16:
            raise how.refused(f"and {name} lacks its scales, or has other groups than of 32")
        codes = blocks.reshape(*blocks.shape[:-2], -1).view(mx.uint32)
        weights[f"{base}.weight"] = mx.dequantize(
            codes, scales, group_size=32, bits=4, mode="mxfp4", dtype=mx.bfloat16
        )


def _awq(weights: Weights, how: Packing) -> None:
    if how.settings.get("version", "gemm").lower() != "gemm":
        raise how.refused(f"in the layout {how.settings['version']!r}, and only gemm is read")
    if how.settings.get("bits", how.settings.get("w_bit", 4)) != 4:
        raise how.refused(f"in {how.settings.get('bits')} bits, and only 4 are read")
    order = mx.array(_ORDER)
    for base in [n.removesuffix("qweight") for n in weights if n.endswith(".qweight")]:
        codes = _values(weights.pop(f"{base}qweight"), 4, order)  # [in, out]
        scales = weights.pop(f"{base}scales")  # [groups, out]
        zeros = weights.pop(f"{base}qzeros", None)
        zero = mx.array(8.0) if zeros is None else _values(zeros, 4, order)
        group = codes.shape[0] // scales.shape[0]
        grouped = codes.reshape(-1, group, codes.shape[-1])
        plain = (grouped - mx.expand_dims(zero, -2 if zero.ndim else -1)) * scales[:, None]
        weights[f"{base}weight"] = plain.reshape(codes.shape).T.astype(scales.dtype)


def _gptq(weights: Weights, how: Packing) -> None:
    bits = how.settings.get("bits")
    if bits not in _GPTQ_BITS:
        raise how.refused(f"in {bits} bits, and only 2, 4 and 8 are read")
    # The first format of files stores zeros less one.
    less = 0.0 if how.settings.get("checkpoint_format") == "gptq_v2" else 1.0
    order = mx.arange(32 // bits)
    for base in [n.removesuffix("qweight") for n in weights if n.endswith(".qweight")]:
        packed = weights.pop(f"{base}qweight")  # [in / values of a word, out]
        codes = _values(packed.T, bits, order).T
        scales = weights.pop(f"{base}scales")
        zeros = _values(weights.pop(f"{base}qzeros"), bits, order) + less
        groups = weights.pop(f"{base}g_idx", None)
        if groups is None:
            groups = mx.arange(codes.shape[0]) // (codes.shape[0] // scales.shape[0])
        plain = (codes - zeros[groups]) * scales[groups]
        weights[f"{base}weight"] = plain.T.astype(scales.dtype)


def _compressed(weights: Weights, how: Packing) -> None:
    kind = how.settings.get("format")
    if kind in ("float-quantized", "naive-quantized") and not any(
        n.endswith("weight_packed") for n in weights
    ):
        if any(f"{n}_scale" in weights and a.dtype == mx.int8 for n, a in weights.items()):
            raise how.refused(f"in the format {kind!r} with integers, which is not read")
        _fp8(weights, how)
        return
    if kind != "pack-quantized":
        raise how.refused(f"in the format {kind!r}, which is not read")
    for base in [n.removesuffix("weight_packed") for n in weights if n.endswith("weight_packed")]:
        shape: Any = weights.pop(f"{base}weight_shape").tolist()
        rows, columns = shape
        packed, scales = weights.pop(f"{base}weight_packed"), weights.pop(f"{base}weight_scale")
        if f"{base}weight_g_idx" in weights:
            raise how.refused("with groups of columns in another order, which is not read")
        words = packed.shape[-1]
        bits = next((b for b in (4, 8) if -(-columns * b // 32) == words), None)
        if bits is None:
            raise how.refused(f"and {base}weight_packed has neither 4 nor 8 bits")
        codes = _values(packed, bits, mx.arange(32 // bits))[:, :columns]
        zero: mx.array = mx.array(float(1 << (bits - 1)))
        if (zeros := weights.pop(f"{base}weight_zero_point", None)) is not None:
            zero = _values(zeros.T, bits, mx.arange(32 // bits)).T[:rows][..., None]
        grouped = codes.reshape(rows, scales.shape[-1], -1)
        plain = (grouped - zero) * scales[..., None]
        weights[f"{base}weight"] = plain.reshape(rows, columns).astype(scales.dtype)


def _values(words: mx.array, bits: int, order: mx.array) -> mx.array:
    """The values in each word of 32 bits, as floats; the `order` is that of their places in it."""
    shifts = order.astype(mx.uint32) * bits
    values = (words.view(mx.uint32)[..., None] >> shifts) & ((1 << bits) - 1)
    return values.reshape(*words.shape[:-1], -1).astype(mx.float32)

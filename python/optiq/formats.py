"""A weight format is one value: how many bits, in which groups, in which mode.

Bytes are exact. An affine weight of ``n`` elements stores ``n * bits / 8`` bytes of codes and,
per group, one scale and one bias in the model's floating dtype (MLX ``mx.quantize``). An nvfp4
weight stores 4-bit floating point codes (e2m1) and, per 16 of them, one scale of a byte (e4m3).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from .errors import UsageError

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)

KV_BITS, KV_GROUPS = (3, 4, 5, 6, 8), (32, 64)  # of keys and values in a cache
NO_KV_FORMAT = "keys and values have no format {}; use 3, 4, 5, 6 or 8 bits in groups of 32 or 64"


def is_kv_format(bits: int, group_size: int) -> bool:
    """Whether there are keys and values of so many bits; where not, NO_KV_FORMAT says why."""
    return bits in KV_BITS and group_size in KV_GROUPS


@dataclass(frozen=True, order=True)
class Format:
    """`mode` is "affine" or "nvfp4", as in `mx.quantize`, or "dense" (not quantized)."""

    mode: str
    bits: int
    group_size: int = 0

    def __post_init__(self) -> None:
        if self.mode == "dense":
            if (self.bits, self.group_size) != (16, 0):
                raise UsageError("a dense format has bits=16 and group_size=0; use DENSE")
        elif self.mode == "affine":
            if self.bits not in AFFINE_BITS:
                raise UsageError(
                    f"{self.bits} bits is not an affine width; use one of {AFFINE_BITS}"
                )
            if self.group_size not in AFFINE_GROUPS:
                raise UsageError(
                    f"group size {self.group_size} is not supported; use one of {AFFINE_GROUPS}"
                )
        elif self.mode == "nvfp4":
            if (self.bits, self.group_size) != (4, 16):
                raise UsageError("an nvfp4 format has bits=4 and group_size=16; use NVFP4")
        else:
            raise UsageError(f"unknown format mode {self.mode!r}; use 'affine', 'nvfp4' or 'dense'")

    def __str__(self) -> str:
        if self.mode == "affine":
            return f"{self.bits}g{self.group_size}"
        return "bf16" if self.mode == "dense" else self.mode

    @classmethod
    def parse(cls, text: str) -> Format:
        """Read "4g64", "4" (group 64), "nvfp4" or "bf16" (in the model's own floating dtype)."""
        name = text.strip().lower()
        if name in ("bf16", "f16", "fp16", "16", "dense"):
            return DENSE
        if name == "nvfp4":
            return NVFP4
        match = re.fullmatch(r"(\d+)(?:g(\d+))?", name)
        if not match:
            raise UsageError(
                f"format {text!r} is not understood; write 4, 4g64, 4g128, nvfp4 or bf16"
            )
        return cls("affine", int(match[1]), int(match[2] or 64))

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a weight of `shape` (..., out, in) divides into whole groups."""
        if self.mode == "dense":
            return True
        # Stock nvfp4 works on 32 weights at a time and fails on a row that is half of that longer.
        return shape[-1] % max(32, self.group_size) == 0

    def nbytes(self, shape: Sequence[int], itemsize: int = 2) -> int:
        """Bytes on disk of codes, scales and biases; `itemsize` is the model's floating dtype's."""
        n = prod(shape)
        if self.mode == "dense":
            return n * itemsize
        per_group = 1 if self.mode == "nvfp4" else 2 * itemsize
        return n * self.bits // 8 + per_group * (n // self.group_size)

    def config(self) -> dict[str, Any] | bool:
        """The entry of mlx-lm's `config.json` `quantization` dict (`False` = not quantized)."""
        if self.mode == "dense":
            return False
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


DENSE = Format("dense", 16)
UNIFORM4 = Format("affine", 4, 64)
NVFP4 = Format("nvfp4", 4, 16)


def parse_menu(text: str | Iterable[str]) -> tuple[Format, ...]:
    """Read `--formats`: comma-separated widths or formats; a bare width stands for g64 and g128."""
    items = text.split(",") if isinstance(text, str) else list(text)
    menu: list[Format] = []
    for item in items:
        fmt = Format.parse(item)
        menu.append(fmt)
        if fmt.mode == "affine" and "g" not in item:
            menu.append(Format("affine", fmt.bits, 128))
    if not menu:
        raise UsageError("the list of formats is empty; write for example --formats 3,4,5,6,8,bf16")
    return tuple(sorted(set(menu)))


DEFAULT_MENU = parse_menu("3,4,5,6,8,bf16")

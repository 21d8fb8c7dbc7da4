"""Tiny models in mixed widths, and rows to train them on."""

from __future__ import annotations

import json
import random
from itertools import cycle
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from tests.tiny import tiny_folder

WIDTHS = (3, 4, 5, 6, 8)


def mixed_folder(parent: Path, kind: str = "llama", *, name: str = "mixed", **config: Any) -> Path:
    """A stock mlx-lm folder whose layers have 3, 4, 5, 6 and 8 bits in turn."""
    folder = tiny_folder(parent, kind, name=name, **config)
    model, full = load_model(folder)
    widths = cycle(WIDTHS)
    chosen: dict[str, dict[str, int]] = {}

    def width(path: str, layer: nn.Module) -> bool | dict[str, int]:
        if not hasattr(layer, "to_quantized"):
            return False
        chosen[path] = {"group_size": 32, "bits": next(widths)}
        return chosen[path]

    nn.quantize(model, class_predicate=width)
    full["quantization"] = {"group_size": 32, "bits": 4, **chosen}
    (folder / "config.json").write_text(json.dumps(full))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def rows(n: int, seed: int = 0) -> list[dict[str, str]]:
    """Sums, a few words each."""
    draw = random.Random(seed)
    found = []
    for _ in range(n):
        a, b = draw.randrange(10, 99), draw.randrange(10, 99)
        found.append({"prompt": f"What is {a} plus {b}?", "completion": f"It is {a + b}."})
    return found


def write_rows(folder: Path, train: list[Any], valid: list[Any] | None = None) -> Path:
    folder.mkdir()
    for name, of in (("train", train), ("valid", valid)):
        if of is not None:
            (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in of))
    return folder

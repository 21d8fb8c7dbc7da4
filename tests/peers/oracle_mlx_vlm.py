"""mlx-vlm, run by test_mlx_vlm.py: writes a multimodal model with random weights, or runs one.

A line in is ["make", folder, config, seed] or ["run", folder, file]. Running writes to `file` the
parameters outside the language model, and the logits of a text and of a text with a picture.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_vlm.utils import get_model_and_args, load_model, update_module_configs

TEXT = [1, 5, 9, 200, 17, 33, 4, 80]
IMAGE = 300
GAINS = ("layernorm.weight", "model.norm.weight", "q_norm.weight", "k_norm.weight")
PICTURE = 16  # pixels of a side; each of the models makes four tokens of it


def make(folder: Path, config: dict[str, Any], seed: int) -> None:
    """model.safetensors with the names and layouts that transformers writes."""
    arch, _ = get_model_and_args(config)
    settings = json.loads(json.dumps(config))
    held = update_module_configs(
        arch.ModelConfig.from_dict(settings),
        arch,
        settings,
        ["text", "vision", "projector", "audio"],
    )
    key = mx.random.key(seed)
    weights: dict[str, mx.array] = {}
    for name, old in tree_flatten(arch.Model(held).parameters()):
        key, use = mx.random.split(key)
        noise = mx.random.normal(old.shape, key=use)
        if old.ndim < 2:
            array = old + 0.1 * noise if mx.all(mx.isfinite(old)).item() else old
        else:
            array = noise * (0.3 if "embed" in name else old.shape[-1] ** -0.5)
        weights |= theirs(config["model_type"], name, array.astype(mx.float32))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})


def theirs(kind: str, name: str, array: mx.array) -> dict[str, mx.array]:
    if array.ndim > 2 and ("conv" in name or "patch_embed.proj" in name):
        array = array.moveaxis(-1, 1)
    if kind == "qwen2_5_vl":
        name = name.removeprefix("language_model.").replace("vision_tower.", "visual.")
        return {name: mx.contiguous(array)}
    if kind == "qwen3_5" and name.startswith("language_model.") and name.endswith(GAINS):
        array = array - 1
    if kind.startswith("qwen"):
        name = name.replace("vision_tower.", "model.visual.")
    elif not name.startswith("language_model."):
        name = f"model.{name}"
    name = name.replace("language_model.lm_head", "lm_head")
    name = name.replace("language_model.model.", "model.language_model.")
    name = name.replace("vision_model.", "")  # mistral3's has one more in mlx-vlm
    return {name: mx.contiguous(array)}


def run(folder: Path, file: str) -> None:
    model = load_model(folder)
    outside = {
        f"parameter:{name}": array
        for name, array in tree_flatten(model.parameters())
        if not name.startswith("language_model.")
    }
    text, seen = mx.array([TEXT]), mx.array([[*TEXT[:2], *[IMAGE] * 4, *TEXT[2:]]])
    arrays = {
        "text": model(text, pixel_values=None, mask=None).logits,
        "picture": model(seen, mask=mx.ones(seen.shape), **picture(model)).logits,
    }
    mx.savez(file, **outside, **arrays)


def picture(model: Any) -> dict[str, Any]:
    kind, config = model.config.model_type, model.config.vision_config
    pixels = mx.random.normal((1, 3, PICTURE, PICTURE), key=mx.random.key(1))
    if kind.startswith("qwen"):
        side = PICTURE // config.patch_size
        width = 3 * config.temporal_patch_size * config.patch_size**2
        patches = mx.random.normal((side * side, width), key=mx.random.key(1))
        return {"pixel_values": patches, "image_grid_thw": mx.array([[1, side, side]])}
    if kind == "mistral3":
        return {"pixel_values": pixels, "image_sizes": mx.array([[PICTURE, PICTURE]])}
    return {"pixel_values": pixels}


for line in sys.stdin:
    what, folder, *rest = json.loads(line)
    {"make": make, "run": run}[what](Path(folder), *rest)
    print(json.dumps(None))

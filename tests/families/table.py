"""Tiny models of mlx-lm's model files, at most a few hundred thousand parameters each.

families.json is the table: "common" holds values by the names of fields, "families" by name what
differs from them. "_type" is the model_type where the name is not, "text_config" what is nested in
the configuration of a multimodal model.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import MODEL_REMAPPING, _get_classes

from tests.tiny import BOS, EOS, PAD, write_tokenizer

_TABLE = json.loads((Path(__file__).parent / "families.json").read_text())
COMMON: dict[str, Any] = _TABLE["common"]
FAMILIES: dict[str, dict[str, Any]] = _TABLE["families"]
UNTRIED = {
    "olmo": "its file exits without the package ai2-olmo",
    "prism_hadamard_qwen35": "its files are quantized already",
}
_ARGUMENTS = ("ModelArgs", "TextModelArgs", "TextArgs", "TextConfig")


def config_of(name: str) -> dict[str, Any]:
    """config.json of a family: what its model file has fields for."""
    own = dict(FAMILIES[name])
    model_type = own.pop("_type", name)
    if text := own.pop("text_config", None):
        nested = {"text_config": _known({**COMMON, **text}, text), "tie_word_embeddings": False}
        return {"model_type": model_type, **nested, **own}
    return _known({"model_type": model_type, **COMMON, **own}, own)


def family_folder(parent: Path, name: str, dtype: str = "float32", seed: int = 0) -> Path:
    """A model of the family with random weights; their scales spread logits over a few nats."""
    folder = parent / name
    folder.mkdir(parents=True)
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "torch_dtype": dtype}
    config = {**config_of(name), **ids}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(json.loads(json.dumps(config))))
    weights = random_weights(model, getattr(mx, dtype), mx.random.key(seed))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def random_weights(model: nn.Module, dtype: mx.Dtype, key: mx.array) -> dict[str, mx.array]:
    """For each parameter of `model`; a looked-up one is larger, a gain is near what it was."""
    found: dict[str, mx.array] = {}
    for name, old in tree_flatten(model.parameters()):
        key, use = mx.random.split(key)
        if mx.issubdtype(old.dtype, mx.floating):
            looked_up = any(part in name for part in ("embed", "lm_head", "wte"))
            noise = mx.random.normal(old.shape, key=use)
            small = old.ndim == 1 or old.size < 600  # norms, gains, convolutions
            old = (
                old + 0.1 * noise
                if small
                else noise * (0.3 if looked_up else old.shape[-1] ** -0.5)
            )
            old = old.astype(dtype)
        found[name] = old
    return found


def _known(config: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    kept = {*(_fields(config["model_type"]) or config), *own, "model_type"}
    return {k: v for k, v in config.items() if k in kept and (k, v) != ("layer_types", None)}


def _fields(model_type: str) -> set[str]:
    """The names of a model file's arguments; none where it hands them on to another file."""
    ends = ("", "_text", "_moe_text")
    for name in (
        MODEL_REMAPPING.get(model_type.removesuffix(e), model_type.removesuffix(e)) for e in ends
    ):
        try:
            module = importlib.import_module(f"mlx_lm.models.{name}")
        except ImportError:
            continue
        for cls in filter(None, (getattr(module, name, None) for name in _ARGUMENTS)):
            fields = {field.name for field in dataclasses.fields(cls)}
            if "text_config" not in fields:
                return fields
    return set()

"""Adapters of PEFT, read and written.

PEFT transposes both matrices and gives each layer alpha / rank as its scale, or alpha / sqrt(rank)
(rsLoRA), where ranks and alphas may differ by layer. All of that is read, and DoRA of linear
layers. What changes more than linear layers and embeddings, or changes them in another way, is
refused by its name.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..base.files import write_json
from ..base.tensors import write_tensors
from ..errors import AdapterError
from ..models.roles import Role, role_of
from .adapter import CONFIG, Adapter, of_all, read_config, read_tensors
from .layers import LowRank

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Settings that make something else of an adapter, and what they are called.
_REFUSED = {
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "layer_replication": "layer replication",
    "target_parameters": "adapted parameters that are not layers",
    "modules_to_save": "modules that are trained as a whole",
    "trainable_token_indices": "trained tokens",
    "lora_bias": "biases of LoRA",
    "fan_in_fan_out": "transposed weights",
    "velora_config": "VeLoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow",
}

# What the two matrices are called, in linear layers and in embeddings, and DoRA's magnitudes.
_HALVES = {"A.weight": "A", "B.weight": "B", "embedding_A": "A", "embedding_B": "B"}
_MAGNITUDES = ("magnitude_vector", "magnitude_vector.weight")


def is_peft(folder: Path) -> bool:
    return "peft_type" in read_config(folder.expanduser())


def read(folder: Path) -> Adapter:
    """The adapter in a folder of PEFT. Raises AdapterError."""
    folder = folder.expanduser()
    config = read_config(folder)
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder} is of type {config.get('peft_type')!r}; LORA is supported")
    for key, name in _REFUSED.items():
        if config.get(key):
            raise AdapterError(f"{folder} uses {name} ({key}), which is not supported")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{folder} trains biases (bias={config['bias']!r}); use bias='none'")
    halves: dict[str, dict[str, mx.array]] = {}
    magnitudes: dict[str, mx.array] = {}
    tensors = read_tensors(folder / WEIGHTS)
    copies = any(".lora_embedding_" in name for name in tensors)
    for name, array in tensors.items():
        path, _, leaf = name.removeprefix(PREFIX).partition(".lora_")
        if leaf in _HALVES and array.ndim == 2:
            halves.setdefault(path, {})[_HALVES[leaf]] = array.astype(mx.float32)
        elif leaf in _MAGNITUDES and config.get("use_dora"):
            magnitudes[path] = array.astype(mx.float32)
        elif not (copies and _is_of_base(path)):
            raise AdapterError(
                f"{folder / WEIGHTS} holds {name}; only linear layers and embeddings are supported"
            )
    adapter = _adapter(folder, config, halves)
    dora = bool(config.get("use_dora"))
    return replace(adapter, magnitudes=of_all(folder / WEIGHTS, magnitudes, adapter.terms, dora))


def _adapter(
    folder: Path, config: Mapping[str, Any], halves: Mapping[str, Mapping[str, mx.array]]
) -> Adapter:
    scales = {}
    for path, pair in halves.items():
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise AdapterError(f"the two halves of {path} in {folder / WEIGHTS} do not fit")
        rank = pair["A"].shape[0]
        wanted = _of_layer(config.get("rank_pattern"), path, config.get("r"))
        if rank != wanted:
            raise AdapterError(
                f"{path} has rank {rank} in {folder / WEIGHTS}, {wanted} in {CONFIG}"
            )
        alpha = _of_layer(config.get("alpha_pattern"), path, config.get("lora_alpha"))
        if not isinstance(alpha, int | float):
            raise AdapterError(
                f"{folder / CONFIG} has no lora_alpha; give the folder that PEFT wrote"
            )
        scales[path] = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    if not scales:
        raise AdapterError(f"{folder / WEIGHTS} holds no layers")
    # Ours is one scale for all, so what a layer's own differs by goes into one of its matrices.
    scale = Counter(scales.values()).most_common(1)[0][0]
    terms = {
        path: LowRank(
            pair["A"].T,
            pair["B"].T if scales[path] == scale else pair["B"].T * (scales[path] / scale),
        )
        for path, pair in halves.items()
    }
    made = {"from": "PEFT", "base_model": config.get("base_model_name_or_path")}
    adapter = Adapter(terms, scale, made=made, invocation=_invocation(folder, config))
    adapter.check_finite()
    return adapter


def _is_of_base(name: str) -> bool:
    """Whether it is a weight that PEFT copies from the base where an embedding is adapted."""
    return role_of(name.removesuffix(".weight").removesuffix(".base_layer")) in (
        Role.EMBEDDING, Role.HEAD,
    )  # fmt: skip


def _invocation(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that activate the adapter; empty where it always works."""
    tokens = config.get("alora_invocation_tokens") or []
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise AdapterError(f"alora_invocation_tokens of {folder / CONFIG} are not tokens")
    return tuple(tokens)


def _of_layer(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """As PEFT does: the first key that is the path, or the end of it, as a regular expression."""
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", path):
            return value
    return default


def write(adapter: Adapter, out: Path) -> None:
    """Write a folder that `PeftModel.from_pretrained` reads. Raises ExportError."""
    ranks = adapter.ranks
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: rank for path, rank in ranks.items() if rank != usual}
    tensors = {}
    for path, (a, b) in adapter.terms.items():
        name = f"{PREFIX}{path}.lora_"
        of_embedding = role_of(path) is Role.EMBEDDING
        for half, matrix in (("A", a), ("B", b)):
            leaf = f"embedding_{half}" if of_embedding else f"{half}.weight"
            tensors[name + leaf] = mx.contiguous(matrix.T)
    for path, magnitude in adapter.magnitudes.items():
        tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = magnitude
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base.name if adapter.base else None,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": adapter.scale * usual,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(adapter.terms),
        "rank_pattern": others,
        "alpha_pattern": {path: adapter.scale * rank for path, rank in others.items()},
        "use_rslora": False,
        "use_dora": bool(adapter.magnitudes),
        "alora_invocation_tokens": list(adapter.invocation) or None,
    }
    write_tensors(out / WEIGHTS, tensors, {"format": "pt"})
    write_json(out / CONFIG, json.loads(json.dumps(config)))

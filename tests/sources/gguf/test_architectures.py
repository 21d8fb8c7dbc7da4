"""Further architectures: tiny models as GGUF files, with names from the gguf package's own map."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFWriter
from gguf.constants import MODEL_ARCH_NAMES

from optiq.sources.gguf.architectures import ARCHITECTURES
from tests.architectures import COMMON
from tests.sources.gguf.files import _add, _tokenizer_metadata, interleave
from tests.sources.gguf.test_convert import assert_refused, converted, stock_logits
from tests.tiny import random_weights, write_tokenizer

Json = dict[str, Any]
_PLAIN = {k: v for k, v in COMMON.items() if k != "head_dim"}

# By GGUF architecture: config.json, and the metadata that others do not have.
KINDS: dict[str, tuple[Json, Json]] = {
    "qwen3moe": (
        {**COMMON, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 32, "norm_topk_prob": True, "decoder_sparse_step": 1}
        | {"mlp_only_layers": []},
        {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32},
    ),
    "granite": (
        {**_PLAIN, "model_type": "granite", "attention_bias": False, "mlp_bias": False}
        | {"attention_multiplier": 0.2, "embedding_multiplier": 6.0, "residual_multiplier": 0.4}
        | {"logits_scaling": 3.0},
        {"attention.scale": 0.2, "embedding_scale": 6.0, "residual_scale": 0.4, "logit_scale": 3.0},
    ),
    "smollm3": ({**_PLAIN, "model_type": "smollm3", "num_hidden_layers": 4}, {}),
    "gemma": ({**COMMON, "model_type": "gemma", "tie_word_embeddings": True}, {}),
    "gemma2": (
        {**COMMON, "model_type": "gemma2", "query_pre_attn_scalar": 16, "sliding_window": 4096}
        | {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 5.0}
        | {"tie_word_embeddings": True},
        {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 5.0}
        | {"attention.sliding_window": 4096},
    ),
    "olmo2": ({**_PLAIN, "model_type": "olmo2"}, {}),
    "phi3": ({**_PLAIN, "model_type": "phi3", "partial_rotary_factor": 0.5}, {}),
    "glm4": (
        {**COMMON, "model_type": "glm4", "attention_bias": True, "partial_rotary_factor": 0.5},
        {},
    ),
}


def write(folder: Path, arch: str, drop: tuple[str, ...] = ()) -> Path:
    """A tiny random model in `folder`, and beside it as a GGUF file of this architecture."""
    config, own = KINDS[arch]
    config = {**config, "torch_dtype": "float32"}
    weights = random_weights(config, "float32", 3)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    write_tokenizer(folder)
    head = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    metadata = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
        "rope.dimension_count": int(head * config.get("partial_rotary_factor", 1)),
        **({"attention.key_length": head} if "head_dim" in config else {}),
        **own,
    }
    out = folder.with_suffix(".gguf")
    writer = GGUFWriter(out, arch)
    for key, value in metadata.items():
        if key not in drop:
            _add(writer, f"{arch}.{key}", value)
    for key, value in _tokenizer_metadata(folder, "gpt-2").items():
        _add(writer, key, value)
    for name, weight in weights.items():
        writer.add_tensor(gguf_name(name, arch, config), stored(name, weight, arch, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def gguf_name(name: str, arch: str, config: Json) -> str:
    """A tensor's name by the map that llama.cpp's converter uses."""
    enum = next(key for key, known in MODEL_ARCH_NAMES.items() if known == arch)
    names = gguf.get_tensor_name_map(enum, config["num_hidden_layers"])
    found = names.get_name(name.replace("switch_mlp", "experts"), (".weight", ".bias"))
    assert found is not None, name
    return found


def stored(name: str, weight: mx.array, arch: str, config: Json) -> np.ndarray:
    array = np.array(weight)
    if ARCHITECTURES[arch].norm_shift and "norm" in name:
        return array + 1
    for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
        if arch in ("granite", "smollm3") and f"{part}_proj.weight" in name:
            return interleave(array, config[heads])
    return array


@pytest.mark.parametrize("arch", KINDS)
def test_a_file_gives_the_original_logits(tmp_path: Path, arch: str) -> None:
    path = write(tmp_path / arch, arch)
    _, logits = converted(path, tmp_path / "cache")
    np.testing.assert_allclose(logits, stock_logits(tmp_path / arch), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arch", "drop", "message"),
    [
        ("qwen3moe", "expert_count", "qwen3moe.expert_count is missing"),
        ("qwen3moe", "expert_used_count", "qwen3moe.expert_used_count is missing"),
    ],
)
def test_what_a_file_must_say(tmp_path: Path, arch: str, drop: str, message: str) -> None:
    assert_refused(write(tmp_path / arch, arch, (drop,)), tmp_path / "cache", message)


def test_every_architecture_is_one_of_llama_cpp() -> None:
    """With tensors that it has there."""
    for arch, form in ARCHITECTURES.items():
        enum = next(key for key, known in MODEL_ARCH_NAMES.items() if known == arch)
        known = {gguf.TENSOR_NAMES[t].removeprefix("blk.{bid}.") for t in gguf.MODEL_TENSORS[enum]}
        assert {*form.blocks, *(form.experts or {})} <= known, arch
        assert set(form.biased) <= set(form.blocks), arch

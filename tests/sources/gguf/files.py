"""GGUF files made from the tiny folders, in the form llama.cpp's own converter gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_NAMES = {
    **NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def numpy_weights(folder: Path) -> dict[str, np.ndarray]:
    """The folder's tensors as float32."""
    weights = mx.load(str(folder / "model.safetensors"))
    return {name: np.array(w.astype(mx.float32)) for name, w in weights.items()}


def rounded(weight: np.ndarray, kind: str) -> np.ndarray:
    """What a GGUF of type `kind` keeps of a float32 weight; vectors are always kept whole."""
    if weight.ndim == 1:
        return weight
    qtype = GGMLQuantizationType[kind]
    return dequantize(quantize(weight, qtype), qtype)


def write_gguf(
    folder: Path,
    out: Path,
    kind: str = "F32",
    *,
    set_: dict[str, Any] | None = None,
    extra: dict[str, tuple[np.ndarray, str]] | None = None,
    drop: tuple[str, ...] = (),
    pre: str = "gpt-2",
    split: int = 0,
) -> Path:
    """Write the tiny `folder` as the GGUF `out` with matrices of type `kind`.

    `set_` replaces or adds metadata values, `extra` adds tensors by GGUF name with their type, and
    `drop` leaves out tensors or metadata keys. With `split` each part has so many tensors, and a
    name as llama.cpp gives it.
    """
    config = json.loads((folder / "config.json").read_text())
    arch = ARCHITECTURES[config["model_type"]]
    writer = GGUFWriter(out, arch, split_max_tensors=split)
    metadata = {**_model_metadata(config, arch), **_tokenizer_metadata(folder, pre), **(set_ or {})}
    for key, value in metadata.items():
        if key not in drop:
            _add(writer, key, value)
    tensors = {
        gguf_name(name, arch): (_stored(name, w, arch, config), kind if w.ndim > 1 else "F32")
        for name, w in numpy_weights(folder).items()
    }
    for name, (weight, type_name) in {**tensors, **(extra or {})}.items():
        if name not in drop:
            qtype = GGMLQuantizationType[type_name]
            writer.add_tensor(name, quantize(weight, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def gguf_name(name: str, arch: str) -> str:
    """A checkpoint's tensor name in llama.cpp's words."""
    if name in OUTER:
        return OUTER[name]
    _, _, index, rest = name.split(".", 3)
    module, part = rest.rsplit(".", 1)
    names = GEMMA_NAMES if arch == "gemma3" else NAMES
    return f"blk.{index}.{names[module]}.{part}"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """convert_hf_to_gguf.py, LlamaModel.permute."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def _stored(name: str, weight: np.ndarray, arch: str, config: dict[str, Any]) -> np.ndarray:
    if arch == "gemma3" and "norm" in name:
        return weight + 1
    if arch == "llama" and ".q_proj." in name:
        return interleave(weight, config["num_attention_heads"])
    if arch == "llama" and ".k_proj." in name:
        return interleave(weight, config["num_key_value_heads"])
    return weight


def _model_metadata(config: dict[str, Any], arch: str) -> dict[str, Any]:
    metadata = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
    }
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") in ("linear", "yarn"):
        metadata["rope.scaling.type"] = scaling["rope_type"]
        metadata["rope.scaling.factor"] = scaling["factor"]
    if scaling.get("rope_type") == "yarn":
        original = scaling["original_max_position_embeddings"]
        metadata["rope.scaling.original_context_length"] = original
    if "head_dim" in config:
        metadata["attention.key_length"] = config["head_dim"]
        metadata["attention.value_length"] = config["head_dim"]
    if arch == "gemma3":
        metadata["attention.sliding_window"] = config["sliding_window"]
        metadata["attention.sliding_window_pattern"] = config["sliding_window_pattern"]
    return {f"{arch}.{key}": value for key, value in metadata.items()}


def _tokenizer_metadata(folder: Path, pre: str) -> dict[str, Any]:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocab, key=lambda token: vocab[token])
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if t in special else NORMAL for t in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": special[settings["bos_token"]],
        "tokenizer.ggml.eos_token_id": special[settings["eos_token"]],
        "tokenizer.ggml.padding_token_id": special[settings["pad_token"]],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": settings["chat_template"],
    }


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif key.endswith(".scores"):
        writer.add_key_value(
            key, value, gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType.FLOAT32
        )
    else:
        writer.add_array(key, value)

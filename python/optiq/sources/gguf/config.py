"""What llama.cpp's metadata and tensor names mean in Hugging Face's: config.json and tensor list.

The architectures and their names are in architectures.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import SourceError
from .architectures import ARCHITECTURES
from .file import GgufFile, GgufTensor, read_rows

# Keys of other writers that change the forward pass, with the values that do not.
_UNREAD: dict[str, tuple[float, ...]] = {
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "attention.scale": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "use_parallel_residual": (0,),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_beta_fast": (32,),
    "rope.scaling.yarn_beta_slow": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
}
GEMMA_PERIOD = 6  # llama.cpp: every sixth layer sees everything, where the file does not say
# llama.cpp knows the 27B models, whose queries are scaled by another rule, by their blocks.
GEMMA_27B_BLOCKS = {"gemma2": 46, "gemma3": 62}
SMOLLM3_PERIOD = 4  # every fourth layer has no positions: llama.cpp writes it out
WINDOW = "attention.sliding_window"
FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Mapped:
    """One tensor to write: `source` read, its rows un-interleaved in heads of `head_rows` if not 0,
    and `shift` added."""

    name: str
    source: GgufTensor
    head_rows: int = 0
    shift: float = 0.0


class Fields:
    """Typed access to the metadata of one file under its architecture's prefix."""

    def __init__(self, gguf: GgufFile) -> None:
        arch = gguf.metadata.get("general.architecture")
        if not isinstance(arch, str) or arch not in ARCHITECTURES:
            raise SourceError(
                f"{gguf.path}: the GGUF architecture {arch!r} is not supported; optiq reads "
                f"{', '.join(ARCHITECTURES)}; give the original Hugging Face model instead"
            )
        self.gguf, self.arch, self.form = gguf, arch, ARCHITECTURES[arch]

    def get(self, key: str) -> Any:
        """A string or number, an array as a tuple, or None."""
        value = self.gguf.metadata.get(f"{self.arch}.{key}")
        if isinstance(value, np.ndarray):
            value = value.tolist()
        return tuple(value) if isinstance(value, list) else value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]  # some writers give one value per layer
        value = self._or_default(key, value, default)
        if type(value) is not int or value <= 0:
            raise self.error(f"{self.arch}.{key} is {value!r}, not one positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._or_default(key, self.get(key), default)
        if not isinstance(value, (int, float)) or not 0 < value < FLOAT32_MAX:
            raise self.error(f"{self.arch}.{key} is {value!r}, not a positive number")
        # The shortest decimal of the float32, so that 9.99999974e-06 is 1e-05 again.
        return float(str(np.float32(value)))

    def _or_default(self, key: str, value: Any, default: float | None) -> Any:
        value = default if value is None else value
        if value is None:
            raise self.error(f"the metadata {self.arch}.{key} is missing")
        return value

    def error(self, reason: str) -> SourceError:
        return SourceError(f"{self.gguf.path}: {reason}; give the original Hugging Face model")


def build_config(gguf: GgufFile) -> dict[str, Any]:
    """config.json without dtype and token ids, as the model's own on the hub would say it."""
    f = Fields(gguf)
    hidden, heads = f.integer("embedding_length"), f.integer("attention.head_count")
    blocks = f.integer("block_count")
    head_dim = f.integer("attention.key_length", max(hidden // heads, 1))
    if blocks > len(gguf.tensors):
        raise f.error(f"{f.arch}.block_count {blocks} exceeds its {len(gguf.tensors)} tensors")
    if head_dim % 2:
        raise f.error(f"the head size {head_dim} is odd")
    if not f.form.experts and f.get("expert_count") not in (None, 0):
        raise f.error(f"{f.arch} with {f.get('expert_count')} experts is not supported")
    rotated = f.integer("rope.dimension_count", head_dim)
    partial = f.form.partial and rotated <= head_dim
    for key in ("attention.value_length", *(() if partial else ("rope.dimension_count",))):
        if f.integer(key, head_dim) != head_dim:
            raise f.error(f"{f.arch}.{key} {f.get(key)} differs from the head size {head_dim}")
    if f.arch == "qwen2" and head_dim * heads != hidden:
        raise f.error(f"qwen2 needs heads of {hidden}/{heads}, this file has {head_dim}")
    for key, neutral in _UNREAD.items():
        if key not in f.form.reads and f.get(key) not in (None, *neutral):
            raise f.error(
                f"{f.arch}.{key} {f.get(key)} changes the model, and optiq does not read it"
            )
    window = f.get(WINDOW)
    if WINDOW not in f.form.reads and window and window < f.integer("context_length"):
        raise f.error(f"{f.arch} with a window of {window} tokens is not supported")
    config: dict[str, Any] = {
        "model_type": f.form.model_type,
        "architectures": [f.form.class_name],
        "hidden_size": hidden,
        "intermediate_size": f.integer("feed_forward_length"),
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": f.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": f.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": f.number("rope.freq_base", 1e6 if f.arch == "gemma3" else 1e4),
        "rope_scaling": _rope_scaling(f, head_dim),
        "max_position_embeddings": f.integer("context_length"),
        "vocab_size": _tensor(f, "token_embd.weight").shape[0],
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
    }
    if f.arch.startswith("gemma"):
        config["hidden_activation"] = "gelu_pytorch_tanh"
    else:
        config["hidden_act"] = "silu"
    if f.form.may_be_biased:
        config["attention_bias"] = "blk.0.attn_q.bias" in gguf.tensors
    if f.form.partial:
        config["partial_rotary_factor"] = rotated / head_dim
    if own := _OWN.get(f.arch):
        config |= own(f, config)
    return config


def map_tensors(gguf: GgufFile, config: dict[str, Any]) -> list[Mapped]:
    """The tensors of the folder in file order; SourceError for a missing or an unknown one.

    With tied embeddings and a stored head, the one of the two with more bits is the embedding.
    """
    f = Fields(gguf)
    form = f.form
    embedding = _tensor(f, "token_embd.weight")
    head = _tensor(f, "output.weight") if "output.weight" in gguf.tensors else None
    if head and config["tie_word_embeddings"] and head.nbytes > embedding.nbytes:
        embedding = head
    mapped = [Mapped("model.embed_tokens.weight", embedding)]
    for i in range(config["num_hidden_layers"]):
        for short, long in {**form.blocks, **(form.experts or {})}.items():
            interleaved = form.interleaved and short in ("attn_q", "attn_k")
            head_rows = config["head_dim"] if interleaved else 0
            shift = form.norm_shift if short.endswith("norm") else 0.0
            biased = short in form.biased and config.get("attention_bias", True)
            for part in ("weight", "bias") if biased else ("weight",):
                source = _tensor(f, f"blk.{i}.{short}.{part}")
                if head_rows and source.shape[0] % head_rows:
                    raise f.error(f"{source.name} has {source.shape[0]} rows, no whole heads")
                name = f"model.layers.{i}.{long}.{part}"
                mapped.append(Mapped(name, source, head_rows, shift))
    mapped.append(Mapped("model.norm.weight", _tensor(f, "output_norm.weight"), 0, form.norm_shift))
    if head and not config["tie_word_embeddings"]:
        mapped.append(Mapped("lm_head.weight", head))
    known = {m.source.name for m in mapped}
    known |= {"token_embd.weight", "output.weight", "rope_freqs.weight"}
    if unknown := sorted(gguf.tensors.keys() - known):
        raise f.error(f"tensor {unknown[0]!r} is not part of a {f.arch} model that optiq knows")
    return mapped


def _tensor(f: Fields, name: str) -> GgufTensor:
    tensor = f.gguf.tensors.get(name)
    if tensor is None:
        raise f.error(f"tensor {name!r} is missing")
    axes = 1 if "norm" in name or name.endswith(".bias") else 3 if "_exps." in name else 2
    if len(tensor.shape) != axes:
        raise f.error(f"tensor {name!r} has the shape {list(tensor.shape)}, not {axes} axes")
    return tensor


def _gemma2(f: Fields, config: dict[str, Any]) -> dict[str, Any]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    large = config["num_hidden_layers"] == GEMMA_27B_BLOCKS[f.arch]
    return {
        "query_pre_attn_scalar": hidden // heads if large else config["head_dim"],
        "sliding_window": f.integer(WINDOW, 4096),
        "attn_logit_softcapping": f.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": f.number("final_logit_softcapping", 30.0),
    }


def _gemma3(f: Fields, config: dict[str, Any]) -> dict[str, Any]:
    period = f.integer("attention.sliding_window_pattern", GEMMA_PERIOD)
    full = [(i + 1) % period == 0 for i in range(config["num_hidden_layers"])]
    return _gemma2(f, config) | {
        "sliding_window": f.integer(WINDOW),
        "sliding_window_pattern": period,
        "layer_types": ["full_attention" if is_full else "sliding_attention" for is_full in full],
        "rope_local_base_freq": f.number("rope.freq_base_swa", 1e4),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }


def _granite(f: Fields, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "attention_multiplier": f.number("attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": f.number("embedding_scale", 1.0),
        "residual_multiplier": f.number("residual_scale", 1.0),
        "logits_scaling": f.number("logit_scale", 1.0),
        "mlp_bias": False,
    }


def _experts(f: Fields, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": f.integer("expert_count"),
        "num_experts_per_tok": f.integer("expert_used_count"),
        "moe_intermediate_size": f.integer("expert_feed_forward_length"),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


# What config.json says beside that, by architecture.
_OWN: dict[str, Callable[[Fields, dict[str, Any]], dict[str, Any]]] = {
    "llama": lambda f, config: {"mlp_bias": False},
    "granite": _granite,
    "smollm3": lambda f, config: {"no_rope_layer_interval": SMOLLM3_PERIOD},
    "qwen3moe": _experts,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": lambda f, config: {"sliding_window": f.get(WINDOW)},
}


def _rope_scaling(f: Fields, head_dim: int) -> dict[str, Any] | None:
    kind = f.get("rope.scaling.type")
    if "rope_freqs.weight" in f.gguf.tensors:
        return _llama3_scaling(f, head_dim)
    if kind in (None, "none"):
        return None
    factor = f.number("rope.scaling.factor")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = f.integer("rope.scaling.original_context_length")
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
        }
    raise f.error(f"the rope scaling {kind!r} is not supported")


def _llama3_scaling(f: Fields, head_dim: int) -> dict[str, Any]:
    """The Llama 3.1 parameters behind the stored frequency divisors, checked against them."""
    tensor = f.gguf.tensors["rope_freqs.weight"]
    if tensor.type.name != "F32" or tensor.shape != (head_dim // 2,):
        raise f.error(f"rope_freqs.weight is {tensor.type.name} {list(tensor.shape)}")
    stored = read_rows(tensor, 0, 1)[0].view("<f4")
    params = {
        "rope_type": "llama3",
        "factor": float(stored.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    base = f.number("rope.freq_base", 1e4)
    if not np.allclose(stored, llama3_divisors(head_dim, base, params), rtol=1e-4):
        raise f.error("rope_freqs.weight is not the scaling of Llama 3.1")
    return params


def llama3_divisors(head_dim: int, base: float, params: dict[str, Any]) -> npt.NDArray[np.float64]:
    """What each rotary frequency is divided by: float64 [head_dim / 2] (transformers,
    modeling_rope_utils.py, _compute_llama3_parameters)."""
    frequency = base ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = params["original_max_position_embeddings"] * frequency / (2 * np.pi)
    low, high, factor = params["low_freq_factor"], params["high_freq_factor"], params["factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    result: npt.NDArray[np.float64] = 1 / ((1 - smooth) / factor + smooth)
    return result

"""The GGUF architectures that are read: names and stored forms of their tensors.

Names and stored forms follow llama.cpp's convert_hf_to_gguf.py: q and k rows of the llama
architecture and of those that derive from it are interleaved for its rotary embedding, and gemma
norms are stored plus one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_QKV = ("attn_q", "attn_k", "attn_v")

_LLAMA = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA2 = {
    **_LLAMA,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GATE_UP = {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}  # one matrix for both


def _without(names: Mapping[str, str], *left: str) -> dict[str, str]:
    return {short: long for short, long in names.items() if short not in left}


@dataclass(frozen=True)
class Architecture:
    """`blocks` has the tensors of a block by llama.cpp's names, of which `biased` have a bias in
    all blocks or, where it `may_be_biased`, in none. `experts` are those of a mixture: a matrix for
    each. Heads of `interleaved` are to be put in order, and `norm_shift` is added to norms. With
    `partial` the rotary embedding may leave a part of each head as it is. `reads` are keys of the
    metadata that other architectures must not have."""

    model_type: str
    class_name: str
    blocks: Mapping[str, str]
    biased: tuple[str, ...] = ()
    may_be_biased: bool = False
    experts: Mapping[str, str] | None = None
    interleaved: bool = False
    norm_shift: float = 0.0
    partial: bool = False
    reads: tuple[str, ...] = ()


_WINDOW = "attention.sliding_window"

ARCHITECTURES = {
    "llama": Architecture(
        "llama", "LlamaForCausalLM", _LLAMA, (*_QKV, "attn_output"), True, interleaved=True
    ),
    "granite": Architecture(
        "granite",
        "GraniteForCausalLM",
        _LLAMA,
        (*_QKV, "attn_output"),
        True,
        interleaved=True,
        reads=("attention.scale", "embedding_scale", "residual_scale", "logit_scale"),
    ),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", _LLAMA, interleaved=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _LLAMA, _QKV),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", {**_LLAMA, **_QK_NORMS}),
    "qwen3moe": Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {**_without(_LLAMA, *_GATE_UP, "ffn_gate"), **_QK_NORMS, "ffn_gate_inp": "mlp.gate"},
        experts={
            "ffn_gate_exps": "mlp.switch_mlp.gate_proj",
            "ffn_up_exps": "mlp.switch_mlp.up_proj",
            "ffn_down_exps": "mlp.switch_mlp.down_proj",
        },
        reads=("expert_count",),
    ),
    "gemma": Architecture("gemma", "GemmaForCausalLM", _LLAMA, norm_shift=-1.0),
    "gemma2": Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        _GEMMA2,
        norm_shift=-1.0,
        reads=("attn_logit_softcapping", "final_logit_softcapping", _WINDOW),
    ),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        {**_GEMMA2, **_QK_NORMS},
        norm_shift=-1.0,
        reads=(_WINDOW,),
    ),
    "olmo2": Architecture(
        "olmo2",
        "Olmo2ForCausalLM",
        {
            **_without(_LLAMA, "attn_norm", "ffn_norm"),
            **_QK_NORMS,
            "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        {
            **_without(_LLAMA, *_QKV, "ffn_gate"),
            "attn_qkv": "self_attn.qkv_proj",
            **_GATE_UP,
        },
        partial=True,
        reads=(_WINDOW,),
    ),
    "glm4": Architecture(
        "glm4",
        "Glm4ForCausalLM",
        {
            **_without(_LLAMA, "ffn_gate"),
            "post_attention_norm": "post_self_attn_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
            **_GATE_UP,
        },
        _QKV,
        True,
        partial=True,
    ),
}

"""Tiny random models as real mlx-lm folders, for every test that needs "a model".

    from tests.tiny import KINDS, tiny_folder

    folder = tiny_folder(tmp_path)                                      # tied llama, float32
    folder = tiny_folder(tmp_path, "llama", tie_word_embeddings=False)  # any config.json key
    folder = tiny_folder(tmp_path, "gemma3_text", dtype="bfloat16", seed=3, name="b")

A folder holds config.json, generation_config.json, model.safetensors (or `shards` shards with an
index), tokenizer.json and tokenizer_config.json. The kinds, each with vocab 384 and hidden 64:

    llama        2 layers, 4 query and 2 key/value heads of 16, tied (or untied) head
    qwen2        the same with biases on q, k and v
    qwen3        the same with q_norm and k_norm
    qwen3_moe    2 layers, 4 experts of which 2 answer each token, untied head (run it in float32:
                 MLX's CPU gather_mm knows no other dtype)
    gemma3_text  4 layers, every second one sliding over 8 tokens, four norms per block

Every tensor is random, norms and biases too, so that a permuted, dropped or doubled one shows.
The tokenizer is a byte-level BPE of 384 tokens with <|bos|> put in front, a ChatML template that
knows tools, and <|im_end|> as end of turn. (transformers always adds <|endoftext|> to a qwen2
tokenizer, so that token is in all of them, as padding.)
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import _get_classes
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB = 384
SPECIAL = ("<|endoftext|>", "<|bos|>", "<|im_start|>", "<|im_end|>")
PAD, BOS, _, EOS = range(4)

CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}
{% endif %}<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools><|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role != 'system' or not loop.first %}<|im_start|>{{ message.role }}
{{ message.content or '' }}
{%- for tool_call in message.tool_calls or [] %}
{%- if tool_call.function %}{% set tool_call = tool_call.function %}{% endif %}
<tool_call>
{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

_TEXT = """The river turned silver when the evening light reached it, and the two brothers stopped
to look. def area(width: float, height: float) -> float: return width * height. If 12 boxes hold 7
pens each, there are 84 pens. What is the weather in Lisbon today? {"name": "get_weather",
"arguments": {"city": "Lisbon", "unit": "celsius"}} You are a helpful assistant. The capital of
France is Paris. Please write the answer in one short sentence, then stop."""

_LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "vocab_size": VOCAB,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": {**_LLAMA, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6},
    "qwen3": {**_LLAMA, "head_dim": 32, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6},
    "qwen3_moe": {
        **_LLAMA,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "gemma3_text": {
        **_LLAMA,
        "num_hidden_layers": 4,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
    },
}
KINDS = tuple(_CONFIGS)
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def tiny_folder(
    parent: Path,
    kind: str = "llama",
    *,
    dtype: str = "float32",
    seed: int = 0,
    shards: int = 1,
    name: str | None = None,
    **config: Any,
) -> Path:
    """Write the folder `parent / (name or kind)` and return it; `config` overrides config.json."""
    folder = parent / (name or kind)
    folder.mkdir(parents=True)
    full = {
        "model_type": kind,
        "architectures": [_ARCHITECTURES[kind]],
        **_CONFIGS[kind],
        "torch_dtype": dtype,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        **config,
    }
    _write_json(folder / "config.json", full)
    eos = {"bos_token_id": BOS, "eos_token_id": [EOS], "pad_token_id": PAD}
    _write_json(folder / "generation_config.json", eos)
    write_tokenizer(folder)
    _write_weights(folder, random_weights(full, dtype, seed), shards)
    return folder


def random_weights(config: dict[str, Any], dtype: str, seed: int) -> dict[str, mx.array]:
    """Random tensors by checkpoint name; the scales keep logits spread over a few nats."""
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    if config["model_type"] == "gemma3_text" and config["tie_word_embeddings"]:
        model.pop("lm_head")
    key = mx.random.key(seed)
    type_ = getattr(mx, dtype)

    def draw(path: str, old: mx.array) -> mx.array:
        nonlocal key
        key, use = mx.random.split(key)
        noise = mx.random.normal(old.shape, key=use)
        if old.ndim == 1:
            return (old + 0.2 * noise).astype(type_)
        scale = 0.2 if "embed_tokens" in path or "lm_head" in path else old.shape[-1] ** -0.5
        return (scale * noise).astype(type_)

    return dict(tree_flatten(tree_map_with_path(draw, model.parameters())))


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json of the tiny byte-level BPE."""
    (folder / "tokenizer.json").write_text(_tokenizer_json(), encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL[BOS],
            "eos_token": SPECIAL[EOS],
            "pad_token": SPECIAL[PAD],
            "model_max_length": 512,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


@lru_cache
def _tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A",
        pair=f"{SPECIAL[BOS]} $A {SPECIAL[BOS]} $B",
        special_tokens=[(SPECIAL[BOS], BOS)],
    )
    return str(tokenizer.to_str())


def _write_weights(folder: Path, weights: dict[str, mx.array], shards: int) -> None:
    metadata = {"format": "mlx"}
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata)
        return
    names = sorted(weights)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {n: weights[n] for n in names[i::shards]}
        mx.save_safetensors(str(folder / file), part, metadata)
        weight_map |= dict.fromkeys(part, file)
    total = sum(w.nbytes for w in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")

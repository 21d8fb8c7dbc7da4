"""The families that have a guide. Whatever stands here has a source; what has none is left out."""

from __future__ import annotations

from .family import Caveat, Example, Family, Sampling

_MLX_LM = "mlx-lm 0.32.2, {}"
_OURS = "docs/sources.md, Departures"

_LLAMA_8B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip

_GEMMA4 = Sampling(
    "all uses", "model card of google/gemma-4-31B-it", temperature=1.0, top_p=0.95, top_k=64
)
_QWEN35 = "model card of Qwen/Qwen3.6-27B"
_QWEN35_THINKING = Sampling("thinking", _QWEN35, temperature=1.0, top_p=0.95, top_k=20, min_p=0.0)
_QWEN3 = "model card of Qwen/Qwen3-32B"
_QWEN3_THINKING = Sampling("thinking", _QWEN3, temperature=0.6, top_p=0.95, top_k=20, min_p=0.0)
_GPT_OSS = Sampling("all uses", "README of openai/gpt-oss", temperature=1.0, top_p=1.0)
_GEMMA3 = Sampling(
    "all uses",
    "Unsloth's guide to Gemma 3, after the Gemma team",
    temperature=1.0, top_p=0.95, top_k=64, min_p=0.0,
)  # fmt: skip

FAMILIES: tuple[Family, ...] = (
    Family(
        key="gemma4",
        title="Gemma 4",
        model_types=("gemma4", "gemma4_text", "gemma4_unified"),
        vocabularies=(262144,),
        sampling=(_GEMMA4,),
        written=_GEMMA4,
        thinking="Thinking is off unless the system prompt begins with `<|think|>`, which the chat "
        "template writes where `enable_thinking` is true.",
        cache="Most layers see a window of tokens only, and the last ones read the keys and values "
        "of earlier layers, so the cache is small for the model's size.",
        caveats=(
            Caveat(
                "Vision and audio weights are kept: mlx-lm and optiq run the text, mlx-vlm all.",
                "docs/sources.md, Towers",
            ),
            Caveat(
                "Uniform 4-bit was called unusable by users; look at the KL that `convert` prints "
                "before you go below 5 bits.",
                "issue 895 of mlx-vlm",
            ),
        ),
    ),
    Family(
        key="gemma3",
        title="Gemma 3",
        model_types=("gemma3", "gemma3_text"),
        vocabularies=(262144, 262208),
        sampling=(_GEMMA3,),
        written=_GEMMA3,
        thinking="These models do not think before they answer.",
        cache="Five of six layers see a window only. mlx-lm's own `--kv-bits` does not quantize "
        "such caches; optiq's do.",
        caveats=(
            Caveat(
                "mlx-vlm 0.7.10 does not load a Gemma 3 whose embedding is quantized and also the "
                "head, of ours or of mlx-lm's. mlx-lm does.",
                "docs/sources.md, Towers",
            ),
        ),
        example=Example(
            "google/gemma-3-1b-it",
            {
                "model_type": "gemma3_text", "hidden_size": 1152, "num_hidden_layers": 26,
                "intermediate_size": 6912, "num_attention_heads": 4, "num_key_value_heads": 1,
                "head_dim": 256, "vocab_size": 262144, "sliding_window": 512,
                "sliding_window_pattern": 6, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6,
                "max_position_embeddings": 32768,
            },
        ),
    ),
    Family(
        key="qwen3_5",
        title="Qwen3.5 and Qwen3.6",
        model_types=("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
        vocabularies=(248320,),
        sampling=(
            _QWEN35_THINKING,
            Sampling(
                "thinking, precise coding", _QWEN35,
                temperature=0.6, top_p=0.95, top_k=20, min_p=0.0,
            ),
            Sampling(
                "without thinking", _QWEN35,
                temperature=0.7, top_p=0.8, top_k=20, min_p=0.0, presence_penalty=1.5,
            ),
        ),
        written=_QWEN35_THINKING,
        thinking="The template takes `enable_thinking`. The larger models think unless it is "
        "false; Qwen3.5-0.8B does not unless it is true.",
        cache="Only every fourth layer keeps keys and values; the others have a state of fixed "
        "size, which stays as it is.",
        caveats=(
            Caveat(
                "Vision weights are kept: mlx-lm and optiq run the text, mlx-vlm all.",
                "docs/sources.md, Towers",
            ),
            Caveat(
                "The layers that predict several tokens are left out, as mlx-lm has no use for "
                "them.",
                _MLX_LM.format("qwen3_5.py"),
            ),
            Caveat(
                "For Qwen3.5 the card recommends a presence penalty of 1.5 while thinking in "
                "general, for Qwen3.6 none.",
                "model cards of Qwen/Qwen3.5-27B and Qwen/Qwen3.6-27B",
            ),
        ),
        example=Example(
            "Qwen/Qwen3.6-27B",
            {
                "model_type": "qwen3_5",
                "text_config": {
                    "model_type": "qwen3_5_text", "hidden_size": 5120, "num_hidden_layers": 64,
                    "intermediate_size": 17408, "num_attention_heads": 24,
                    "num_key_value_heads": 4, "head_dim": 256, "linear_num_value_heads": 48,
                    "linear_num_key_heads": 16, "linear_key_head_dim": 128,
                    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
                    "full_attention_interval": 4, "vocab_size": 248320, "rms_norm_eps": 1e-6,
                    "max_position_embeddings": 262144, "tie_word_embeddings": False,
                    "rope_parameters": {
                        "rope_type": "default", "rope_theta": 10000000.0,
                        "partial_rotary_factor": 0.25,
                    },
                },
            },
        ),
    ),
    Family(
        key="qwen3",
        title="Qwen3",
        model_types=("qwen3", "qwen3_moe"),
        vocabularies=(151936,),
        sampling=(
            _QWEN3_THINKING,
            Sampling(
                "without thinking", _QWEN3, temperature=0.7, top_p=0.8, top_k=20, min_p=0.0
            ),
        ),
        written=None,  # the Instruct models of July 2025 do not think
        thinking="The template takes `enable_thinking`, which is true unless you say otherwise. "
        "The Instruct models of July 2025 do not think, the Thinking ones always do.",
        cache="Every layer keeps keys and values of all tokens.",
        caveats=(
            Caveat(
                "Greedy decoding while thinking leads to endless repetitions: set a temperature.",
                _QWEN3,
            ),
        ),
        example=Example(
            "Qwen/Qwen3-8B",
            {
                **_LLAMA_8B, "model_type": "qwen3", "num_hidden_layers": 36, "head_dim": 128,
                "intermediate_size": 12288, "vocab_size": 151936, "rope_theta": 1000000.0,
                "rms_norm_eps": 1e-6, "max_position_embeddings": 40960,
            },
        ),
    ),
    Family(
        key="llama",
        title="Llama 3",
        model_types=("llama",),
        vocabularies=(128256,),
        sampling=(
            Sampling(
                "Llama 3 to 3.3, Instruct",
                "generation_config.json of the models",
                temperature=0.6,
                top_p=0.9,
            ),
        ),
        written=None,  # many other models have the architecture, and the vocabulary
        thinking="These models do not think before they answer. Models distilled from DeepSeek-R1 "
        "also have this architecture, and do.",
        cache="Every layer keeps keys and values of all tokens.",
        caveats=(
            Caveat(
                "Hundreds of models by others have this architecture. Their own cards have their "
                "sampling and template.",
                _MLX_LM.format("llama.py and MODEL_REMAPPING"),
            ),
        ),
        example=Example(
            "meta-llama/Llama-3.1-8B-Instruct",
            {**_LLAMA_8B, "model_type": "llama", "vocab_size": 128256},
        ),
    ),
    Family(
        key="mistral",
        title="Mistral",
        model_types=("mistral", "mistral3", "ministral3", "mixtral"),
        vocabularies=(),
        sampling=(),
        written=None,
        thinking="The card of a model says whether it thinks.",
        cache="Every layer keeps keys and values of all tokens; Mistral 7B v0.1 has a window, "
        "which mlx-lm leaves out.",
        caveats=(
            Caveat(
                "Files named `consolidated*.safetensors` are for Mistral's own code; download "
                "`model*.safetensors` of the same model.",
                "the message of `optiq convert`",
            ),
            Caveat(
                "Mistral 7B v0.1 runs without its attention window of 4,096 tokens.", _OURS
            ),
            Caveat(
                "Vision weights of Mistral Small 3.1 and later are kept: mlx-lm and optiq run the "
                "text, mlx-vlm all.",
                "docs/sources.md, Towers",
            ),
        ),
        example=Example(
            "mistralai/Mistral-7B-Instruct-v0.3",
            {
                **_LLAMA_8B, "model_type": "mistral", "vocab_size": 32768,
                "rope_theta": 1000000.0, "max_position_embeddings": 32768,
            },
        ),
    ),
    Family(
        key="gpt_oss",
        title="gpt-oss",
        model_types=("gpt_oss",),
        vocabularies=(201088,),
        sampling=(_GPT_OSS,),
        written=_GPT_OSS,
        thinking="These models always think, in a channel of their own. How much, the template's "
        "`reasoning_effort` says: low, medium or high.",
        cache="Every second layer sees a window of 128 tokens only.",
        caveats=(
            Caveat(
                "mlx-lm rounds the range of its yarn rotation to whole dimensions, where the "
                "original has `truncate` false.",
                _OURS,
            ),
            Caveat(
                "The experts of the original are MXFP4 already, 4.25 bits a weight. Each is made "
                "bfloat16 when it is used.",
                "docs/sources.md, Quantization of the source",
            ),
        ),
        example=Example(
            "openai/gpt-oss-20b",
            {
                "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24,
                "intermediate_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8,
                "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4,
                "vocab_size": 201088, "sliding_window": 128, "rms_norm_eps": 1e-5,
                "rope_theta": 150000, "max_position_embeddings": 131072,
                "layer_types": ["sliding_attention", "full_attention"] * 12,
                "tie_word_embeddings": False,
            },
        ),
    ),
    Family(
        key="deepseek",
        title="DeepSeek",
        model_types=("deepseek_v2", "deepseek_v3", "deepseek_v32"),
        vocabularies=(129280,),
        sampling=(
            Sampling(
                "DeepSeek-R1", "generation_config.json of deepseek-ai/DeepSeek-R1",
                temperature=0.6, top_p=0.95,
            ),
        ),
        written=None,  # V3 and R1 share a model_type
        thinking="R1 always thinks and V3 does not; of later models the template says it.",
        cache="Attention is latent: a token takes one short vector and a rotated key in each "
        "layer. optiq quantizes the vector and leaves the key. The cache of V3.2 is not quantized.",
        caveats=(
            Caveat(
                "The original weights are FP8 in blocks. Each is made bfloat16 when it is used, "
                "and measured against as it is.",
                "docs/sources.md, Quantization of the source",
            ),
            Caveat(
                "The layers that predict several tokens are left out, as mlx-lm has no use for "
                "them.",
                _MLX_LM.format("deepseek_v3.py, sanitize"),
            ),
        ),
        experts=True,
    ),
    Family(
        key="glm",
        title="GLM",
        model_types=("glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"),
        vocabularies=(151552,),
        sampling=(
            Sampling(
                "GLM-4.6 and later", "API reference of Z.ai, defaults",
                temperature=1.0, top_p=0.95,
            ),
            Sampling("GLM-4.5", "API reference of Z.ai, defaults", temperature=0.6, top_p=0.95),
            Sampling(
                "GLM-Z1-0414", "model card of zai-org/GLM-Z1-32B-0414",
                temperature=0.6, top_p=0.95, top_k=40,
            ),
        ),
        written=None,  # 4.5 and 4.6 differ and share a model_type
        thinking="From GLM-4.5 on models think unless the template's `enable_thinking` is false.",
        cache="Every layer keeps keys and values of all tokens; GLM-4.7-Flash and GLM-5 have "
        "latent attention.",
        caveats=(
            Caveat(
                "The layers that predict several tokens are left out, as mlx-lm has no use for "
                "them.",
                _MLX_LM.format("glm4_moe.py, sanitize"),
            ),
        ),
        example=Example(
            "zai-org/GLM-4-9B-0414",
            {
                **_LLAMA_8B, "model_type": "glm4", "num_hidden_layers": 40,
                "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 13696,
                "vocab_size": 151552, "partial_rotary_factor": 0.5, "attention_bias": True,
                "rope_theta": 10000.0, "max_position_embeddings": 32768,
            },
        ),
    ),
    Family(
        key="phi",
        title="Phi",
        model_types=("phi3", "phimoe", "phi"),
        vocabularies=(),
        sampling=(),
        written=None,
        thinking="The models called reasoning think before they answer, the others do not.",
        cache="Every layer keeps keys and values of all tokens; the window of Phi-3 mini is one "
        "that mlx-lm leaves out.",
        caveats=(
            Caveat(
                "Phi-3 mini runs without its attention window; for longer texts it is not the "
                "original model.",
                _OURS,
            ),
            Caveat(
                "Phi-3 and Phi-4 mini for long contexts run with the long factors of their "
                "rotation also for short texts.",
                _OURS,
            ),
        ),
        example=Example(
            "microsoft/phi-4",
            {
                "model_type": "phi3", "hidden_size": 5120, "num_hidden_layers": 40,
                "intermediate_size": 17920, "num_attention_heads": 40, "num_key_value_heads": 10,
                "vocab_size": 100352, "rms_norm_eps": 1e-5, "rope_theta": 250000.0,
                "max_position_embeddings": 16384, "original_max_position_embeddings": 16384,
                "tie_word_embeddings": False,
            },
        ),
    ),
)  # fmt: skip

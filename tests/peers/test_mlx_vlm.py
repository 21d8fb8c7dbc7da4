"""A multimodal model, exported: mlx-lm loads its language model, mlx-vlm all of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from optiq.quantize.export import export
from optiq.sources import Source, resolve
from tests.peers.packages import ask, install
from tests.planned import scores_of
from tests.scored import build
from tests.tiny import BOS, EOS, PAD, VOCAB, write_tokenizer

pytestmark = pytest.mark.families  # mlx-vlm is 40 MB, and starts slowly

ORACLE = Path(__file__).with_name("oracle_mlx_vlm.py")
TEXT = [1, 5, 9, 200, 17, 33, 4, 80]  # the oracle's
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
}
IDS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "image_token_id": 300}
QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "out_hidden_size": 64,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma4": {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "vocab_size": VOCAB,
        "audio_token_id": 301,
        "text_config": {
            **SIZES,
            "model_type": "gemma4_text",
            "num_hidden_layers": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "global_head_dim": 32,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": VOCAB,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 64,
            "use_double_wide_mlp": True,
            "tie_word_embeddings": True,
            "final_logit_softcapping": 30.0,
            "rope_parameters": {
                "full_attention": {
                    "partial_rotary_factor": 0.25,
                    "rope_theta": 1000000.0,
                    "rope_type": "proportional",
                },
                "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
            },
        },
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "global_head_dim": 32,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
            "default_output_length": 4,
            "use_clipped_linears": True,
        },
        "audio_config": {
            "model_type": "gemma4_audio",
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "output_proj_dims": 64,
            "subsampling_conv_channels": [8, 4],
        },
    },
    "qwen3_5": {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "video_token_id": 301,
        "vision_start_token_id": 302,
        "vision_end_token_id": 303,
        "tie_word_embeddings": False,
        "text_config": {
            **SIZES,
            "model_type": "qwen3_5_text",
            "num_hidden_layers": 4,
            "head_dim": 32,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_conv_kernel_dim": 4,
            "tie_word_embeddings": False,
            "full_attention_interval": 2,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [2, 1, 1],
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
            },
        },
        "vision_config": {
            **QWEN_VISION,
            "model_type": "qwen3_5",
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [],
        },
    },
    "qwen3_vl": {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "video_token_id": 301,
        "vision_start_token_id": 302,
        "vision_end_token_id": 303,
        "tie_word_embeddings": False,
        "text_config": {
            **SIZES,
            "model_type": "qwen3_vl_text",
            "num_hidden_layers": 2,
            "head_dim": 32,
            "rope_theta": 10000.0,
            "rope_scaling": {"rope_type": "default", "type": "default", "mrope_section": [8, 4, 4]},
            "tie_word_embeddings": False,
        },
        "vision_config": {
            **QWEN_VISION,
            "model_type": "qwen3_vl",
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    },
    "qwen2_5_vl": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "video_token_id": 301,
        "vision_start_token_id": 302,
        "vision_end_token_id": 303,
        **SIZES,
        "num_hidden_layers": 2,
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "default", "type": "default", "mrope_section": [4, 2, 2]},
        "tie_word_embeddings": False,
        "vision_config": {
            **QWEN_VISION,
            "model_type": "qwen2_5_vl",
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    },
    "mistral3": {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "image_token_index": 300,
        "spatial_merge_size": 2,
        "multimodal_projector_bias": False,
        "vision_feature_layer": -1,
        "text_config": {
            **SIZES,
            "model_type": "mistral",
            "num_hidden_layers": 2,
            "head_dim": 16,
            "rope_theta": 10000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "head_dim": 32,
            "image_size": 32,
            "patch_size": 4,
            "rope_theta": 10000.0,
        },
    },
}


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlx-vlm")
    install(folder, "mlx-vlm==0.7.10")
    return folder


@pytest.fixture(scope="module")
def sources(peer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    parent = tmp_path_factory.mktemp("sources")
    cases = []
    for kind, config in CONFIGS.items():
        folder = parent / kind
        folder.mkdir()
        full = {"model_type": kind, "torch_dtype": "float32", **IDS, **config}
        (folder / "config.json").write_text(json.dumps(full))
        write_tokenizer(folder)
        cases.append(["make", str(folder), full, 0])
    ask(ORACLE, peer, cases)
    return {kind: resolve(str(parent / kind)) for kind in CONFIGS}


@pytest.fixture(scope="module")
def runs(
    peer: Path, sources: dict[str, Source], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """What mlx-vlm loads of each source and of each export, in one process: it starts slowly."""
    parent = tmp_path_factory.mktemp("exported")
    folders: dict[tuple[str, str], Path] = {}
    for kind, source in sources.items():
        assert source.towers
        folders[kind, "source"] = source.path
        for name, towers in (("keep", source.towers), ("8bit", source.towers.rounded())):
            chosen = replace(source, towers=towers)
            folders[kind, name] = out = parent / f"{kind}-{name}"
            export(chosen, build(scores_of(chosen), "8bpw"), out)
    files = {case: str(parent / f"{'-'.join(case)}.npz") for case in folders}
    ask(ORACLE, peer, [["run", str(folders[case]), files[case]] for case in folders])
    found = {case: dict(np.load(file)) for case, file in files.items()}
    for case, folder in folders.items():
        found[case]["mlx-lm"] = np.array(load_model(folder)[0](mx.array([TEXT])))
    return found


@pytest.mark.parametrize("kind", CONFIGS)
def test_mlx_vlm_loads_the_towers_of_the_source(runs: Any, kind: str) -> None:
    before, after = runs[kind, "source"], runs[kind, "keep"]
    towers = {name for name in before if name.startswith("parameter:")}
    assert towers == {name for name in after if name.startswith("parameter:")}
    for name in towers:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    assert any("vision_tower" in name for name in towers)
    assert any("audio_tower" in name for name in towers) == (kind == "gemma4")
    distance = np.abs(after["picture"] - before["picture"]).mean()
    assert distance < 0.1 * np.abs(before["picture"]).mean()


@pytest.mark.parametrize("towers", ["keep", "8bit"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_both_load_the_same_language_model(runs: Any, kind: str, towers: str) -> None:
    found = runs[kind, towers]
    np.testing.assert_allclose(found["text"], found["mlx-lm"], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_towers_in_8_bits_see_nearly_the_same(runs: Any, kind: str) -> None:
    kept, rounded = runs[kind, "keep"], runs[kind, "8bit"]
    quantized = [name for name in rounded if name.endswith(".scales")]
    assert len(quantized) >= 10
    assert not any(name.endswith(("embed.scales", "embedding.scales")) for name in quantized)
    difference = np.abs(rounded["picture"] - kept["picture"]).mean()
    assert 0 < difference < 0.02 * np.abs(kept["picture"]).mean()

"""Configs as transformers' own classes save them: the same model as from plain arguments, or none.

The truth is mlx-lm's model from arguments written out as its model file reads them.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load_model
from transformers import AutoConfig

from optiq.errors import SourceError
from optiq.sources import load, resolve
from tests.tiny import VOCAB, random_weights, write_tokenizer

TOKENS = mx.array([list(range(5, 45))])
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
SCALINGS: list[dict[str, Any] | None] = [
    None,
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 3.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "granite": {"logits_scaling": 2.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.3},
    "olmo2": {},
    "starcoder2": {"sliding_window": None},
    "stablelm": {},
    "glm4": {"attention_bias": False},
}
EPSILONS = {"starcoder2": "norm_epsilon", "stablelm": "layer_norm_eps"}
PARTIAL = ("stablelm", "glm4")
IGNORING = (
    "mixtral",
    "starcoder2",
    "stablelm",
    "nemotron",
    "glm4",
)  # their files in mlx-lm know no scaling


@st.composite
def configs(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the class of a family is made of, and the same as its model file would read it."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    theta = draw(st.sampled_from([1e4, 5e5, 1e6]))
    scaled = draw(st.sampled_from(SCALINGS))
    said = {
        **SIZES,
        **FAMILIES[family],
        "tie_word_embeddings": draw(st.booleans()),
    }
    said[EPSILONS.get(family, "rms_norm_eps")] = draw(st.sampled_from([1e-5, 1e-6, 1e-3]))
    rope = {"rope_theta": theta, **(scaled or {"rope_type": "default"})}
    plain = {**said, "rope_theta": theta}
    if family in PARTIAL:
        part = draw(st.sampled_from([0.25, 0.5, 1.0]))
        rope["partial_rotary_factor"] = plain["partial_rotary_factor"] = part
    if scaled:
        plain["rope_scaling"] = {**scaled, "type": scaled["rope_type"]}
    return {"model_type": family, **said, "rope_parameters": rope}, {"model_type": family, **plain}


@settings(max_examples=25, deadline=None)
@given(configs())
def test_what_transformers_saves_is_the_same_model_or_none(
    made: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    said, plain = made
    with TemporaryDirectory() as tmp:
        truth, saved = Path(tmp) / "truth", Path(tmp) / "saved"
        truth.mkdir()
        saved.mkdir()
        kind = said["model_type"]
        AutoConfig.for_model(**said).save_pretrained(saved)
        full = json.loads((saved / "config.json").read_text()) | plain
        (truth / "config.json").write_text(json.dumps(full))
        weights = random_weights(full, "float32", 0)
        for folder in (truth, saved):
            mx.save_safetensors(str(folder / "model.safetensors"), weights)
            write_tokenizer(folder)
        if kind in IGNORING and "rope_scaling" in plain:
            with pytest.raises(SourceError, match=r"rope_parameters.* does not read it"):
                resolve(str(saved))
            return
        got = load(resolve(str(saved))).model(TOKENS)
        want = load_model(truth)[0](TOKENS)
        assert mx.array_equal(got, want), said


@pytest.mark.parametrize("theta", [1e4, 3e5])
def test_gemma3_of_transformers_5(tmp_path: Path, theta: float) -> None:
    """Its rotary parameters are told apart by the type of layer, and the period is not saved."""
    said = {
        **SIZES,
        "num_hidden_layers": 4,
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": theta},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
    }
    AutoConfig.for_model("gemma3_text", **said, rope_parameters=rope).save_pretrained(tmp_path)
    plain = {
        **json.loads((tmp_path / "config.json").read_text()),
        "rope_theta": theta,
        "rope_local_base_freq": 20000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 2,
    }
    weights = random_weights({**plain, "tie_word_embeddings": True}, "float32", 0)
    truth = tmp_path / "truth"
    truth.mkdir()
    (truth / "config.json").write_text(json.dumps(plain))
    for folder in (truth, tmp_path):
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
        write_tokenizer(folder)
    got = load(resolve(str(tmp_path))).model(TOKENS)
    assert mx.array_equal(got, load_model(truth)[0](TOKENS))

"""What the files say is what the model holds: handed on to mlx-lm, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load_model

from optiq.errors import SourceError
from optiq.sources import load, resolve
from optiq.sources.check import check
from optiq.sources.folder import Folder, check_folder
from optiq.sources.tensors import reasons
from optiq.sources.values import NEUTRAL
from tests.architectures import MODELS
from tests.tiny import random_weights, tiny_folder

TOKENS = mx.array([list(range(5, 40))])
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def edit(folder: Path, **changes: Any) -> None:
    """Change config.json; a value of ... takes the key out."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def logits(folder: Path) -> mx.array:
    return load(resolve(str(folder))).model(TOKENS)


def stock(folder: Path) -> mx.array:
    return load_model(folder)[0](TOKENS)


def refused(folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        load(resolve(str(folder)))
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder) in text
    return text


def family(parent: Path, model_type: str, **changes: Any) -> Path:
    """A tiny folder of a family with the llama's sizes."""
    folder = tiny_folder(parent, tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": model_type, "architectures": [], **changes}
    (folder / "config.json").write_text(json.dumps(config))
    weights = random_weights(config, "float32", 0)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "mixtral": MOE,
    "gpt_oss": {**MOE, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"original_max_position_embeddings": 512},
    "starcoder2": {"norm_epsilon": 1e-5, "hidden_act": "gelu_pytorch_tanh"},
    "olmo2": {},
    "granite": {
        "logits_scaling": 2.0,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
    },
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_theta_is_handed_on_from_the_spelling_of_transformers_5(
    tmp_path: Path, model_type: str
) -> None:
    folder = family(tmp_path, model_type, rope_theta=77777.0, **FAMILIES[model_type])
    want = stock(folder)
    edit(folder, rope_theta=..., rope_parameters={"rope_theta": 77777.0, "rope_type": "default"})
    source = resolve(str(folder))
    assert source.settings["rope_theta"] == 77777.0
    np.testing.assert_array_equal(load(source).model(TOKENS), want)


@pytest.mark.parametrize(
    "scaled",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", **LLAMA3},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
)
def test_scaling_is_handed_on(tmp_path: Path, scaled: dict[str, Any]) -> None:
    folder = tiny_folder(tmp_path, rope_theta=5000.0, rope_scaling=scaled)
    want = stock(folder)
    edit(folder, rope_theta=..., rope_scaling=..., rope_parameters={"rope_theta": 5000.0, **scaled})
    np.testing.assert_array_equal(logits(folder), want)


def test_the_types_of_layers_have_their_own_theta(tmp_path: Path) -> None:
    changes = {"rope_theta": 70000.0, "rope_local_base_freq": 7000.0}
    folder = tiny_folder(tmp_path, "gemma3_text", **changes)
    linear = {"rope_type": "linear", "factor": 8.0}
    edit(folder, rope_scaling=linear)
    want = stock(folder)
    edit(
        folder,
        rope_theta=...,
        rope_local_base_freq=...,
        rope_scaling=...,
        sliding_window_pattern=...,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 7000.0},
            "full_attention": {"rope_theta": 70000.0, **linear},
        },
    )
    np.testing.assert_array_equal(logits(folder), want)


def inside_another(folder: Path) -> None:
    """Make the folder of a llama that of a model with pictures, whose language model it is."""
    config = json.loads((folder / "config.json").read_text())
    theta = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    edit(
        folder,
        model_type="mistral3",
        rope_theta=...,
        text_config={**config, "model_type": "mistral", "rope_parameters": theta},
    )


def test_the_config_of_a_language_model_inside_another(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, tie_word_embeddings=False, rope_theta=5000.0)
    want = stock(folder)
    inside_another(folder)
    source = resolve(str(folder))
    assert source.settings["text_config"]["rope_theta"] == 5000.0
    np.testing.assert_array_equal(load(source).model(TOKENS), want)


def test_two_spellings_that_differ_are_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, rope_parameters={"rope_theta": 500.0, "rope_type": "default"})
    assert "rope_theta 10000.0 and in rope_parameters 500.0" in refused(folder)
    edit(folder, rope_theta=500.0)
    logits(folder)
    edit(folder, rope_scaling={"type": "linear", "factor": 2.0})
    logits(folder)
    edit(folder, rope_parameters={"rope_theta": 500.0, "rope_type": "linear", "factor": 4.0})
    assert "rope_scaling" in refused(folder)


MAMBA = {**MODELS["mamba2"], "head_dim": 16}
NO_BIAS = {"attention_bias": False, "mlp_bias": False}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
UNREAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "scaling of mixtral": ("mixtral", {**MOE, "rope_scaling": YARN}, "rope_scaling"),
    "scaling that phi3 drops": (
        "phi3",
        {
            "original_max_position_embeddings": 512,
            "rope_scaling": {**YARN, "type": "yarn", "long_factor": [1.0]},
        },
        "rope_scaling",
    ),
    "softcap": ("nanochat", {"final_logit_softcapping": 20.0}, "final_logit_softcapping 20.0"),
    "multiplier": (
        "internlm2",  # of which transformers knows nothing
        {"bias": False, "embedding_multiplier": 12.0},
        "embedding_multiplier 12.0",
    ),
    "part of a head": (
        "glm",
        {"head_dim": 16, "attention_bias": False, "partial_rotary_factor": 0.5},
        "partial_rotary_factor 0.5",
    ),
    "factor of attention": (
        "helium",  # whose file takes no scaling
        {"rope_scaling": {**YARN, "attention_factor": 1.5}, "head_dim": 16, **NO_BIAS},
        "rope_scaling",
    ),
    "weight of the attention's factor": (
        "llama",
        {"rope_scaling": {**YARN, "mscale_all_dim": 0.7}},
        "rope_scaling",
    ),
    "factor below 1": (
        "llama",
        {"rope_scaling": {**YARN, "attention_factor": 0.5}},
        "rope_scaling.attention_factor 0.5",
    ),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "epsilon": ("nanochat", {"rms_norm_eps": 1e-3}, "rms_norm_eps 0.001"),
    "epsilon of the blocks alone": (
        "mamba2",
        {**MAMBA, "layer_norm_epsilon": 1e-3, "rms_norm_eps": None},
        "layer_norm_epsilon 0.001",
    ),
}


@pytest.mark.parametrize("what", UNREAD)
def test_a_value_that_the_model_file_does_not_read_is_refused(tmp_path: Path, what: str) -> None:
    model_type, changes, said = UNREAD[what]
    folder = family(tmp_path, model_type, **changes)
    message = refused(folder)
    assert said in message
    assert "does not read it" in message
    assert "cannot run this model as it is" in message
    assert "take it out" not in message  # that would be another model


WINDOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "all layers": ("starcoder2", {"norm_epsilon": 1e-5, "hidden_act": "gelu_pytorch_tanh"}),
    "all layers of mistral": ("mistral", {}),
    "all layers, and the file knows windows": (
        "ministral3",
        {"rope_parameters": {**YARN, "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}},
    ),
    "some layers": (
        "qwen2",
        {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}


@pytest.mark.parametrize("what", WINDOWS)
def test_a_window_that_the_model_file_leaves_out_is_told(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model is the same for shorter texts, so it is taken."""
    model_type, changes = WINDOWS[what]
    folder = family(tmp_path, model_type, sliding_window=64, **changes)
    (departure,) = resolve(str(folder)).departures
    assert departure in (said := capsys.readouterr().err)
    assert "without its attention window of 64 tokens; for longer texts it is not the ori" in said
    edit(folder, sliding_window=4096)  # no text is that long
    resolve(str(folder))
    quiet = "layer_types" not in changes
    assert (capsys.readouterr().err == "") is quiet


def test_a_small_epsilon_that_the_file_writes_out_larger_is_told(tmp_path: Path) -> None:
    """transformers' default for nanochat is 1e-6, and mlx-lm's file has 1e-5."""
    folder = family(tmp_path, "nanochat", rms_norm_eps=1e-6, hidden_act="relu2")
    (departure,) = resolve(str(folder)).departures
    assert departure == "with an epsilon of 1e-05 in its norms, where rms_norm_eps is 1e-06"
    edit(folder, rms_norm_eps=1e-5)
    assert resolve(str(folder)).departures == ()


def test_names_that_transformers_gives_a_value_are_synonyms(tmp_path: Path) -> None:
    """transformers 5 saves exaone's num_layers as num_hidden_layers."""
    sizes = {"num_layers": 2, "layer_norm_epsilon": 1e-5, "activation_function": "silu"}
    folder = family(tmp_path, "exaone", rope_scaling=None, **sizes)
    want = stock(folder)
    edit(folder, num_layers=..., layer_norm_epsilon=..., num_hidden_layers=2, rms_norm_eps=1e-5)
    np.testing.assert_array_equal(logits(folder), want)


def test_a_null_is_what_transformers_takes_for_it(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    want = stock(folder)
    edit(folder, rope_theta=None)
    np.testing.assert_array_equal(logits(folder), want)


def test_values_that_change_nothing_are_taken(tmp_path: Path) -> None:
    nothing = {
        "sliding_window": 4096,
        "final_logit_softcapping": None,
        "embedding_multiplier": 1.0,
        "partial_rotary_factor": 1.0,
        "rope_scaling": {"rope_type": "default"},
        "layer_norm_eps": 1e-12,
    }
    folder = family(tmp_path, "qwen2", **nothing)
    logits(folder)
    edit(folder, sliding_window=64, use_sliding_window=False)
    logits(folder)
    edit(folder, use_sliding_window=..., embedding_multiplier=3.0)  # no word of qwen2's
    logits(folder)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("said", [..., None, True])
def test_a_head_of_its_own_is_kept(tmp_path: Path, kind: str, said: Any) -> None:
    folder = tiny_folder(tmp_path, kind, tie_word_embeddings=False)
    want = stock(folder)
    edit(folder, tie_word_embeddings=said)
    source = resolve(str(folder))
    assert source.settings == {"tie_word_embeddings": False}
    if said is not None:  # transformers takes no null, so there is no tokenizer
        np.testing.assert_array_equal(load(source).model(TOKENS), want)


def test_a_head_that_differs_in_one_value_is_kept(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, tie_word_embeddings=True)
    want = stock(folder)
    path = str(folder / "model.safetensors")
    weights = dict(mx.load(path))
    mx.eval(weights)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * 1
    mx.save_safetensors(path, weights)
    assert check(check_folder(folder)).dropped == {"a head equal to the embedding": 1}
    np.testing.assert_array_equal(logits(folder), want)
    weights["lm_head.weight"][-1, -1] += 1
    mx.save_safetensors(path, weights)
    assert mx.abs(logits(folder) - want).max().item() > 1e-3


def test_what_is_dropped_is_named(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    path = str(folder / "model.safetensors")
    weights = dict(mx.load(path))
    mx.eval(weights)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = mx.ones(8)
    mx.save_safetensors(path, weights)
    checked = check(check_folder(folder))
    assert checked.dropped == {"computed by the model itself": 1}
    assert checked.tensors == len(weights)


def test_a_tensor_without_use_is_refused(tmp_path: Path) -> None:
    """bitnet's file drops nothing but a head, so the case needs a family that drops more."""
    folder = family(tmp_path, "mixtral", **MOE)
    path = str(folder / "model.safetensors")
    weights = dict(mx.load(path))
    mx.eval(weights)
    # mixtral's file stacks four experts; a fifth stays beside them, and nothing takes it.
    for name in list(weights):
        if "switch_mlp" in name:
            old = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[name.split(".")[-2]]
            for i, expert in enumerate(weights.pop(name)):
                prefix = name.split("switch_mlp")[0]
                weights[f"{prefix}experts.{i}.{old}.weight"] = expert
    mx.save_safetensors(path, weights)
    assert check(check_folder(folder)).traced
    logits(folder)
    weights[f"{prefix}experts.4.w1.weight"] = mx.ones((128, 64))
    mx.save_safetensors(path, weights)
    assert "experts.4.w1.weight" in refused(folder)


def test_two_tensors_for_one_place_are_refused(tmp_path: Path) -> None:
    """mlx-lm gives both the same name, and the later one wins."""
    folder = tiny_folder(tmp_path, tie_word_embeddings=False)
    inside_another(folder)
    path = str(folder / "model.safetensors")
    weights = dict(mx.load(path))
    mx.eval(weights)
    mx.save_safetensors(path, {**weights, "vision_tower.patch.weight": mx.ones((4, 4))})
    assert check(check_folder(folder)).dropped == {"of other media than text": 1}
    mx.save_safetensors(path, {**weights, "model.language_model.norm.weight": mx.ones(64)})
    assert "drops it from mistral3, which gives another model" in refused(folder)


def test_a_tensor_in_two_files_is_refused_in_either_order(tmp_path: Path) -> None:
    for name, number in (("model.safetensors", 1), ("model-00003-of-00003.safetensors", 2)):
        folder = tiny_folder(tmp_path, shards=2, name=f"m{number}")
        stale = tiny_folder(tmp_path, seed=1, name=f"stale{number}")
        (stale / "model.safetensors").rename(folder / name)
        message = refused(folder)
        assert f"in {name}" in message or f"and in {name}" in message
        assert f"{name} is not in model.safetensors.index.json" in message
        (folder / "model.safetensors.index.json").unlink()
        assert "remove the file that is left" in refused(folder)


def test_layers_behind_the_last_are_known_where_they_can_be(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in (3, 4, 5, 6)]
    why = "of the prediction of several tokens"
    config = {"num_hidden_layers": 4}
    assert list(reasons(names, config).values()) == [None, why, None, None]
    config["num_nextn_predict_layers"] = 2
    assert list(reasons(names, config).values()) == [None, why, why, None]
    assert list(reasons(names, {"text_config": config}).values()) == [None, why, why, None]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["rope_theta", "rope_type", "type", "factor", "full_attention"]), inner
        )
    ),
    max_leaves=6,
)
KEYS = [
    *NEUTRAL,
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "layer_types",
    "max_position_embeddings",
    "use_sliding_window",
    "tie_word_embeddings",
    "hidden_act",
    "rms_norm_eps",
    "num_hidden_layers",
    "text_config",
    "architectures",
]


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["llama", "qwen2", "mixtral", "mistral3"]),
    st.dictionaries(st.sampled_from(KEYS), JSON),
)
@example("llama", {"hidden_act": "gelu\n"})
def test_whatever_stands_in_a_config_is_one_line_or_a_model(
    model_type: str, said: dict[str, Any]
) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64}
    heads = {"num_attention_heads": 4, "rms_norm_eps": 1e-5, "vocab_size": 9}
    said["num_hidden_layers"] = 2  # a large one would be made
    config = {"model_type": model_type, **sizes, **heads, **said}
    said_of_it = ""
    try:
        check(Folder(Path("here"), config, {}))
    except SourceError as error:
        said_of_it = str(error)
    assert "\n" not in said_of_it

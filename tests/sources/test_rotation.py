"""Rotary embeddings in numbers: those of transformers 5.24, and of mlx-lm's modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.rope_utils import initialize_rope

from optiq.errors import SourceError
from optiq.sources import load, resolve
from optiq.sources.rotation import Rotation, of_module, rotation, rotations
from tests.tiny import tiny_folder

CONFIG = {"max_position_embeddings": 512}
# What modeling_rope_utils of transformers gave for heads of 8, theta 10,000 and a context of 512;
# "dynamic" and "longrope" for a text of 1,024 tokens.
TRUTH: dict[str, tuple[dict[str, Any], list[float], float]] = {
    "linear": (
        {"rope_type": "linear", "factor": 3.0},
        [0.333333, 0.0333333, 0.00333333, 0.000333333],
        1.000000,
    ),
    "dynamic": (
        {"rope_type": "dynamic", "factor": 3.0},
        [1.0, 0.0629961, 0.0039685, 0.00025],
        1.000000,
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        [1.0, 0.0130423, 0.00125, 0.000125],
        1.000000,
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        [1.0, 0.0625, 0.0025, 0.00025],
        1.138629,
    ),
    "yarn_trunc": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "truncate": False,
        },
        [1.0, 0.0255952, 0.0025, 0.00025],
        1.138629,
    ),
    "yarn_m": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7},
        [1.0, 0.0625, 0.0025, 0.00025],
        1.138629,
    ),
    "yarn_mall": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "mscale_all_dim": 0.7,
        },
        [1.0, 0.0625, 0.0025, 0.00025],
        1.138629,
    ),
    "yarn_both": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
        },
        [1.0, 0.0625, 0.0025, 0.00025],
        1.037910,
    ),
    "yarn_af_beta": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 4.0,
            "beta_slow": 2.0,
            "attention_factor": 1.3,
        },
        [1.0, 0.025, 0.0025, 0.00025],
        1.300000,
    ),
    "yarn_null": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": None,
            "beta_slow": None,
            "attention_factor": None,
        },
        [1.0, 0.0625, 0.0025, 0.00025],
        1.138629,
    ),
    "longrope": (
        {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.0, 1.0, 1.0],
            "long_factor": [1.0, 1.5, 2.0, 4.0],
            "original_max_position_embeddings": 64,
        },
        [1.0, 0.0666667, 0.005, 0.00025],
        1.224745,
    ),
    "longrope_factor": (
        {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.0, 1.0, 1.0],
            "long_factor": [1.0, 1.5, 2.0, 4.0],
            "original_max_position_embeddings": 64,
            "factor": 2.0,
        },
        [1.0, 0.0666667, 0.005, 0.00025],
        1.080123,
    ),
    "proportional": (
        {"rope_type": "proportional", "partial_rotary_factor": 0.5},
        [1.0, 0.1, 0.0, 0.0],
        1.000000,
    ),
}
OTHERWISE = ("yarn_trunc", "yarn_m", "yarn_mall", "yarn_af_beta", "yarn_null", "longrope_factor")


def asked(name: str) -> dict[str, Any]:
    return {"rope_theta": 10000.0, **TRUTH[name][0]}


@pytest.mark.parametrize("name", TRUTH)
def test_the_numbers_are_those_of_transformers(name: str) -> None:
    _, frequencies, magnitude = TRUTH[name]
    found = rotation(asked(name), CONFIG, 8)
    assert found is not None
    np.testing.assert_allclose(found.frequencies, frequencies, rtol=1e-5)
    assert found.magnitude == pytest.approx(magnitude, rel=1e-5)


@pytest.mark.parametrize("name", [n for n in TRUTH if n not in (*OTHERWISE, "dynamic")])
def test_mlx_lm_makes_the_same_module(name: str) -> None:
    module = initialize_rope(8, 1e4, False, asked(name), CONFIG["max_position_embeddings"])
    found, wanted = of_module(module), rotation(asked(name), CONFIG, 8)
    assert found is not None
    assert wanted is not None
    assert wanted.like(found)
    assert not wanted.like(Rotation(8, False, found.frequencies, found.magnitude * 1.01))
    assert not wanted.like(Rotation(8, False, (1.0, *found.frequencies[2:], 0.5)))


def test_a_rotation_of_no_numbers_is_not_known() -> None:
    assert rotation({"rope_theta": "x"}, CONFIG, 8) is None
    assert rotation({"rope_theta": 1e4, "rope_type": "linear"}, CONFIG, 8) is None
    assert rotation({"rope_theta": 1e4, "rope_type": "dynamic", "factor": -5.0}, CONFIG, 8) is None
    assert rotation({"rope_theta": 1e4, "rope_type": "unheard of"}, CONFIG, 8) is None


# As mlx-lm's file reads none of these, the model is made with a factor for each frequency.
HANDED_ON = ["yarn_trunc", "yarn_m", "yarn_mall", "yarn_af_beta", "yarn_null"]


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("name", HANDED_ON)
def test_what_mlx_lm_computes_otherwise_is_handed_on_or_refused(
    tmp_path: Path, name: str, new: bool
) -> None:
    """In either spelling; the truth are the numbers of `rotation`, proven above."""
    folder = tiny_folder(tmp_path)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if new:
        config.pop("rope_theta")
        config["rope_parameters"] = asked(name)
    else:
        config["rope_scaling"] = {k: v for k, v in asked(name).items() if k != "rope_theta"}
    path.write_text(json.dumps(config))
    wanted = rotation(asked(name), config, 16)
    assert wanted is not None
    if "mscale_all_dim" in asked(name):
        with pytest.raises(SourceError, match=r"mscale_all_dim': 0\.7.* changes the model"):
            resolve(str(folder))
        return
    source = resolve(str(folder))
    assert source.departures == ()
    model = load(source).model
    (found,) = rotations(model)
    np.testing.assert_allclose(found.frequencies, wanted.frequencies, rtol=1e-5)
    assert found.magnitude == pytest.approx(wanted.magnitude, rel=1e-5)
    x = mx.random.normal((1, 1, 9, 16), key=mx.random.key(0))
    np.testing.assert_allclose(model.layers[0].self_attn.rope(x), turned(x, wanted), atol=1e-4)


def turned(x: mx.array, by: Rotation) -> Any:
    """The first half of each head against the second, in float64."""
    values = np.asarray(x, np.float64)
    angles = np.arange(x.shape[-2])[:, None] * np.array(by.frequencies)
    a, b = np.split(values * by.magnitude, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def test_what_only_a_notice_can_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Longer factors for short texts, and truncate where the file takes no longrope."""
    long = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    long |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    folder = tiny_folder(tmp_path, rope_scaling=long)
    (said,) = resolve(str(folder)).departures
    assert "up to 64 tokens, where the original has the short ones" in said
    assert said in capsys.readouterr().err
    same = tiny_folder(tmp_path, rope_scaling=long | {"short_factor": [2.0] * 8}, name="same")
    assert resolve(str(same)).departures == ()

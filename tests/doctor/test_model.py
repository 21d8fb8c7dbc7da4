"""`optiq doctor MODEL` prints the check of a source."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from optiq.cli import main
from optiq.doctor.model import examine_model
from tests.tiny import tiny_folder


def test_a_sound_model(tmp_path: Path) -> None:
    found = {f.name: f.value for f in examine_model(str(tiny_folder(tmp_path, shards=2)))}
    assert found["architecture"] == "llama"
    assert found["weights"] == "float32"
    assert found["files"].startswith("2, 20 tensors")
    assert found["tensors"] == "all used"
    assert "handed on to mlx-lm" not in found


def test_what_is_handed_on_and_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_folder(tmp_path)
    path = str(folder / "model.safetensors")
    weights = dict(mx.load(path))
    mx.eval(weights)
    mx.save_safetensors(
        path, {**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": mx.ones(8)}
    )
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["doctor", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "1: computed by the model itself" in said
    assert "rope_theta 10000.0" in said


def test_a_window_that_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_folder(tmp_path, "qwen2", sliding_window=64, use_sliding_window=True)
    assert main(["doctor", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "without its attention window of 64 tokens" in said
    assert "64 tokens" in said


def test_a_refusal_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_folder(tmp_path, hidden_act="gelu")
    assert main(["doctor", str(folder)]) == 1
    said = capsys.readouterr()
    assert not said.out
    assert len(said.err.strip().splitlines()) == 1
    assert "hidden_act 'gelu'" in said.err
    assert main(["doctor", str(folder), "--selftest"]) == 2

"""sensitivity.json: whole or absent, checked when read; mlx-optiq's file is understood."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from optiq.errors import SensitivityError
from optiq.models.roles import Module, Role
from optiq.planning.scores import check
from optiq.quantize.sensitivity.measure import load, save

MODULES = [
    Module("model.embed_tokens", Role.EMBEDDING, "e", (384, 64), None, True),
    Module("model.layers.0.mlp.gate", Role.ROUTER, "r", (4, 64), 0),
    Module("model.layers.0.self_attn.q_proj", Role.ATTENTION, "qkv", (64, 64), 0),
    Module("model.layers.0.self_attn.o_proj", Role.ATTENTION, "o", (64, 32), 0),
]
MODEL = {"name": "m", "fingerprint": "f", "model_type": "llama", "dtype": "bfloat16",
         "itemsize": 2, "fixed_bytes": 10}  # fmt: skip
PEER = {
    "base_model": "m",
    "candidate_bits": [4, 8, 16],
    "group_size": 64,
    "metric": "kl_divergence_vs_reference",
    "layers": [
        {"layer_name": "model.layers.0.self_attn.q_proj", "param_count": 4096, "metadata": {},
         "sensitivities": {"4": 3.5e-3, "8": 3.7e-5, "16": 0.0}},
        {"layer_name": "model.layers.0.self_attn.o_proj", "param_count": 2048, "metadata": {},
         "sensitivities": {"4": 1e-3, "8": 1e-5, "16": 0.0}},
    ],
}  # fmt: skip


def scores() -> dict[str, Any]:
    return {
        "schema": 1,
        "kind": "optiq.sensitivity",
        "model": dict(MODEL),
        "method": "kl",
        "metric": "nats per token",
        "reference": "bf16",
        "rounding": "minmax",
        "calibration": {"source": "s", "tokens": 1, "sequences": 1, "tokens_per_domain": {},
                        "sha256": "x", "seed": 0},
        "machine": {},
        "versions": {},
        "seconds": 1.0,
        "modules": [
            {"path": "a", "role": "mlp", "unit": "a", "block": 0, "shape": [64, 64],
             "scores": {"4g64": {"kl": 0.1, "se": None}, "bf16": {"kl": 0.0, "se": 0.0}}}
        ],
    }  # fmt: skip


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "s.json"
    save(scores(), path)
    assert load(path) == scores()
    assert [p.name for p in path.parent.iterdir()] == ["s.json"]


def broken(change: str) -> dict[str, Any]:
    data: Any = copy.deepcopy(scores())
    exec(change, {"d": data, "m": data["modules"][0], "nan": float("nan")})
    return dict(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("d['kind'] = 'x'", "not a sensitivity file"),
        ("d['schema'] = 2", "schema 2"),
        ("del d['method'], d['model']['itemsize']", "lacks method, model.itemsize"),
        ("d['calibration'] = None", r"lacks calibration\.source"),
        ("d['modules'] = []", "no modules"),
        ("del m['shape']", "module 0 lacks shape"),
        ("m['role'] = 'x'", r"\(a\) has the unknown role 'x'"),
        ("m['scores'] = {}", "no scores"),
        ("m['scores']['7g64'] = {'kl': 0}", "7 bits"),
        ("m['scores']['4g64']['kl'] = nan", "no finite score for 4g64"),
        ("m['scores']['4g64'] = {'kl': 1.0, 'se': nan}", "no finite score for 4g64"),
        ("m['scores']['4g64']['mse'] = nan", "no finite score for 4g64"),
        ("m['scores']['4g64']['kl'] = True", "no finite score for 4g64"),
        ("del m['scores']['4g64']['kl']", "no finite score for 4g64"),
    ],
)
def test_broken_data_is_named(change: str, message: str, tmp_path: Path) -> None:
    data = broken(change)
    with pytest.raises(SensitivityError, match=message):
        check(data, "s.json")
    path = tmp_path / "s.json"
    path.write_text("old")
    with pytest.raises(SensitivityError, match=message):
        save(data, path)
    assert path.read_text() == "old"
    path.write_text(json.dumps(data))
    with pytest.raises(SensitivityError, match=f"^{path}"):
        load(path)


def test_unreadable_and_unwritable_files(tmp_path: Path) -> None:
    with pytest.raises(SensitivityError, match=r"none\.json cannot be read"):
        load(tmp_path / "none.json")
    (tmp_path / "file").write_text("x")
    with pytest.raises(SensitivityError, match="cannot be written"):
        save(scores(), tmp_path / "file" / "s.json")


def test_mlx_optiq_file(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps(PEER))
    found = load(path, model=MODEL, modules=MODULES)
    assert found["model"] == MODEL
    rows = {row["path"]: row for row in found["modules"]}
    assert list(rows) == [m.path for m in MODULES]
    q = rows["model.layers.0.self_attn.q_proj"]
    assert {fmt: s["kl"] for fmt, s in q["scores"].items()} == {
        "4g64": 3.5e-3, "8g64": 3.7e-5, "bf16": 0.0,
    }  # fmt: skip
    # 32 columns do not divide into groups of 64
    assert list(rows["model.layers.0.self_attn.o_proj"]["scores"]) == ["bf16"]
    # never measured there: the widest width, as mlx-optiq itself does, and marked
    for name in ("model.embed_tokens", "model.layers.0.mlp.gate"):
        assert rows[name]["assumed"]
        assert list(rows[name]["scores"]) == ["8g64"]
    save(found, path)
    assert load(path) == found


@pytest.mark.parametrize(
    "change",
    [
        {"layers": [{"layer_name": "other", "sensitivities": {"4": 0.1}}]},
        {"layers": [{"layer_name": "model.layers.0.self_attn.q_proj"}]},
        {"candidate_bits": "x"},
        {"group_size": 48},
    ],
)
def test_mlx_optiq_files_that_do_not_fit(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps(PEER | change))
    with pytest.raises(SensitivityError, match=r"s\.json"):
        load(path, model=MODEL, modules=MODULES)

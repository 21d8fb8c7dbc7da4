"""Reading scores: every promise checked, and mlx-optiq's file taken for what it is."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from optiq.errors import BudgetError, ExportError, SensitivityError
from optiq.formats import DENSE, UNIFORM4, Format
from optiq.models.roles import Module, Role
from optiq.planning.files import read_scores as read
from optiq.planning.scores import ModelInfo, Score, Scored, Scores, describe_module, module_of
from tests.scored import MODEL, PEER, PROVENANCE, build

UP = Module("model.layers.0.mlp.up_proj", Role.MLP, "model.layers.0.mlp.gate_up", (384, 128), 0)
EMBED = Module("model.embed_tokens", Role.EMBEDDING, "model.embed_tokens", (512, 128), None)
ODD = Module("model.layers.0.odd", Role.OTHER, "model.layers.0.odd", (16, 72), 0)


def scores() -> dict[str, Any]:
    rows = [
        {**describe_module(m), "scores": {"4g64": {"kl": kl, "se": 0.1}, "bf16": {"kl": 0.0}}}
        for m, kl in ((EMBED, 0.5), (UP, 0.25))
    ]
    return {**PROVENANCE, "model": MODEL, "modules": rows}


def test_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(scores()))
    found = read(path)
    assert [s.module for s in found.modules] == [EMBED, UP]
    assert [s.loss(UNIFORM4) for s in found.modules] == [0.5, 0.25]
    assert (found.model, found.machine) == (ModelInfo(**MODEL), {"cpu": "x"})
    assert module_of(describe_module(UP)) == UP
    found.save(tmp_path / "new" / "again.json")
    assert read(tmp_path / "new" / "again.json") == found
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["again.json"]


def test_scores_that_cannot_be_written_leave_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text("old")
    found = Scores.from_json(scores())
    with pytest.raises(ExportError, match="cannot be written"):
        found.save(path / "s.json")
    broken = Scored(UP, {UNIFORM4: Score(math.nan)})
    with pytest.raises(SensitivityError, match="no finite score for 4g64"):
        replace(found, modules=(broken,)).save(path)
    assert path.read_text() == "old"


def changed(change: Any) -> Any:
    data = copy.deepcopy(scores())
    change(data)
    return data


BAD = [
    ([], "not a sensitivity file"),
    ({}, "not a sensitivity file"),
    (changed(lambda d: d.update(kind="optiq.plan")), "not a sensitivity file"),
    (changed(lambda d: d.update(schema=9)), "schema 9, this optiq reads 1"),
    (changed(lambda d: d.pop("machine")), "lacks machine"),
    (changed(lambda d: d.update(model=None)), r"lacks model\.name, model\.fingerprint"),
    (changed(lambda d: d["calibration"].pop("seed")), r"lacks calibration\.seed"),
    (changed(lambda d: d["model"].update(itemsize=0)), "not a number of bytes"),
    (changed(lambda d: d["model"].update(fixed_bytes="9")), "not a number of bytes"),
    (changed(lambda d: d["modules"].clear()), "no modules"),
    (changed(lambda d: d["modules"].append(7)), "module 2 lacks path, .*scores"),
    (changed(lambda d: d["modules"][1].pop("shape")), "module 1 lacks shape"),
    (changed(lambda d: d["modules"][1].update(shape=[384])), "as the shape of a weight"),
    (changed(lambda d: d["modules"][1].update(shape=[384, -1])), "as the shape of a weight"),
    (
        changed(lambda d: d["modules"][1].update(role="x")),
        r"\(model.layers.0.mlp.up_proj\) has the unknown role 'x'",
    ),
    (changed(lambda d: d["modules"][1].update(role=[])), "unknown role"),
    (changed(lambda d: d["modules"][1].update(scores={})), "up_proj.*no scores"),
    (changed(lambda d: d["modules"][1]["scores"].update(q4=1)), "format 'q4'"),
    (changed(lambda d: d["modules"][1]["scores"].update({"4g64": 1})), "no finite score for 4g64"),
    (changed(lambda d: d["modules"][1]["scores"]["4g64"].update(kl=math.nan)), "no finite score"),
    (changed(lambda d: d["modules"][1]["scores"]["4g64"].update(kl="1")), "no finite score"),
    (changed(lambda d: d["modules"][1]["scores"]["4g64"].update(se=math.inf)), "no finite score"),
    (changed(lambda d: d["modules"][1]["scores"]["4g64"].update(method="x")), "unknown method 'x'"),
    ({**PEER, "group_size": None}, "not understood as mlx-optiq's"),
    ({**PEER, "group_size": 48}, "not understood as mlx-optiq's"),
    ({**PEER, "layers": [{"layer_name": "x"}]}, "not understood as mlx-optiq's"),
    ({**PEER, "layers": []}, "names no layer"),
]


@pytest.mark.parametrize(("data", "message"), BAD)
def test_bad_scores_are_one_line_with_name_and_fix(tmp_path: Path, data: Any, message: str) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(data))
    with pytest.raises(SensitivityError, match=message) as error:
        read(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    if "layers" not in data:
        with pytest.raises(SensitivityError, match=message):
            Scores.from_json(data)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000])
def test_a_file_that_is_not_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "scores.json"
    path.write_bytes(content)
    with pytest.raises(SensitivityError, match=r"scores\.json cannot be read as scores"):
        read(path)
    with pytest.raises(SensitivityError, match="cannot be read as scores"):
        read(tmp_path / "none.json")
    with pytest.raises(SensitivityError, match=r"has no optiq/sensitivity.json; measure again"):
        read(tmp_path)
    (tmp_path / "optiq").mkdir()
    (tmp_path / "optiq" / "sensitivity.json").write_bytes(content)
    with pytest.raises(SensitivityError, match="cannot be read as scores"):
        read(tmp_path)


def peer_file(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "peer.json"
    path.write_text(json.dumps({**PEER, **changes}))
    return path


def test_the_peers_file_alone_is_a_model_of_what_it_lists(tmp_path: Path) -> None:
    low, high = (128 * 384 * bits // 8 + 128 * 384 // 16 for bits in (4, 8))
    plan = build(read(peer_file(tmp_path)), str(low + 2 * high))
    assert {m.module.path: m.format.bits for m in plan.modules} == {
        "model.layers.0.mlp.up_proj": 8,
        "model.layers.0.mlp.gate": 8,
        "model.layers.1.mlp.up_proj": 4,
    }
    assert plan.nbytes == low + 2 * high
    assert [m.module.block for m in plan.modules] == [0, 0, 1]
    assert plan.predicted_kl == pytest.approx(0.005 + 0.001 + 0.001)
    with pytest.raises(BudgetError):  # a router does not go below 8 bits
        build(read(peer_file(tmp_path)), str(3 * low))


def test_the_peers_file_with_the_model_it_is_used_for(tmp_path: Path) -> None:
    modules = [EMBED, UP, ODD]
    model = ModelInfo(**MODEL)
    data = read(peer_file(tmp_path), model=model, modules=modules)
    assert data.model == model
    rows = {s.module.path: s for s in data.modules}
    assert list(rows) == [m.path for m in modules]
    assert [s.module.shape for s in data.modules] == [(512, 128), (384, 128), (16, 72)]
    assert rows[UP.path].loss(UNIFORM4) == 0.5
    # never measured there: the widest format, and nothing else to choose
    assert rows[EMBED.path].assumed
    assert list(rows[EMBED.path].scores) == [Format("affine", 8, 64)]
    assert list(rows[ODD.path].scores) == [DENSE]
    plan = build(data, "7bpw")
    assert [m.format for m in plan.modules][::2] == [Format("affine", 8, 64), DENSE]
    assert plan.nbytes <= plan.budget
    with pytest.raises(SensitivityError, match="names no layer of m"):
        read(peer_file(tmp_path), model=model, modules=[EMBED, ODD])


def test_the_peers_scores_against_a_4_bit_model_are_turned_round(tmp_path: Path) -> None:
    """There 4 bits score 0, as the reference itself, and 8 bits what they change."""
    layers = copy.deepcopy(PEER["layers"])
    for layer, gain in zip(layers, (0.3, 0.2, 0.1), strict=True):
        layer["sensitivities"] = {"4": 0.0, "8": gain}
    data = read(peer_file(tmp_path, layers=layers))
    kl = [{str(f): s.kl for f, s in scored.scores.items()} for scored in data.modules]
    assert kl == [{"4g64": 0.3, "8g64": 0.0}, {"8g64": 0.0}, {"4g64": 0.1, "8g64": 0.0}]

"""A checkpoint goes on exactly, or says that it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optiq.errors import CheckpointError
from optiq.quantize.sensitivity.checkpoint import Checkpoint, saved_reference

IDENTITY = {"model": "abc", "seed": 0}


def written(path: Path) -> dict[str, Any]:
    state = Checkpoint(path, IDENTITY, resume=False)
    state.units("0 kl")["2/3"] = {"a": {"4g64": [1.5, 0.1]}}
    state.save()
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_not_json_and_not_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    for text, message in (("{", "is damaged"), ("[]", "is damaged"), ("{}", "not a checkpoint")):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            Checkpoint(path, IDENTITY, resume=True)


def test_units_must_be_those_of_the_round(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    written(path)
    state = Checkpoint(path, IDENTITY, resume=True)
    scored = {("a", "4g64")}
    state.check("0 kl", {"2/3": (scored, 2), "0/0": (set(), 1)})
    state.check("1 kl", {})
    for other in ({}, {"2/3": (scored, 3)}, {"2/3": ({("b", "4g64")}, 2)}, {"2/4": (scored, 2)}):
        with pytest.raises(CheckpointError, match="unit 2/3 of round 0 kl does not belong"):
            state.check("0 kl", other)


def test_the_saved_reference(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    assert saved_reference(path) is None
    for rank in (1, 0):  # the files of any rank will do
        Checkpoint(path, {"reference": "uniform4"}, resume=False, rank=rank).save()
        assert saved_reference(path) == "uniform4"


def test_it_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    written(path)
    again = Checkpoint(path, IDENTITY, resume=True)
    assert again.rounds == {"0 kl": {"2/3": {"a": {"4g64": [1.5, 0.1]}}}}
    assert Checkpoint(path, IDENTITY, resume=False).rounds == {}


def test_all_ranks_files_are_continued(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    for rank in (0, 1, 12):
        state = Checkpoint(path, IDENTITY, resume=False, rank=rank)
        state.units("0 kl")[f"0/{rank}"] = {"a": {"4g64": [float(rank)]}}
        state.save()
    (tmp_path / "c.json.backup").write_text("not a rank's")
    for rank in (0, 5):
        again = Checkpoint(path, IDENTITY, resume=True, rank=rank)
        assert again.units("0 kl").keys() == {"0/0", "0/1", "0/12"}
    (tmp_path / "c.json.12").write_text("{")
    with pytest.raises(CheckpointError, match=r"c.json.12 is damaged"):
        Checkpoint(path, IDENTITY, resume=True)


@pytest.mark.parametrize(
    "damage",
    [
        {"identity": None},
        {"identity": []},
        {"rounds": None},
        {"rounds": {"0 kl": 3}},
        {"rounds": {"0 kl": {"0/0": 3}}},
        {"rounds": {"0 kl": {"0/0": {"a": 3}}}},
        {"rounds": {"0 kl": {"0/0": {"a": {"4g64": 3.0}}}}},
        {"rounds": {"0 kl": {"0/0": {"a": {"4g64": ["x"]}}}}},
        {"rounds": {"0 kl": {"0/0": {"a": {"4g64": [float("inf")]}}}}},
    ],
)
def test_a_damaged_one_is_refused(tmp_path: Path, damage: dict[str, Any]) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(written(path) | damage))
    with pytest.raises(
        CheckpointError, match=r"is damaged \(.*\); start anew with --restart"
    ) as error:
        Checkpoint(path, IDENTITY, resume=True)
    assert "\n" not in str(error.value)

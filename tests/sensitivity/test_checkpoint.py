"""A checkpoint goes on exactly, or says that it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optiq.errors import SensitivityError
from optiq.sensitivity.checkpoint import Checkpoint, saved_reference

IDENTITY = {"model": "abc", "seed": 0}


def written(path: Path) -> dict[str, Any]:
    state = Checkpoint(path, IDENTITY, resume=False)
    state.tally.add("a", "4g64", 1.5, 10)
    state.weight_errors["a"] = {"4g64": 0.01}
    state.save(2, 3)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_not_json_and_not_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    for text, message in (("{", "is damaged"), ("[]", "is damaged"), ("{}", "not a checkpoint")):
        path.write_text(text)
        with pytest.raises(SensitivityError, match=message):
            Checkpoint(path, IDENTITY, resume=True)


def test_sums_must_be_those_of_the_place(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    written(path)
    state = Checkpoint(path, IDENTITY, resume=True)
    scored = {("a", "4g64")}
    state.check(5, [scored, set(), set()], partial=True)
    with pytest.raises(SensitivityError, match="beyond the end"):
        state.check(1, [scored, set(), set()], partial=True)
    with pytest.raises(SensitivityError, match="sums are not those of its place"):
        state.check(5, [scored, {("b", "4g64")}, set()], partial=True)


def test_the_saved_reference(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    assert saved_reference(path) is None
    Checkpoint(path, {"reference": "uniform4"}, resume=False).save(0, 0)
    assert saved_reference(path) == "uniform4"


def test_it_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    written(path)
    again = Checkpoint(path, IDENTITY, resume=True)
    assert again.place == (2, 3)
    assert again.tally.sums == {"a": {"4g64": [1.5, 2.25, 15.0]}}
    assert again.weight_errors == {"a": {"4g64": 0.01}}
    assert Checkpoint(path, IDENTITY, resume=False).place == (0, 0)


def test_one_without_weight_errors_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    state = written(path)
    del state["weight_errors"]
    path.write_text(json.dumps(state))
    assert Checkpoint(path, IDENTITY, resume=True).weight_errors == {}


@pytest.mark.parametrize(
    "damage",
    [
        {"identity": None},
        {"identity": []},
        {"place": [1]},
        {"place": [-1, 0]},
        {"place": ["a", 0]},
        {"place": None},
        {"sums": None},
        {"sums": {"a": 3}},
        {"sums": {"a": {"4g64": [1.0, 2.0]}}},
        {"sums": {"a": {"4g64": ["x", 1.0, 2.0]}}},
        {"weight_errors": None},
        {"weight_errors": {"a": 0.1}},
        {"weight_errors": {"a": {"4g64": "x"}}},
    ],
)
def test_a_damaged_one_is_refused(tmp_path: Path, damage: dict[str, Any]) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(written(path) | damage))
    with pytest.raises(
        SensitivityError, match=r"is damaged \(.*\); delete it and start without --resume"
    ) as error:
        Checkpoint(path, IDENTITY, resume=True)
    assert "\n" not in str(error.value)

"""Which modules are contested, against solving the whole plan again with moved scores."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from optiq.errors import BudgetError
from optiq.formats import Format
from optiq.planning.allocation import allocate
from optiq.planning.contested import SPREAD, Contest
from optiq.planning.contested import contests as contests_of
from optiq.planning.plan import problem
from optiq.planning.scores import Scores
from optiq.planning.size import Size
from tests.scored import PROVENANCE, build

FORMATS = ("3g64", "4g64", "5g64", "6g64", "8g64")


def scores_of(modules: int, seed: int = 0, se: float = 0.0) -> dict[str, Any]:
    """A file of estimated scores: four times less per bit, over three orders of magnitude."""
    draw = random.Random(seed)
    rows = []
    for i in range(modules):
        level = 10 ** draw.uniform(-3, 0)
        kl = {f: level * 4.0 ** -int(f[0]) * draw.uniform(0.9, 1.1) for f in FORMATS}
        scores = {f: {"kl": kl[f], "se": se * kl[f], "method": "fisher"} for f in FORMATS}
        rows.append({"path": f"m{i}", "role": "mlp", "unit": f"m{i}", "block": i,
                     "shape": [64, 128], "stock": None, "scores": scores})  # fmt: skip
    model = {"name": "x", "fingerprint": "", "model_type": "llama", "dtype": "bfloat16",
             "itemsize": 2, "fixed_bytes": 100}  # fmt: skip
    return {**PROVENANCE, "method": "auto", "model": model, "modules": rows}


def contests(scores: dict[str, Any], size: str) -> list[Contest]:
    return contests_of(Scores.from_json(scores), Size.parse(size))


def chosen(scores: dict[str, Any], size: str) -> dict[str, Format]:
    return {m.module.path: m.format for m in build(scores, size).modules}


def moved(row: dict[str, Any], toward: str, rival: str) -> dict[str, Any]:
    """The module's scores at the point, one standard error away, that most favours `rival`."""
    kl, se = (np.array([row["scores"][f][k] for f in FORMATS]) for k in ("kl", "se"))
    common, own = np.outer(kl, kl), np.diag(kl**2)
    covariance = SPREAD**2 / 2 * (common + own) + np.outer(se, se)
    direction = np.zeros(len(FORMATS))
    direction[FORMATS.index(rival)], direction[FORMATS.index(toward)] = 1, -1
    step = covariance @ direction
    kl = kl - step / np.sqrt(direction @ step)
    scores = {f: {**row["scores"][f], "kl": float(k)} for f, k in zip(FORMATS, kl, strict=True)}
    return {**row, "scores": scores}


@pytest.mark.parametrize("size", ["4.7bpw", "6bpw"])
@pytest.mark.parametrize("se", [0.0, 0.3])
def test_they_are_those_whose_format_changes_when_their_scores_move(size: str, se: float) -> None:
    """Where many modules share a budget, moving one changes the price of a byte little."""
    scores = scores_of(80, se=se)
    found = {contest.path: contest.formats for contest in contests(scores, size)}
    plan = chosen(scores, size)
    differ = 0
    for i, row in enumerate(scores["modules"][:25]):
        own = str(plan[row["path"]])
        place = FORMATS.index(own)
        expected = set()
        for rival in FORMATS[max(0, place - 1) : place + 2]:  # the next ones win before the others
            if rival != own:
                rows = [*scores["modules"]]
                rows[i] = moved(row, own, rival)
                if str(chosen({**scores, "modules": rows}, size)[row["path"]]) != own:
                    expected |= {own, rival}
        differ += set(map(str, found.get(row["path"], ()))) != expected
    assert 10 < len(found) < 70
    assert differ <= 2  # near ties are decided by how the last bytes are filled


def test_the_gain_is_that_of_choosing_with_exact_scores() -> None:
    """In the mean over exact scores drawn around the estimates."""
    scores = scores_of(40)
    (contest, *_) = sorted(contests(scores, "5bpw"), key=lambda c: -c.gain)
    (row,) = (r for r in scores["modules"] if r["path"] == contest.path)
    items, budget = problem(Scores.from_json(scores), Size.parse("5bpw"))
    found = allocate(items, budget)
    (item,) = (i for i in items if i.name == contest.path)
    competing = [c for c in item.choices if c.format in contest.formats]
    kl = np.array([c.loss for c in competing])
    draw = np.random.default_rng(0)
    common, own = draw.normal(size=(20000, 1)), draw.normal(size=(20000, len(kl)))
    cost = (
        kl
        + SPREAD / 2**0.5 * (common + own) * kl
        + found.price * np.array([c.nbytes for c in competing])
    )
    place = [c.format for c in competing].index(found.formats[contest.path])
    gain = (cost[:, place] - cost.min(axis=1)).mean()
    assert contest.gain == pytest.approx(gain, rel=0.1)
    assert row["scores"]["4g64"]["method"] == "fisher"


def test_exact_scores_are_not_contested() -> None:
    scores = scores_of(30)
    while found := contests(scores, "5bpw"):
        before = sum(s["method"] == "kl" for r in scores["modules"] for s in r["scores"].values())
        for contest in found:
            assert contest.gain > 0
            (row,) = (r for r in scores["modules"] if r["path"] == contest.path)
            for fmt in contest.formats:
                assert row["scores"][str(fmt)]["method"] == "fisher"  # nothing is measured twice
                row["scores"][str(fmt)]["method"] = "kl"
        after = sum(s["method"] == "kl" for r in scores["modules"] for s in r["scores"].values())
        assert after > before
    for row in scores["modules"]:
        for score in row["scores"].values():
            score["method"] = "kl"
    assert contests(scores, "5bpw") == []


def test_a_budget_with_room_for_everything_has_no_contest() -> None:
    assert contests(scores_of(5), "16bpw") == []
    with pytest.raises(BudgetError):
        contests(scores_of(5), "1bpw")

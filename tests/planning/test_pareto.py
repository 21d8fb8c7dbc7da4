"""Points set against each other, against NumPy and against the definition; and frontier.json."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from optiq.errors import UsageError
from optiq.planning.pareto import (
    AgainstUniform,
    Frontier,
    Point,
    ScoresInfo,
    SelectionInfo,
    compare,
)
from optiq.planning.scores import ModelInfo, TextInfo
from optiq.quality.results import Distribution, Mean, Measured


def point(name: str, family: str, nbytes: int, kl: float) -> Point:
    spread = Distribution(kl, None, kl, kl, kl, kl, kl)
    measured = Measured(spread, Mean(0.9, 0.01), 1.1, 100, 4, "5a99", nbytes=nbytes, bpw=4.5)
    return Point(name, family, measured, None, None, "minmax", {"4g64": 3})


UNIFORM = [
    point("3", "uniform", 300, 1.5),
    point("4", "uniform", 400, 0.5),
    point("8", "uniform", 800, 0.002),
]


def test_between_neighbours_log_kl_is_linear_in_bytes() -> None:
    sizes = [301, 350, 399, 400, 401, 777, 800]
    ours = [point(f"o{n}", "ours", n, 0.1) for n in sizes]
    found = {p.nbytes: p.uniform for p in compare([*ours, *UNIFORM]) if p.family == "ours"}
    log_kl = np.log([p.kl for p in UNIFORM])
    for nbytes, against in found.items():
        assert against is not None
        expected = np.exp(np.interp(nbytes, [p.nbytes for p in UNIFORM], log_kl))
        assert against.kl == pytest.approx(expected, rel=1e-12)
        assert against.ratio == pytest.approx(0.1 / expected, rel=1e-12)
        lower = max(p.nbytes for p in UNIFORM if p.nbytes < nbytes)
        assert against.between[0] == str(lower // 100)


def test_a_smaller_model_is_held_against_the_smallest_and_a_larger_one_against_none() -> None:
    points = compare([point("small", "ours", 290, 3.0), point("big", "recipe", 801, 0.1), *UNIFORM])
    by_name = {p.name: p.uniform for p in points}
    assert by_name["small"] == AgainstUniform(1.5, 2.0, ("3",))
    assert by_name["big"] is None
    assert by_name["4"] is None  # uniform itself


def test_without_a_logarithm_there_is_no_ratio() -> None:
    exact = [*UNIFORM[:2], point("8", "uniform", 800, 0.0)]
    (found,) = (p for p in compare([point("o", "ours", 500, 0.1), *exact]) if p.name == "o")
    assert found.uniform is None
    (found,) = compare([point("o", "ours", 500, 0.1)])
    assert found.uniform is None


def test_dominated_is_no_smaller_and_no_better() -> None:
    rng = np.random.default_rng(0)
    drawn = [
        point(str(i), "ours", int(n), float(kl))
        for i, (n, kl) in enumerate(rng.integers(1, 12, size=(60, 2)))
    ]
    found = compare(drawn)
    assert [p.nbytes for p in found] == sorted(p.nbytes for p in drawn)
    free = set()
    for a in drawn:
        here = (a.nbytes, a.kl)
        others = [(b.nbytes, b.kl) for b in drawn]
        if not any(o != here and o[0] <= here[0] and o[1] <= here[1] for o in others):
            free.add(a.name)
    assert 0 < len(free) < len(drawn)
    assert {p.name for p in found if not p.dominated} == free


def frontier() -> Frontier:
    ours = replace(point("ours", "ours", 350, 0.1), asked="4bpw", chosen="smooth")
    larger = replace(point("larger", "ours", 500, 0.09), asked="5bpw", chosen="scores")
    recipe = point("mixed_3_4", "recipe", 390, 0.4)
    return Frontier(
        model=ModelInfo("tiny", "0ca5", "llama", "bfloat16", 2, 1280),
        sizes=("4bpw", "5bpw"),
        notes=("optiq 2bpw is left out",),
        scores=ScoresInfo("auto", "bf16", "search"),
        rounding="descent",
        calibration=TextInfo("optiq.jsonl", 8192, 36, {"prose": 8192}, "c0ff", 0),
        selection=SelectionInfo(4090, "1f07"),
        points=compare([ours, larger, recipe, *UNIFORM]),
        command="optiq frontier tiny",
        versions={"mlx": "0"},
        machine={"cores": 2},
    )


def test_the_file_keeps_everything_under_its_documented_keys() -> None:
    data = json.loads(json.dumps(frontier().to_json()))
    assert Frontier.from_json(data) == frontier()
    assert Frontier.from_json(data).to_json() == data
    ours = data["points"][1]
    assert list(ours) == [
        "name", "family", "nbytes", "bpw", "asked", "chosen", "rounding", "formats", "kl", "top1",
        "ppl_ratio", "tokens", "sequences", "text_sha256", "dominated", "uniform",
    ]  # fmt: skip
    assert (ours["nbytes"], ours["kl"]["mean"], ours["asked"]) == (350, 0.1, "4bpw")
    assert ours["uniform"]["between"] == ["3", "4"]
    assert data["scores"] == {"method": "auto", "reference": "bf16", "rounding": "search"}
    assert data["selection"] == {"tokens": 4090, "text_sha256": "1f07"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "optiq.plan"}, "not a frontier"),
        ({"schema": 2}, "not a frontier"),
        ({"scores": {"method": "kl"}}, "incomplete"),
        ({"points": [{"name": "ours"}]}, "incomplete"),
    ],
)
def test_another_file_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Frontier.from_json(frontier().to_json() | change)

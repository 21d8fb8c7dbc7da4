"""Points set against each other, against NumPy and against the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from optiq.planning.pareto import compare


def point(name: str, family: str, nbytes: int, kl: float) -> dict[str, Any]:
    return {"name": name, "family": family, "nbytes": nbytes, "kl": {"mean": kl, "se": None}}


UNIFORM = [
    point("3", "uniform", 300, 1.5),
    point("4", "uniform", 400, 0.5),
    point("8", "uniform", 800, 0.002),
]


def test_between_neighbours_log_kl_is_linear_in_bytes() -> None:
    sizes = [301, 350, 399, 400, 401, 777, 800]
    ours = [point(f"o{n}", "ours", n, 0.1) for n in sizes]
    found = {p["nbytes"]: p["uniform"] for p in compare([*ours, *UNIFORM]) if p["family"] == "ours"}
    log_kl = np.log([p["kl"]["mean"] for p in UNIFORM])
    for nbytes in sizes:
        expected = np.exp(np.interp(nbytes, [p["nbytes"] for p in UNIFORM], log_kl))
        assert found[nbytes]["kl"] == pytest.approx(expected, rel=1e-12)
        assert found[nbytes]["ratio"] == pytest.approx(0.1 / expected, rel=1e-12)
    assert found[350]["between"] == ["3", "4"]
    assert found[401]["between"] == ["4", "8"]


def test_a_smaller_model_is_held_against_the_smallest_and_a_larger_one_against_none() -> None:
    points = compare([point("small", "ours", 290, 3.0), point("big", "recipe", 801, 0.1), *UNIFORM])
    by_name = {p["name"]: p["uniform"] for p in points}
    assert by_name["small"] == {"kl": 1.5, "ratio": 2.0, "between": ["3"]}
    assert by_name["big"] is None
    assert by_name["4"] is None  # uniform itself


def test_without_a_logarithm_there_is_no_ratio() -> None:
    exact = [*UNIFORM[:2], point("8", "uniform", 800, 0.0)]
    (found,) = (p for p in compare([point("o", "ours", 500, 0.1), *exact]) if p["name"] == "o")
    assert found["uniform"] is None
    (found,) = compare([point("o", "ours", 500, 0.1)])
    assert found["uniform"] is None


def test_dominated_is_no_smaller_and_no_better() -> None:
    rng = np.random.default_rng(0)
    drawn = [
        point(str(i), "ours", int(n), float(kl))
        for i, (n, kl) in enumerate(rng.integers(1, 12, size=(60, 2)))
    ]
    found = compare(drawn)
    assert [p["nbytes"] for p in found] == sorted(p["nbytes"] for p in drawn)
    free = set()
    for a in drawn:
        here = (a["nbytes"], a["kl"]["mean"])
        others = [(b["nbytes"], b["kl"]["mean"]) for b in drawn]
        if not any(o != here and o[0] <= here[0] and o[1] <= here[1] for o in others):
            free.add(a["name"])
    assert 0 < len(free) < len(drawn)
    assert {p["name"] for p in found if not p["dominated"]} == free

"""Ranks within a budget, against brute force."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from optiq.errors import AdapterError, UsageError
from optiq.lora import ranks
from optiq.models.roles import Module, Role


def module(path: str, *shape: int) -> Module:
    return Module(path, Role.MLP, path, shape, 0)


MODULES = [module("a", 30, 20), module("b", 10, 15), module("c", 40, 10)]
GAINS = {"a": [90.0, 30.0, 9.0, 1.0], "b": [30.0, 25.0, 20.0, 0.1], "c": [100.0, 1.0, 0.5, 0.2]}


def spent(found: dict[str, int]) -> int:
    return sum(found.get(m.path, 0) * ranks.cost(m) for m in MODULES)


def test_water_filling_finds_what_brute_force_finds() -> None:
    found = ranks.by_gain(MODULES, 1, GAINS)
    budget = sum(map(ranks.cost, MODULES))
    assert spent(found) <= budget

    def worth(each: tuple[int, ...]) -> float:
        return sum(sum(GAINS[m.path][:r]) for m, r in zip(MODULES, each, strict=True))

    def price(each: tuple[int, ...]) -> int:
        return sum(r * ranks.cost(m) for m, r in zip(MODULES, each, strict=True))

    best = max((e for e in product(range(5), repeat=3) if price(e) <= budget), key=worth)
    assert found == {m.path: r for m, r in zip(MODULES, best, strict=True) if r}


def test_a_layer_gets_four_times_its_share_at_most() -> None:
    gains = {"a": [1.0] * 50, "b": [1e9 / (i + 1) for i in range(50)], "c": [1.0] * 50}
    found = ranks.by_gain(MODULES, 2, gains)
    assert found["b"] == 8
    assert spent(found) <= 2 * sum(map(ranks.cost, MODULES))


def test_ranks_follow_weights_within_the_budget() -> None:
    found = ranks.proportional(MODULES, 4, {"a": 4, "b": 8, "c": 4})
    assert found["b"] == pytest.approx(2 * found["a"], abs=2)
    assert found["a"] == pytest.approx(found["c"], abs=1)
    budget = 4 * sum(map(ranks.cost, MODULES))
    assert budget - max(map(ranks.cost, MODULES)) < spent(found) <= budget


def test_uniform_is_no_more_than_a_layer_has() -> None:
    assert ranks.uniform(MODULES, 12) == {"a": 12, "b": 10, "c": 10}


def test_gains_of_several_kinds_count_alike() -> None:
    task = {"a": [8.0, 2.0], "b": [6.0]}
    repaired = {"a": [0.1], "b": [0.2, 0.1]}
    found = ranks.combined([task, repaired])
    assert found["a"] == pytest.approx([8 / 16 + 0.1 / 0.4, 2 / 16])
    assert found["b"] == pytest.approx([6 / 16 + 0.2 / 0.4, 0.1 / 0.4])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"x": 3}', "names x"),
        ('{"a": 2.5}', "rank 2.5"),
        ('{"a": 21}', "give 0 to 20"),
        ('{"a": true}', "rank True"),
        ("[]", "not a JSON object"),
    ],
)
def test_a_file_of_ranks_is_checked(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "ranks.json"
    file.write_text(content)
    with pytest.raises(AdapterError, match=reason):
        ranks.from_file(file, MODULES)


def test_a_file_of_ranks_is_read(tmp_path: Path) -> None:
    file = tmp_path / "ranks.json"
    file.write_text(json.dumps({"a": 3, "b": 0}))
    assert ranks.from_file(file, MODULES) == {"a": 3}
    with pytest.raises(UsageError, match="cannot be read"):
        ranks.from_file(tmp_path / "none", MODULES)

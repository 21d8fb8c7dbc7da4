"""Predicted KL at other sizes: of what stock really makes, and the least at each size."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest

from optiq.formats import DENSE, UNIFORM4, Format
from optiq.planning.plan import uniform_plan
from optiq.planning.prediction import Predicted, frontier, uniform
from optiq.planning.scores import Scores
from tests.report import fakes

FLOORS = {"embedding": 3, "head": 3, "router": 8}


def scores_of(data: dict[str, Any]) -> Scores:
    return Scores.from_json(data)


def test_uniform_is_the_plain_sum() -> None:
    _, data = fakes.smollm2()
    found = uniform(scores_of(data), Format("affine", 5, 64))
    weights = sum(prod(m["shape"]) for m in data["modules"])
    assert found is not None
    assert found.nbytes == weights * 5 // 8 + 4 * weights // 64 + data["model"]["fixed_bytes"]
    assert found.kl == pytest.approx(sum(m["scores"]["5g64"]["kl"] for m in data["modules"]))
    assert uniform(scores_of(data), Format("affine", 2, 64)) is None  # no module has such scores


def test_uniform_has_the_formats_of_stock() -> None:
    """mlx-lm keeps the routers of these models in 8 bits whatever it is asked for."""
    _, data = fakes.moe()
    odd = {**data["modules"][1], "path": "odd", "shape": [8, 72], "scores": {"bf16": {"kl": 0.25}}}
    data["modules"].append(odd)  # 72 is not a number of groups, so it stays as it is
    scores = scores_of(data)
    formats = {
        m["path"]: "8g64" if m["role"] == "router" else "bf16" if m is odd else "4g64"
        for m in data["modules"]
    }
    assert sum(fmt == "8g64" for fmt in formats.values()) == 22
    plan = uniform_plan(scores.model, [scored.module for scored in scores.modules])
    assert {m.module.path: str(m.format) for m in plan.modules} == formats
    kl = sum(m["scores"][formats[m["path"]]]["kl"] for m in data["modules"])
    assert uniform(scores, UNIFORM4) == Predicted(plan.nbytes, pytest.approx(kl, rel=1e-12))


def test_a_dense_module_that_was_not_measured_loses_nothing() -> None:
    _, data = fakes.tiny()
    known = uniform(scores_of(data), DENSE)
    for m in data["modules"]:
        del m["scores"]["bf16"]
    assert uniform(scores_of(data), DENSE) == known
    assert known is not None
    assert known.kl == 0.0


def test_the_frontier_goes_from_the_floors_to_the_most_and_is_never_above_a_uniform_width() -> None:
    _, data = fakes.moe()
    scores = scores_of(data)
    widths = [uniform(scores, Format("affine", bits, 64)) for bits in (4, 5, 6, 8)]
    most = max(width.nbytes for width in widths if width)
    line = frontier(scores, most)
    smallest = data["model"]["fixed_bytes"]
    for m in data["modules"]:
        formats = [f for f in map(Format.parse, m["scores"]) if f.bits >= FLOORS.get(m["role"], 0)]
        smallest += min(f.nbytes(m["shape"]) for f in formats)
    sizes, losses = [p.nbytes for p in line], [p.kl for p in line]
    assert len(line) > 20
    assert sizes[0] == smallest
    assert 0.99 * most < sizes[-1] <= most
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)
    for width in widths:
        assert width is not None
        assert min(p.kl for p in line if p.nbytes <= width.nbytes) <= width.kl

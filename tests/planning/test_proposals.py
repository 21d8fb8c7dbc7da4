"""Proposed plans, against brute force over all assignments."""

from __future__ import annotations

from itertools import product
from math import fsum
from typing import Any

import numpy as np
import pytest

from optiq.errors import BudgetError
from optiq.formats import DENSE, NVFP4, Format
from optiq.planning import proposals
from optiq.planning.plan import Plan
from optiq.planning.scores import Scores
from optiq.planning.size import Size
from tests.scored import MODEL, PROVENANCE, build

MENU = [Format("affine", b, 64) for b in (3, 4, 6)] + [DENSE]
LEAVES = {"self_attn.q_proj": "qkv", "self_attn.k_proj": "qkv", "mlp.down_proj": ""}


def scores(seed: int = 0, *, se: float = 0.0, noise: float = 0.5) -> dict[str, Any]:
    """Six modules in two blocks: sensitivity times error, times noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for block, (leaf, unit) in product(range(2), LEAVES.items()):
        path = f"model.layers.{block}.{leaf}"
        spread = rng.lognormal(0, 1)
        kl = {f: spread * 4.0**-f.bits * rng.lognormal(0, noise) for f in MENU}
        rows.append(
            {
                "path": path,
                "role": "mlp" if "mlp" in leaf else "attention",
                "unit": f"model.layers.{block}.self_attn.{unit}" if unit else path,
                "block": block,
                "shape": [64, 64 * (1 + block)],
                "stock": None,
                "scores": {
                    str(f): {"kl": 0.0 if f == DENSE else kl[f], "se": se * kl[f]} for f in MENU
                },
            }
        )
    return {**PROVENANCE, "model": {**MODEL, "fixed_bytes": 100}, "modules": rows}


def propose(data: dict[str, Any], size: str) -> dict[str, Plan]:
    return proposals.propose(Scores.from_json(data), Size.parse(size))


def formats(plan: Plan) -> list[Format]:
    return [m.format for m in plan.modules]


def brute_force(data: dict[str, Any], budget: int, loss: Any, allow: Any) -> float:
    """The least total loss of any assignment within the budget that `allow` accepts."""
    rows, best = data["modules"], np.inf
    for choice in product(MENU, repeat=len(rows)):
        nbytes = 100 + sum(f.nbytes(r["shape"]) for f, r in zip(choice, rows, strict=True))
        if nbytes <= budget and allow(choice):
            best = min(best, fsum(loss(r, f) for f, r in zip(choice, rows, strict=True)))
    return best


def kl(row: dict[str, Any], fmt: Format) -> float:
    return float(row["scores"][str(fmt)]["kl"])


@pytest.mark.parametrize("seed", range(4))
def test_each_variant_is_optimal_for_what_it_asks(seed: int) -> None:
    data = scores(seed, se=seed / 4)
    plans = propose(data, "5bpw")
    assert next(iter(plans)) == "scores"
    assert plans["scores"] == build(data, "5bpw")
    budget = plans["scores"].budget
    for plan in plans.values():
        assert plan.nbytes <= budget
        assert plan.nbytes == 100 + sum(m.format.nbytes(m.module.shape) for m in plan.modules)
        assert plan.predicted_kl == pytest.approx(
            fsum(kl(r, f) for r, f in zip(data["modules"], formats(plan), strict=True))
        )
    if "wide" in plans:
        assert plans["wide"].predicted_kl == pytest.approx(
            brute_force(data, budget, kl, lambda choice: all(f.bits >= 4 for f in choice))
        )


def test_uniform_is_the_widest_that_fits() -> None:
    plans = propose(scores(), "5bpw")
    assert set(formats(plans["uniform"])) == {Format("affine", 4, 64)}


def test_of_formats_of_the_same_bytes_uniform_takes_the_first() -> None:
    """Not the one that a set happens to give first."""
    data = scores()
    for row in data["modules"]:
        row["scores"] = {"nvfp4": {"kl": 0.1, "se": 0.0}, "4g64": {"kl": 0.1, "se": 0.0}}
    for menu in (None, [NVFP4, Format("affine", 4, 64)]):
        found = proposals._uniform(Scores.from_json(data), Size.parse("1MB"), menu)
        assert found is not None
        assert set(found.values()) == {min(NVFP4, Format("affine", 4, 64))}


def test_smooth_sees_through_noise() -> None:
    """One score that came out far too small draws the plain optimum to it, not the smooth one."""
    data = scores(noise=0.0)
    clean = propose(data, "4bpw")["scores"]
    narrow = Format("affine", 3, 64)
    at = max(range(6), key=lambda i: kl(data["modules"][i], narrow))
    assert formats(clean)[at] != narrow
    data["modules"][at]["scores"]["3g64"]["kl"] = 1e-6
    plans = propose(data, "4bpw")
    assert formats(plans["scores"])[at] == narrow
    smooth = proposals._smooth(Scores.from_json(data), Size.parse("4bpw"), None)
    assert [smooth[m.module.path] for m in clean.modules] == formats(clean)


def test_equal_plans_are_proposed_once_and_impossible_ones_not_at_all() -> None:
    plans = propose(scores(), "16bpw")
    assert [set(formats(plan)) for plan in plans.values()] == [{DENSE}]
    with pytest.raises(BudgetError):
        propose(scores(), "2bpw")

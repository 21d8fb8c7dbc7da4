"""Sizes and KLs of many models set against each other. Tables in, tables out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import exp, log
from typing import Any

Json = dict[str, Any]


def compare(points: Sequence[Json]) -> list[Json]:
    """`points` by rising bytes, each with "dominated" and "uniform" (see `against_uniform`).

    A point has at least name, family, nbytes and kl. It is dominated where another one is no
    larger and no worse, and not its equal in both.
    """
    ordered = sorted(points, key=lambda p: (p["nbytes"], p["kl"]["mean"]))
    curve = [p for p in ordered if p["family"] == "uniform"]
    return [
        {
            **p,
            "dominated": any(_dominates(other, p) for other in ordered),
            "uniform": None if p["family"] == "uniform" else against_uniform(p, curve),
        }
        for p in ordered
    ]


def against_uniform(point: Mapping[str, Any], curve: Sequence[Json]) -> Json | None:
    """The KL of uniform widths at the bytes of `point`, and the point's KL over it.

    Between two neighbours of `curve`, which rises in bytes, log KL is linear in bytes. A point
    smaller than all is held against the smallest: uniform at the point's own bytes would be worse
    still, so that the ratio is an upper bound. None where uniform is not known: above the largest,
    or where a KL has no logarithm.
    """
    nbytes, kl = point["nbytes"], point["kl"]["mean"]
    if curve and nbytes <= curve[0]["nbytes"]:
        between, expected = curve[:1], curve[0]["kl"]["mean"]
    else:
        between, expected = [], 0.0
        for low, high in pairwise(curve):
            ends = low["kl"]["mean"], high["kl"]["mean"]
            if low["nbytes"] < nbytes <= high["nbytes"] and min(ends) > 0:
                share = (nbytes - low["nbytes"]) / (high["nbytes"] - low["nbytes"])
                between, expected = (
                    [low, high],
                    exp((1 - share) * log(ends[0]) + share * log(ends[1])),
                )
    if expected <= 0:
        return None
    return {"kl": expected, "ratio": kl / expected, "between": [p["name"] for p in between]}


def _dominates(one: Json, other: Json) -> bool:
    a, b = ((p["nbytes"], p["kl"]["mean"]) for p in (one, other))
    return a != b and a[0] <= b[0] and a[1] <= b[1]

"""The section on what the plan was chosen from."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from optiq.report import conversion_page

from . import fakes
from .fakes import Pair, parse
from .page import Element, figures, read


def candidate(name: str, rounding: str, predicted: float, mean: float) -> dict[str, Any]:
    return {
        "name": name,
        "rounding": rounding,
        "nbytes": 123_456,
        "predicted": predicted,
        "kl": {"mean": mean, "se": mean / 20},
    }


SELECTION = {
    "chosen": "smooth",
    "rounding": "descent",
    "candidates": [
        candidate("scores", "search", 0.0854, 0.0877),
        candidate("smooth", "search", 0.0858, 0.0855),
        candidate("smooth", "descent", 0.0858, 0.0689),
    ],
    "tokens": 4095,
    "sequences": 10,
    "text_sha256": "bee6629ec8f0" * 5,
    "ratio": 0.99685,
    "rank_correlation": -0.5,
}


@pytest.fixture
def small() -> Pair:
    return deepcopy(fakes.tiny())


def section(pair: Pair, selection: dict[str, Any] | None) -> Element | None:
    plan, scores = pair
    root = read(conversion_page(*parse((plan | {"selection": selection}, scores))))
    return next((s for s in root.all("section") if s.first("h2").text == "Plans compared"), None)


def test_every_candidate_with_its_exact_figures_and_one_mark(small: Pair) -> None:
    found = section(small, SELECTION)
    assert found is not None
    rows = list(found.first("tbody").all("tr"))
    for row, c in zip(rows, SELECTION["candidates"], strict=True):
        cells = list(row.all("td"))
        assert row.first("th").text.split()[0] == c["name"]
        assert cells[0].text == c["rounding"]
        assert figures(cells[1]) == [c["nbytes"]]
        assert figures(cells[2]) == [c["predicted"]]
        assert figures(cells[3]) == [c["kl"]["mean"], c["kl"]["se"]]
    assert [list(row.all("td"))[-1].text for row in rows] == ["", "", "taken"]
    after = list(found.all("p"))[-1]
    assert figures(after) == [SELECTION["ratio"], SELECTION["rank_correlation"]]
    assert "4095 tokens in 10 sequences" in found.text


def test_what_is_unknown_is_left_out_or_named(small: Pair) -> None:
    found = section(small, SELECTION | {"ratio": None, "rank_correlation": None})
    assert found is not None
    assert len(list(found.all("p"))) == 1
    lone = candidate("<b>", "search", 0.1, 0.1) | {"predicted": None}
    found = section(small, SELECTION | {"candidates": [lone]})
    assert found is not None
    assert found.first("tbody").first("th").text == "<b>"
    assert [td.text for td in found.first("tbody").all("td")][2] == "not measured"


def test_a_plan_that_was_not_measured_says_so(small: Pair) -> None:
    found = section(small, SELECTION | {"candidates": [], "text_sha256": None, "tokens": 0})
    assert found is not None
    assert "smooth was taken, not measured against others" in found.text


def test_without_a_selection_there_is_no_section(small: Pair) -> None:
    assert section(small, None) is None
    assert "selection" not in small[0]  # a plan of an earlier version
    assert "Plans compared" not in conversion_page(*parse(small))


def test_the_weights_rounding_is_among_the_facts(small: Pair) -> None:
    plan, scores = small
    text = read(conversion_page(*parse((plan | {"selection": SELECTION}, scores)))).text
    assert "minmax (scores), descent (weights)" in text
    text = read(conversion_page(*parse(small))).text
    assert "minmax (scores), not recorded (weights)" in text

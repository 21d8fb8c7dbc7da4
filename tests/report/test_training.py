"""The page of a training run, read back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from optiq.lora.adapter import Adapter, Base
from optiq.lora.layers import LowRank
from optiq.report.training import training_page

from .page import Element, figures, read, rows


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    terms = {
        f"layer.{i}": LowRank(mx.zeros((8, rank)), mx.zeros((rank, 4)))
        for i, rank in enumerate((2, 3, 3))
    }
    made: dict[str, Any] = {
        "data": {"train": 10, "held_out": 2},
        "options": {"ranks": "uniform", "iters": 3},
        "ranks_from": [],
        "updates": [{"step": i, "loss": 3.0 - 0.5 * i} for i in (1, 2, 3)],
        "judged": [{"step": 0, "loss": 2.75}, {"step": 2, "loss": 2.25}, {"step": 3, "loss": 2.5}],
        "stated_bytes": 234567,
        "peak_bytes": 123456,
        "command": "optiq lora train <m>",
        "versions": {"optiq": "1"},
        "machine": {"cpu": "x"},
    }
    return Adapter(terms, 2.0, Base("a <b>", "f" * 64), 3, made)


def test_the_page_says_what_was_learned(adapter: Adapter) -> None:
    root = read(training_page(adapter))
    assert figures(root.first("header")) == [2.75, 2.25]
    assert "after 2 updates" in root.first("header").text
    assert root.first("h1").text == "a <b>"
    table = rows(root.first("table"))
    assert {rank: figures(cells[0]) for rank, cells in table.items()} == {"2": [1], "3": [2]}
    assert "optiq lora train <m>" in root.text


def test_both_charts_have_every_loss(adapter: Adapter) -> None:
    root = read(training_page(adapter))
    for css in ("wide", "narrow"):
        svg = root.first("div", css).first("svg")
        lines = [len(line.attrs["points"].split()) for line in svg.all("polyline")]
        assert lines == [3, 3]
        titles = [mark.first("title").text for mark in svg.all("g", "measured")]
        assert titles[1] == "update 2: held-out loss 2.250"


def said(adapter: Adapter, judged: list[dict[str, float]]) -> Element:
    return read(training_page(replace(adapter, made={**adapter.made, "judged": judged})))


def test_what_was_not_learned_is_said(adapter: Adapter) -> None:
    page = said(adapter, [{"step": 0, "loss": 2.0}, {"step": 3, "loss": 2.5}])
    assert "the adapter changes nothing" in page.first("header").text
    assert "No rows were held out" in said(adapter, []).first("header").text

"""The page of `optiq frontier`, read back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from optiq.planning.pareto import Frontier
from optiq.report.frontier import frontier_page
from tests.planning.test_pareto import frontier

from .page import Element, figures, read, rows


@pytest.fixture(scope="module")
def given() -> Frontier:
    return frontier()


@pytest.fixture(scope="module")
def root(given: Frontier) -> Element:
    return read(frontier_page(given))


def test_every_point_is_in_the_table_and_in_both_charts(given: Frontier, root: Element) -> None:
    table = rows(root.first("table"))
    named = [p.name + (" dominated" if p.dominated else "") for p in given.points]
    assert list(table) == named
    for p, cells in zip(given.points, table.values(), strict=True):
        m = p.measured
        against = [p.uniform.ratio] if p.uniform else []
        exact = [m.nbytes, m.bpw, m.kl.mean, *against, m.top1.mean, m.top1.se, m.ppl_ratio]
        assert [x for cell in cells for x in figures(cell)] == exact
    assert {p.dominated for p in given.points} == {False, True}
    for css in ("wide", "narrow"):
        svg = root.first("div", css).first("svg")
        said = [g.first("title").text.split(":")[0] for g in svg.all("g", "measured")]
        assert sorted(said) == sorted(p.name for p in given.points)
        described = svg.attrs["aria-label"]
        assert all(f"{p.name}: " in described for p in given.points)
        assert len(list(svg.all("polyline"))) == 2


def test_the_verdict_is_about_ours(given: Frontier, root: Element) -> None:
    ratios = [p.uniform.ratio for p in given.points if p.family == "ours" and p.uniform]
    assert figures(root.first("header")) == [min(ratios), max(ratios)]
    theirs = tuple(p for p in given.points if p.family != "ours")
    header = read(frontier_page(replace(given, points=theirs))).first("header").text
    assert "No size of ours" in header


def test_it_needs_nothing_and_names_cannot_break_it(given: Frontier) -> None:
    hostile = "</title><script>alert('x')</script>\"><img src=//evil>"
    first = replace(given.points[0], name=hostile)
    changed = replace(
        given,
        model=replace(given.model, name=hostile),
        notes=(hostile,),
        points=(first, *given.points[1:]),
    )
    html = frontier_page(changed)
    root = read(html)
    assert "http" not in html
    assert not [e for e in root.all() if e.tag in ("script", "link", "img") or "src" in e.attrs]
    assert root.first("h1").text == hostile
    assert hostile in root.text

"""The page as a reader gets it: well-formed, offline, complete, honest about what is missing."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import pytest

from optiq.errors import ExportError, SensitivityError
from optiq.planning.plan import build
from optiq.planning.scores import Scores
from optiq.planning.size import Size
from optiq.quality.answers import Answers
from optiq.report import conversion_page, write
from optiq.report.text import TIMES

from . import fakes
from .fakes import Json, Pair, parse
from .page import Element, figures, read, rows

MODELS = {"smollm2": fakes.smollm2(), "moe": fakes.moe(), "tiny": fakes.tiny()}
HOSTILE = "</title><script>alert('x')</script>\"><img src=http://evil onerror=1>&amp;"


@dataclass(frozen=True)
class Shown:
    """A plan and its scores, and the page about them."""

    plan: Json
    scores: Json
    root: Element


@pytest.fixture(scope="module", params=list(MODELS))
def shown(request: pytest.FixtureRequest) -> Shown:
    return Shown(*MODELS[request.param], page(*MODELS[request.param]))


@pytest.fixture
def small() -> Pair:
    return deepcopy(MODELS["tiny"])


def page(plan: Json, scores: Json) -> Element:
    return read(conversion_page(*parse((plan, scores))))


def section(root: Element, title: str) -> Element:
    return next(s for s in root.all("section") if s.first("h2").text == title)


def test_balanced_and_self_contained(small: Pair) -> None:
    html = conversion_page(*parse(small))
    root = read(html)
    assert not list(root.all("script"))
    assert not list(root.all("link"))
    for element in root.all():
        assert not {"src", "srcset", "data", "action"} & set(element.attrs)
        assert element.attrs.get("href", "#").startswith("#")
        assert not any(name.startswith("on") for name in element.attrs)
    style = root.first("style").text
    assert "url(" not in style
    assert "@import" not in style
    assert "http" not in html


def test_order_of_sections(small: Pair) -> None:
    root = page(*small)
    assert root.first("h1").text == "tiny"
    assert [h.text for h in root.all("h2")] == [
        "KL against size",
        "Against stock uniform 4-bit",
        "Sensitivity",
        "Formats",
        "Bytes per format",
        "Formats measured",
        "Every module",
        "How the numbers were made",
    ]


def test_every_section_has_a_link(shown: Shown) -> None:
    names = [h.attrs["id"] for h in shown.root.all("h2")]
    assert len(set(names)) == len(names) > 5
    links = [a.attrs["href"] for a in shown.root.first("nav").all("a")]
    assert links == [f"#{name}" for name in names]
    assert [h.first("a").attrs["href"] for h in shown.root.all("h2")] == links


def test_every_figure_is_labelled_for_narrow_screens(shown: Shown) -> None:
    for table in shown.root.all("table", "figures"):
        if "modules" not in table.classes:
            head = [th.text.strip() for th in table.first("thead").all("th")][1:]
            for cells in rows(table).values():
                assert [td.attrs["data-label"] for td in cells] == head


def test_answers_stand_side_by_side(small: Pair) -> None:
    samples = [Answers("Why?", "Because.", "Because <b>.", "Be be be", 48)]
    root = read(conversion_page(*parse(small), samples))
    (cells,) = rows(section(root, "Answers side by side").first("table")).values()
    assert [cell.text for cell in cells] == ["Because.", "Because <b>.", "Be be be"]
    assert not [h for h in page(*small).all("h2") if h.text == "Answers side by side"]


def test_every_module_is_in_both_maps_and_the_table(shown: Shown) -> None:
    root = shown.root
    formats = {m["path"]: m["format"] for m in shown.plan["modules"]}
    exact = {m["path"]: m["scores"] for m in shown.scores["modules"]}
    for title in ("Sensitivity", "Formats"):
        table = section(root, title).first("table", "map")
        cells = [td for td in table.all("td") if "title" in td.attrs]
        tips = {td.attrs["title"].split("\n")[0]: td for td in cells}
        assert len(cells) == len(formats)
        assert set(tips) == set(formats)
        for path, td in tips.items():
            for name, score in exact[path].items():
                assert f"{name}  {score['kl']} ± {score['se']}" in td.attrs["title"]
            if title == "Formats":
                assert td.text.split()[0] == formats[path]
    table = section(root, "Every module").first("table")
    assert {path: cells[2].text for path, cells in rows(table).items()} == formats
    names = [th.text for th in table.first("thead").all("th")][1:]
    for path, cells in rows(table).items():
        for name, cell in zip(names[4:], cells[4:], strict=True):
            score = exact[path].get(name)
            assert figures(cell) == ([score["kl"]] if score else [])


def test_rows_are_blocks_in_order(shown: Shown) -> None:
    table = section(shown.root, "Formats").first("table", "map")
    labels = [tr.first("th").text for tr in table.first("tbody").all("tr")]
    blocks = sorted({m["block"] for m in shown.plan["modules"]} - {None})
    head = [m["role"] for m in shown.plan["modules"] if m["role"] == "head"]
    assert labels == ["embedding", *map(str, blocks), *head]


def test_experts_and_routers_have_columns() -> None:
    table = section(page(*MODELS["moe"]), "Formats").first("table", "map")
    groups, leaves = (list(tr.all("th"))[1:] for tr in table.first("thead").all("tr"))
    assert [th.text for th in groups] == ["self_attn", "mlp", "switch_mlp", "shared_expert"]
    assert sum(int(th.attrs["colspan"]) for th in groups) == len(leaves) == 15
    dense = {"q", "k", "v", "o", "gate", "up", "down"}
    assert {th.text for th in leaves} == dense | {"shared_expert_gate"}


def test_comparison_equals_the_inputs(shown: Shown) -> None:
    plan = shown.plan
    table = rows(section(shown.root, "Against stock uniform 4-bit").first("table"))
    for side, (ours, nbytes) in enumerate(
        (
            (plan["measured"], plan["nbytes"]),
            (plan["uniform4"]["measured"], plan["uniform4"]["nbytes"]),
        )
    ):
        kl = ours["kl"]
        assert figures(table["Bytes of all tensors"][side]) == [nbytes]
        assert figures(table["Bits per weight"][side]) == pytest.approx([ours["bpw"]], rel=1e-12)
        assert figures(table["KL, mean ± se"][side]) == [kl["mean"], kl["se"]]
        assert figures(table["KL, median"][side]) == [kl["median"]]
        assert figures(table["KL, 95th percentile"][side]) == [kl["p95"]]
        assert figures(table["KL, 99th percentile"][side]) == [kl["p99"]]
        assert figures(table["KL, 99.9th percentile"][side]) == [kl["p999"]]
        assert figures(table["KL, largest"][side]) == [kl["max"]]
        top1 = ours["top1"]
        assert figures(table["Same top token, % ± se"][side]) == [top1["mean"], top1["se"]]
        assert figures(table["Perplexity ratio"][side]) == [ours["ppl_ratio"]]


def test_headline(small: Pair) -> None:
    plan, scores = small
    plan["measured"]["kl"] |= {"mean": 0.02, "se": 0.001}
    plan["uniform4"]["measured"]["kl"] |= {"mean": 0.05, "se": 0.003}
    header = page(plan, scores).first("header").text
    assert "Measured KL" in header
    assert "0.0200 ± 0.0010" in header
    assert "uniform 4-bit: 0.0500 ± 0.0030" in header
    assert f"2.50 {TIMES}" in header
    assert "more than two standard errors" in header


def test_a_difference_within_its_error_is_no_win(small: Pair) -> None:
    plan, scores = small
    plan["measured"]["kl"] |= {"mean": 0.050, "se": 0.003}
    plan["uniform4"]["measured"]["kl"] |= {"mean": 0.053, "se": 0.003}
    assert "neither is shown to be better" in page(plan, scores).first("header").text


def test_missing_measurements_are_named(small: Pair) -> None:
    plan, scores = small
    plan["measured"] = None
    plan["uniform4"]["measured"] = None
    root = page(plan, scores)
    header = root.first("header").text
    assert "Predicted KL" in header
    assert "The exported model was not measured" in header
    table = rows(section(root, "Against stock uniform 4-bit").first("table"))
    unmeasured = [name for name, cells in table.items() if not figures(cells[0])]
    assert len(unmeasured) == 8
    for name in unmeasured:
        assert [cell.text for cell in table[name]] == ["not measured", "not measured"]
    assert not list(root.all("g", "measured"))


def test_stock_is_predicted_with_the_formats_that_stock_has() -> None:
    """Routers in 8 bits. A plan that does not know the bytes of stock gets these, too."""
    plan, scores = MODELS["moe"]
    table = rows(
        section(page(plan | {"uniform4": None}, scores), "Against stock uniform 4-bit").first(
            "table"
        )
    )
    formats = [(m, m["stock"] or "4g64") for m in scores["modules"]]
    assert {fmt for _, fmt in formats} == {"4g64", "8g64"}
    kl = sum(m["scores"][fmt]["kl"] for m, fmt in formats)
    assert figures(table["KL, predicted sum"][1]) == pytest.approx([kl], rel=1e-12)
    assert figures(table["Bytes of all tensors"][1]) == [plan["uniform4"]["nbytes"]]


def test_only_scores_of_stock_rounding_predict_stock(small: Pair) -> None:
    plan, scores = small
    root = page(plan, scores | {"rounding": "search"})
    table = rows(section(root, "Against stock uniform 4-bit").first("table"))
    assert table["KL, predicted sum"][1].text == "not measured"


def test_a_module_that_was_not_measured_in_few_bits(small: Pair) -> None:
    plan, scores = small
    path = scores["modules"][3]["path"]
    scores["modules"][3]["scores"] = {"bf16": {"kl": 0.0, "se": 0.0}}
    plan["modules"][3]["kl"] = None
    root = page(plan, scores)
    table = section(root, "Sensitivity").first("table", "map")
    (cell,) = [td for td in table.all("td") if td.attrs.get("title", "").startswith(path + "\n")]
    assert cell.classes == ["unmeasured"]
    curve = section(root, "KL against size")
    assert "Uniform 3-bit, 4-bit, 5-bit, 6-bit, 8-bit: not measured" in curve.text
    assert "Predicted KLnot measured" in section(root, "How the numbers were made").text


def test_scores_without_errors_or_provenance(small: Pair) -> None:
    plan, scores = small
    for module in scores["modules"]:
        module["scores"] = {name: {"kl": s["kl"]} for name, s in module["scores"].items()}
    scores |= {"method": "other", "machine": {}, "versions": {}, "seconds": None}
    scores["calibration"] = dict.fromkeys(scores["calibration"])
    plan |= {"calibration": None, "machine": {}, "versions": {}, "command": ""}
    text = section(page(plan, scores), "How the numbers were made").text
    assert "How the scores were made is not recorded" in text
    for name in ("Machine", "Versions", "Command", "Scores from", "Tokens", "Text sha256"):
        assert f"{name}not recorded" in text


def test_hostile_names_stay_text(small: Pair) -> None:
    plan, scores = small
    for part in (plan, scores):
        part["model"] = part["model"] | {"name": HOSTILE, "model_type": HOSTILE}
        part["machine"] = {HOSTILE: {"nested": [HOSTILE]}}
        part["modules"][0]["path"] = HOSTILE
        part["modules"][1]["path"] = f"model.layers.0.{HOSTILE}.q_proj"
    plan["command"] = HOSTILE
    plan["measured"]["text_sha256"] = "&<>\"'" * 4
    scores["calibration"] |= {"source": HOSTILE, "tokens_per_domain": {HOSTILE: 1}}
    root = page(plan, scores)
    assert not list(root.all("script"))
    assert not list(root.all("img"))
    assert root.first("h1").text == HOSTILE
    assert root.first("title").text == f"{HOSTILE}: optiq report"


def test_unprintable_names_can_be_written(small: Pair, tmp_path: Path) -> None:
    plan, scores = small
    plan["model"] = plan["model"] | {"name": "a\ud800b\x00c\u202ed"}
    write(*parse((plan, scores)), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert read(text).first("h1").text == "a\ufffdb\ufffdc\ufffdd"


def test_provenance(small: Pair) -> None:
    """Each value stands beside its own name; the machine of the scores only where it differs."""
    plan, scores = small
    plan["command"] = "optiq convert here -o there"
    plan["seed"], scores["rounding"], scores["seconds"] = 11, "search", 311.4
    terms = facts(page(plan, scores))
    assert "Machine, scores" not in terms
    scores["machine"] = {"cpu": "another", "cores": 3}
    terms = facts(page(plan, scores))
    calibration, objective = scores["calibration"], plan["objective"]
    known = {
        "Model": plan["model"]["name"],
        "Fingerprint": plan["model"]["fingerprint"],
        "Type": f"{plan['model']['model_type']}, bfloat16",
        "Budget": f"uniform4: {plan['budget']['bytes']:,} bytes",
        "Reference": "bf16",
        "Method": "kl",
        "Rounding": "search (scores), not recorded (weights)",
        "Scores from": "optiq.jsonl",
        "Tokens": "8,192",
        "Tokens per domain": "prose 1,633, reasoning 1,641, code 1,630, agent 1,652, "
        "tool_call 1,636",
        "Sequences": "36",
        "Text sha256": calibration["sha256"],
        "Seed": "0 (text), 11 (plan)",
        "Command": "optiq convert here -o there",
        "Versions": "optiq 0.1.0, mlx 0.32.4, mlx_lm 0.32.2",
        "Machine": "cpu Intel Xeon, cores 2, memory 8.3 GB, os Linux 6.1",
        "Machine, scores": "cpu another, cores 3",
    }
    assert {term: terms[term].text for term in known} == known
    exact = {
        "Predicted KL": objective["predicted_kl"],
        "Proven lower bound": objective["bound"],
        "Gap to the bound": objective["gap"],
        "Seconds measuring": 311.4,
    }
    assert {term: figures(terms[term]) for term in exact} == {
        term: [pytest.approx(value)] for term, value in exact.items()
    }


def facts(root: Element) -> dict[str, Element]:
    """How the numbers were made: what is said by its name."""
    found = section(root, "How the numbers were made").first("dl", "facts")
    return {dt.text: dd for dt, dd in zip(found.all("dt"), found.all("dd"), strict=True)}


def test_the_method_and_the_reference_are_told_in_words(small: Pair) -> None:
    plan, scores = small
    methods = {
        "kl": "One module at a time was rounded",
        "fisher": "one backward pass over the calibration text",
        "auto": "for experts and for routers that KL was measured",
    }
    references = {"bf16": "stayed unquantized", "uniform4": "ran in uniform 4-bit"}
    for method, words in methods.items():
        for reference, more in references.items():
            scores |= {"method": method, "reference": reference}
            text = section(page(plan, scores), "How the numbers were made").text
            told = {w for w in (*methods.values(), *references.values()) if w in text}
            expected = {words, more} | ({methods["fisher"]} if method == "auto" else set())
            assert told == expected


def test_other_sizes_and_other_texts_are_said(small: Pair) -> None:
    plan, scores = small
    plan["uniform4"]["nbytes"] = round(plan["nbytes"] * 0.8)
    plan["uniform4"]["measured"]["text_sha256"] = "another text"
    root = page(plan, scores)
    assert "25.0 % more bytes" in root.first("header").text
    assert "cannot be compared" in section(root, "Against stock uniform 4-bit").text


def test_bytes_per_format_add_up(shown: Shown) -> None:
    plan = shown.plan
    table = rows(section(shown.root, "Bytes per format").first("table"))
    assert sum(figures(cells[2])[0] for cells in table.values()) == plan["nbytes"]
    assert figures(table["norms, biases"][2]) == [plan["model"]["fixed_bytes"]]
    counts = [int(cells[3].text) for cells in table.values() if cells[3].text]
    assert sum(counts) == len(plan["modules"])


def test_formats_measured_are_summed_up(small: Pair) -> None:
    plan, scores = small
    for i, m in enumerate(scores["modules"]):
        m["scores"]["nvfp4"] = {"kl": 0.5, "se": None, "mse": 0.01 * i}
        m["scores"]["4g64"]["mse"] = None
    table = rows(section(page(plan, scores), "Formats measured").first("table"))
    measured = {fmt for m in scores["modules"] for fmt in m["scores"]}
    assert table.keys() == measured - {"bf16"}
    for fmt, (bits, modules, error, kl) in table.items():
        found = [m["scores"][fmt]["kl"] for m in scores["modules"] if fmt in m["scores"]]
        assert int(modules.text) == len(found)
        assert figures(kl) == pytest.approx([sum(found)])
        width, group = {"nvfp4": (4, 16)}.get(fmt) or map(int, fmt.split("g"))
        assert figures(bits) == [width + (8 if fmt == "nvfp4" else 32) / group]
        if fmt != "nvfp4":
            assert error.text == "not measured"
    middle = (len(scores["modules"]) - 1) / 2
    assert figures(table["nvfp4"][2]) == pytest.approx([0.01 * middle])


def test_a_plan_made_from_the_scores_has_a_page(small: Pair) -> None:
    scores = Scores.from_json(small[1])
    root = read(conversion_page(build(scores, Size.parse("5bpw")), scores))
    assert root.first("h1").text == "tiny"
    assert "Predicted KL" in root.first("header").text


def test_scores_of_another_model_are_refused(small: Pair) -> None:
    plan, scores = small
    other = scores | {"model": scores["model"] | {"fingerprint": "another"}}
    fewer = scores | {"modules": scores["modules"][1:]}
    for wrong in (other, fewer):
        with pytest.raises(SensitivityError, match="measure the planned model"):
            page(plan, wrong)


def test_unwritable_path_is_one_clear_line(small: Pair, tmp_path: Path) -> None:
    path = tmp_path / "absent" / "report.html"
    with pytest.raises(ExportError, match=re.escape(str(path))):
        write(*parse(small), path)

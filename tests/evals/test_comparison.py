"""`optiq compare --evals`: what is paired, what is refused, and what the verdicts rest on."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optiq.cli import main
from optiq.errors import EvalError, OptiqError
from optiq.evals import metrics, runs
from optiq.evals.comparison import Comparison, compare
from optiq.evals.records import Record
from optiq.quality import statistics
from optiq.quality.pairs import detectable, holm
from tests.evals.fakes import BENCHMARKS, ITEMS, write_all, write_run
from tests.report.page import figures, read, rows


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of three models: `a` and `b` alike, `worse` what it says."""
    home = tmp_path_factory.mktemp("evals")
    write_all(home / "a", 0.60, 0.10)
    write_all(home / "b", 0.60, 0.10, seed=1, fingerprint="1" * 64)
    write_all(home / "worse", 0.40, 0.20, seed=2, fingerprint="2" * 64)
    return home


@pytest.fixture(scope="module")
def worse(home: Path) -> Comparison:
    return compare(runs.load(home / "a"), runs.load(home / "worse"))


@pytest.fixture(scope="module")
def alike(home: Path) -> Comparison:
    return compare(runs.load(home / "a"), runs.load(home / "b"))


def test_every_metric_is_paired(worse: Comparison, home: Path) -> None:
    assert [row.metric for row in worse.metrics] == list(metrics.METRICS)
    assert worse.tests == 6
    first, second = (runs.load(home / name) for name in ("a", "worse"))
    for row in worse.metrics:
        values = [
            np.concatenate([np.atleast_1d(r.metrics[row.metric.name]) for r in side.records])
            for side in (first[row.metric.task], second[row.metric.task])
        ]
        means = [float(v.mean()) for v in values]
        assert [row.first.value, row.second.value] == pytest.approx(means)
        pair = row.paired
        assert pair.difference == pytest.approx(means[1] - means[0])
        assert pair.low <= pair.difference <= pair.high
        assert (row.verdict is None) == (row.p is None) == (not row.metric.main)
        if pair.only_first is not None:
            assert pair.only_first == ((values[0] == 1) & (values[1] == 0)).sum()
    main = [row for row in worse.metrics if row.metric.main]
    adjusted = holm({row.metric.task: row.paired.p for row in main})
    assert {row.metric.task: row.p for row in main} == adjusted
    assert {row.verdict for row in main} == {"worse"}


def test_capability_is_the_mean_of_five(worse: Comparison) -> None:
    five = [r for r in worse.metrics if r.metric.main and r.metric.task in BENCHMARKS]
    whole = worse.capability
    assert whole
    assert whole.first.value == pytest.approx(np.mean([row.first.value for row in five]))
    assert whole.second.value == pytest.approx(np.mean([row.second.value for row in five]))
    assert whole.paired.difference == pytest.approx(-0.2, abs=0.06)
    assert whole.verdict == "worse"


def test_alike_is_no_detectable_difference(alike: Comparison) -> None:
    assert alike.capability
    verdicts = [row.verdict for row in (*alike.metrics, alike.capability) if row.verdict]
    assert len(verdicts) == 7
    assert all(text.startswith("no detectable difference") for text in verdicts)
    assert sum("80 % power at" in text for text in verdicts) == 6  # the KLs are the same to the bit
    found = 100 * detectable(alike.metrics[0].paired.se, tests=6)
    assert f"(80 % power at {found:.2g} points)" in verdicts[0]


@pytest.mark.parametrize("other", ["worse", "b"])
def test_table(
    request: pytest.FixtureRequest,
    home: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    other: str,
) -> None:
    monkeypatch.chdir(home)
    assert main(["compare", "--evals", "a", other]) == 0
    table = capsys.readouterr().out
    compared: Comparison = request.getfixturevalue({"b": "alike"}.get(other, other))
    gsm8k = next(row for row in compared.metrics if row.metric.name == "flexible")
    line = next(line for line in table.splitlines() if line.startswith("GSM8K, 3-shot  "))
    paired, verdict = gsm8k.paired, gsm8k.verdict or ""
    change, low, high = (f"{100 * x:+.1f}" for x in (paired.difference, paired.low, paired.high))
    scores = [f"{100 * side.value:.1f}" for side in (gsm8k.first, gsm8k.second)]
    only = [str(paired.only_first), str(paired.only_second)]
    p = "<0.0001" if (gsm8k.p or 0) < 1e-4 else f"{gsm8k.p:.2g}"
    cells = ["GSM8K,", "3-shot", "200", *scores, change, f"({low}", "to", f"{high})", *only, p]
    assert line.split() == [*cells, *verdict.split()]
    assert f"A: a\nB: {other}" in table
    assert "Holm's correction over the main metric of 6 benchmarks" in table


def test_page(
    worse: Comparison, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(home)
    page = tmp_path / "page.html"
    assert main(["compare", "--evals", "a", "worse", "-o", str(page)]) == 0
    root = read(page.read_text())
    table = rows(root.first("table"))
    for row in worse.metrics:
        a, b, change = (figures(cell) for cell in table[row.metric.label][1:4])
        assert (a, b) == ([row.first.value], [row.second.value])
        assert change == [row.paired.difference]
    assert "There are differences" in root.first("header").text


def test_json(
    worse: Comparison,
    home: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(home)
    assert main(["compare", "--evals", "a", "worse", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert list(data) == ["models", "metrics", "capability", "tests", "notes"]
    mmlu, row = data["metrics"][0], worse.metrics[0]
    facts = {"task": "mmlu", "metric": "accuracy", "label": "MMLU, 5-shot", "main": True}
    figures = {
        "first": asdict(row.first),
        "second": asdict(row.second),
        "paired": asdict(row.paired),
        "p_holm": row.p,
        "verdict": "worse",
    }
    assert mmlu == {**facts, "unit": "points", "scale": 100, **figures}
    assert list(data["capability"]) == ["first", "second", "paired", "verdict"]


def test_model_folders_and_record_folders_are_the_same(worse: Comparison, home: Path) -> None:
    write_run(home / "model" / "optiq" / "evals", "gsm8k", 0.6)
    first = runs.load(runs.locate(home / "model"))
    found = compare(first, runs.load(runs.locate(home / "worse")))
    assert [row.metric.task for row in found.metrics] == ["gsm8k", "gsm8k"]
    assert found.capability is None
    assert found.notes == ("only the second model has mmlu, ifeval, bfcl, humaneval, kl",)
    same = next(row for row in worse.metrics if row.metric.task == "gsm8k")
    assert found.metrics[0].paired == same.paired


def test_quick_looks_pair_what_they_share(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    write_run(a, "bfcl", 0.6, items=30, limit=30)
    write_run(b, "bfcl", 0.6, seed=1, fingerprint="1" * 64)
    result = compare(runs.load(a), runs.load(b))
    assert result.metrics[0].paired.n == 30
    assert result.notes == ("bfcl: a quick look, 30 items",)


def test_notes_what_weakens_a_comparison(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "bfcl", 0.6, versions={"optiq": "0.1.0", "mlx": "0.32.4"})
    write_run(tmp_path / "b", "bfcl", 0.6, versions={"optiq": "0.1.0", "mlx": "0.32.3"})
    assert compare(runs.load(tmp_path / "a"), runs.load(tmp_path / "b")).notes == (
        "both are records of the same model",
        "bfcl: the runs were made with different versions of mlx",
    )


def test_refuses_a_folder_of_two_models(home: Path, tmp_path: Path) -> None:
    write_run(tmp_path, "bfcl", 0.6)
    write_run(tmp_path, "gsm8k", 0.6, fingerprint="9" * 64)
    with pytest.raises(EvalError, match=r"gsm8k.jsonl and .*bfcl.jsonl are records of different"):
        compare(runs.load(home / "a"), runs.load(tmp_path))


def edit(path: Path, line: int, **changes: Any) -> None:
    """Change fields of one line of a record file."""
    lines = path.read_text().splitlines()
    lines[line] = json.dumps(json.loads(lines[line]) | changes)
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"protocol": "gsm8k/2"}, "differ in protocol (gsm8k/1, gsm8k/2); evaluate both with"),
        ({"data_sha256": "e" * 64}, "differ in data_sha256"),
        ({"seed": 3}, "differ in seed (0, 3)"),
        ({"items": 300}, "is unfinished (200 of 300 items); finish it with"),
    ],
)
def test_refuses_what_cannot_be_paired(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    write_run(tmp_path / "a", "gsm8k", 0.6)
    edit(write_run(tmp_path / "b", "gsm8k", 0.6), 0, **other)
    first, second = (runs.load(tmp_path / name) for name in "ab")
    with pytest.raises(EvalError, match=re.escape(message)):
        compare(first, second)
    with pytest.raises(EvalError, match=re.escape(message.split(" (")[0])):
        compare(second, first)


def test_refuses_other_prompts(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "gsm8k", 0.6)
    path = write_run(tmp_path / "b", "gsm8k", 0.6)
    edit(path, 4, prompt_sha256="f" * 64)
    first, second = (runs.load(tmp_path / name) for name in "ab")
    with pytest.raises(EvalError, match=r"differently in 1 of 200 items \(such as gsm8k/3\)"):
        compare(first, second)


def test_refuses_other_tokens(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "kl", 0.1)
    path = write_run(tmp_path / "b", "kl", 0.1)
    edit(path, 1, metrics={"kl": [0.1, 0.2], "top1": [1.0, 1.0]})
    with pytest.raises(OptiqError, match="scored on different kl of the same item"):
        compare(runs.load(tmp_path / "a"), runs.load(tmp_path / "b"))


def test_refuses_nothing_in_common(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "kl", 0.1)
    write_run(tmp_path / "b", "bfcl", 0.1)
    with pytest.raises(EvalError, match="nothing in common"):
        compare(runs.load(tmp_path / "a"), runs.load(tmp_path / "b"))
    write_run(tmp_path / "c", "kl", 0.1)
    edit(tmp_path / "c" / "kl.jsonl", 0, items=1)
    text = (tmp_path / "c" / "kl.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "c" / "kl.jsonl").write_text(text[0] + text[1].replace("kl/0", "other"))
    with pytest.raises(EvalError, match="share no item"):
        compare(runs.load(tmp_path / "a"), runs.load(tmp_path / "c"))


def test_damaged_records(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="has no evaluation records; make them with optiq eval"):
        runs.locate(tmp_path)
    path = write_run(tmp_path, "gsm8k", 0.6)
    assert runs.locate(tmp_path) == tmp_path
    edit(path, 3, id="gsm8k/0")
    with pytest.raises(EvalError, match="200 records of 199 items"):
        runs.load(tmp_path)
    edit(path, 3, id="gsm8k/2", metrics={"strict": True})
    with pytest.raises(EvalError, match="the item gsm8k/2 has no flexible"):
        runs.load(tmp_path)
    edit(path, 3, metrics={"strict": True, "flexible": "yes"})
    with pytest.raises(OptiqError, match="finite number"):
        compare(runs.load(tmp_path), runs.load(tmp_path))
    edit(path, 3, metrics={"strict": True, "flexible": True})
    path.rename(tmp_path / "bfcl.jsonl")
    with pytest.raises(EvalError, match="holds records of gsm8k"):
        runs.load(tmp_path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a"], "--evals compares two models, not 1"),
        (["a", "b", "a"], "not 3"),
        (["a", "b", "--reference", "x"], "are for measuring"),
        (["a", "b", "--tokens", "5"], "are for measuring"),
        (["a", "b", "--seed", "1"], "are for measuring"),
        (["a", "b", "--text", "x"], "are for measuring"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert main(["compare", "--evals", *argv]) == 2
    assert message in capsys.readouterr().err


def test_items_are_their_own_clusters_but_subjects(home: Path) -> None:
    mmlu = runs.load(home / "a")["mmlu"]
    right = [r.metrics["accuracy"] for r in mmlu.records]
    groups = [r.group for r in mmlu.records]
    assert len(set(groups)) == 57
    expected = statistics.proportion(right, groups)
    assert metrics.estimate(metrics.main_of("mmlu"), mmlu.records) == expected
    assert set(ITEMS) == set(metrics.TASKS)


def test_none_right_is_not_certainly_none(tmp_path: Path) -> None:
    """Also of the instructions of a prompt, whose variance is none."""
    for quality, limits in ((0.0, (0.0, 0.26)), (1.0, (0.74, 1.0))):
        path = write_run(tmp_path / str(quality), "ifeval", quality, items=6)
        records = runs.load(path.parent)["ifeval"].records
        for metric in metrics.of_task("ifeval"):
            found = metrics.estimate(metric, records)
            assert found.value == quality
            if metric.listed:
                assert found.n == sum(len(metrics.values(metric, r)) for r in records) == 12
                assert (found.low, found.high) == pytest.approx(limits, abs=0.03)


def test_instructions_of_one_prompt_count_as_one_where_they_are_right_together() -> None:
    metric = next(m for m in metrics.of_task("ifeval") if m.listed)
    right = [i % 5 < 2 for i in range(100)]
    found = [Record(str(i), "", "", "", {metric.name: [r] * 3}) for i, r in enumerate(right)]
    whole, once = metrics.estimate(metric, found), statistics.proportion(right)
    assert (whole.value, whole.n) == (0.4, 300)
    assert (whole.low, whole.high) == pytest.approx((once.low, once.high), abs=1e-3)

"""`optiq kv` on a tiny model: what is written, what decides, stops and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from optiq.calibration import Sample
from optiq.cli import main
from optiq.errors import BudgetError, CalibrationError, KVError, OptiqError, UsageError
from optiq.kv import KVConfig, entries, make_cache
from optiq.kv.report import KVReport
from optiq.quantize.kv import measure as measuring
from optiq.quantize.kv.configs import measure_configs
from optiq.quantize.kv.options import KVOptions
from optiq.quantize.kv.plan import kv_plan
from optiq.report.kv import kv_page
from tests.report.page import read
from tests.test_docs import ROOT, blocks
from tests.tiny import tiny_folder

QUICK: dict[str, Any] = {
    "context": 192,
    "samples": 2,
    "fp_recent": 0,
    "fp_sink": 0,
    "progress": False,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    path = tmp_path_factory.mktemp("kv")
    folder = tiny_folder(path, name="model", dtype="bfloat16", num_hidden_layers=3)
    out = path / "kv_config.json"
    return SimpleNamespace(path=path, model=folder, out=out, report=kv_plan(folder, out, **QUICK))


def test_it_writes_a_configuration_for_the_model_and_a_report(home: SimpleNamespace) -> None:
    assert sorted(p.name for p in home.path.iterdir()) == [
        "kv_config.json",
        "kv_config.report.html",
        "kv_config.report.json",
        "model",
    ]
    report = home.report
    config = KVConfig.load(home.out)
    model, _ = load_model(home.model)
    config.check(entries(model), report.model)
    assert config.nbytes(192) == report.nbytes <= report.budget
    assert report.budget == KVConfig.uniform(entries(model), "8/4").nbytes(192)
    for slot in report.scores:
        assert slot.format == getattr(config.entries[slot.cache], slot.side)
        assert slot.side == "v" or slot.format.bits >= 4
    provenance = config.provenance
    assert provenance["measured"] == report.points[0].to_json()
    assert provenance["text"]["sha256"] == report.text.sha256
    assert provenance["versions"].keys() >= {"optiq", "mlx", "mlx_lm"}


def test_the_report_has_everything_under_the_keys_of_the_file(home: SimpleNamespace) -> None:
    data = json.loads((home.path / "kv_config.report.json").read_text())
    assert KVReport.from_json(data) == home.report
    assert home.report.to_json() == data
    assert list(data) == [
        "kind", "schema", "model", "context", "budget", "nbytes", "dense_nbytes", "bytes_per_token",
        "exact", "chosen", "candidates", "ratio", "rank_correlation", "frontier", "points", "law",
        "scores", "text", "command", "versions", "machine",
    ]  # fmt: skip
    assert data["scores"][0].keys() == {
        "cache", "side", "heads", "dim", "held", "end", "format", "scores"
    }  # fmt: skip
    assert data["points"][0].keys() >= {"name", "nbytes", "predicted", "kl", "top1", "ppl_ratio"}
    for damaged in ({"kind": "optiq.kv"}, {"schema": 2}, {"law": {}}, {"points": [{}]}):
        with pytest.raises(KVError, match="make it again"):
            KVReport.from_json(data | damaged)


def test_the_documented_configuration_has_the_same_keys(home: SimpleNamespace) -> None:
    (body,) = (b for b in blocks(ROOT / "docs" / "files.md", "json") if "optiq.kv" in b)
    shown, written = json.loads(body), json.loads(home.out.read_text())
    assert shown.keys() == written.keys()
    assert shown["entries"][0].keys() == written["entries"][0].keys()
    assert shown["model"].keys() == written["model"].keys()
    assert shown["provenance"].keys() <= written["provenance"].keys()
    config = KVConfig.from_json(shown)
    assert config.to_json()["entries"] == shown["entries"]


def test_real_kl_decides_and_uniform_is_never_better(home: SimpleNamespace) -> None:
    report = home.report
    candidates = {c.name: c for c in report.candidates}
    assert {"free", "8/4"} <= set(candidates)
    chosen = candidates[report.chosen]
    assert chosen.kl == min(c.kl for c in candidates.values())
    assert all(c.nbytes <= report.budget for c in candidates.values())
    assert chosen.nbytes == report.nbytes
    assert report.ratio == chosen.kl / chosen.predicted
    points = {p.name: p for p in report.points}
    assert {"optiq", "8/8", "8/4", "6/4", "4/4"} <= set(points)
    assert points["8/8"].kl < points["8/4"].kl
    hashes = report.text.sha256
    assert len(set(hashes.values())) == 3
    assert {c.divergence.text_sha256 for c in candidates.values()} == {hashes["selection"]}
    assert {p.divergence.text_sha256 for p in points.values()} == {hashes["held_out"]}


# A key is rotated in steps of other sizes by other arithmetic, and where it lies between two codes
# the last bit decides.
@pytest.mark.parametrize(("widths", "slack"), [("16/3", 1e-3), ("4/3", 2e-2)])
def test_whole_configurations_are_decoded(home: SimpleNamespace, widths: str, slack: float) -> None:
    """Against float64 logits of the model decoding token by token off the configured caches."""
    model, _ = load_model(home.model)
    model.set_dtype(mx.float32)
    config = KVConfig.uniform(entries(model), widths)
    tokens = [int(t) for t in np.random.default_rng(5).integers(4, 384, 40)]
    caches = make_prompt_cache(model), make_cache(model, config)
    kls, same = [], []
    for i, token in enumerate(tokens[:-1]):
        p, q = (
            np.array(model(mx.array([[token]]), cache=c)[0, 0], dtype=np.float64) for c in caches
        )
        p, q = (x - np.logaddexp.reduce(x) for x in (p, q))
        if i >= 20:
            kls.append(np.sum(np.exp(p) * (p - q)))
            same.append(p.argmax() == q.argmax())
    found = measure_configs(model, {"a": config}, [Sample("d", tokens, 1)], progress=False)["a"]
    assert found.tokens == len(kls) == 19
    assert found.kl.mean == pytest.approx(np.mean(kls), rel=slack)
    assert found.kl.max == pytest.approx(np.max(kls), rel=slack)
    assert found.top1.mean == np.mean(same)


def test_the_page_shows_every_slot_and_every_point(home: SimpleNamespace) -> None:
    page = read(kv_page(home.report))
    assert (home.path / "kv_config.report.html").read_text() == kv_page(home.report)
    points, slots, candidates = page.all("table")
    assert [row.first("th").text for row in slots.first("tbody").all("tr")] == [
        f"{i} {side}" for i in range(3) for side in ("keys", "values")
    ]
    assert len(list(points.first("tbody").all("tr"))) == len(home.report.points)
    assert len(list(candidates.first("tbody").all("tr"))) == len(home.report.candidates)
    bold = [cell.text for cell in slots.all("strong")]
    assert len(bold) == 6
    assert next(page.all("svg"))


def test_an_interrupted_run_goes_on_and_finds_the_same(
    home: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "kv.json"
    run, calls = measuring._probe, []

    def stopping(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(measuring, "_probe", stopping)
    with pytest.raises(KeyboardInterrupt):
        kv_plan(home.model, out, **QUICK)
    assert [p.name for p in tmp_path.iterdir()] == ["kv.checkpoint.json"]
    with pytest.raises(UsageError, match="--resume goes on"):
        kv_plan(home.model, out, **QUICK)
    with pytest.raises(OptiqError, match=r"another job \(formats"):
        kv_plan(home.model, out, **QUICK, formats="4,8", resume=True)
    report = kv_plan(home.model, out, **QUICK, resume=True)
    assert len(calls) == 5 + 2  # four of six units were done
    assert report.scores == home.report.scores
    assert report.candidates == home.report.candidates
    assert not (tmp_path / "kv.checkpoint.json").exists()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"size": "7/4"}, OptiqError, "no format 7g"),
        ({"size": "big"}, UsageError, "not understood"),
        ({"size": "150%"}, UsageError, "not a share"),
        ({"size": "5%"}, BudgetError, "raise --size"),
        ({"formats": "2,4"}, UsageError, "no format 2"),
        ({"context": 1024}, UsageError, "512 positions"),
        ({"context": 10}, UsageError, "too short"),
        ({"fp_recent": -1}, OptiqError, "fp_recent"),
        ({"calibration": "missing.jsonl"}, CalibrationError, "missing.jsonl"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_runs(
    home: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    error: type[Exception],
    match: str,
) -> None:
    def unreached(*_: Any) -> Any:
        raise AssertionError("it has begun to measure")

    monkeypatch.setattr(measuring, "_run", unreached)
    with pytest.raises(error, match=match):
        kv_plan(home.model, tmp_path / "kv.json", **{**QUICK, **options})
    assert list(tmp_path.iterdir()) == []


def test_none_stands_for_the_default() -> None:
    assert KVOptions.parse(samples=None, size=None, seed=3) == KVOptions.parse(seed=3)
    assert KVOptions.parse(size=None).size.text == "8/4"
    assert KVOptions.parse(fp_recent=0).fp_recent == 0
    with pytest.raises(TypeError, match="sise"):
        KVOptions.parse(**{"sise": "8/4"})


@pytest.mark.parametrize("name", ["kv.json", "kv.report.json", "kv.report.html"])
def test_a_file_that_is_not_ours_is_not_replaced(
    home: SimpleNamespace, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=f"{name} exists and"):
        kv_plan(home.model, tmp_path / "kv.json", **QUICK)
    assert (tmp_path / name).read_text() == "mine"


def test_the_command(
    home: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "kv.json")
    argv = ["kv", str(home.model), "-o", out, "--context", "192", "--samples", "2"]
    argv += ["--size", "45%", "--fp-recent", "64", "--fp-sink", "4", "--formats", "3,4,8"]
    assert main(argv) == 0
    text = capsys.readouterr().out
    for word in ("keys of", "(45%)", "by measured KL", "held-out text", "8/4", "written"):
        assert word in text
    config = KVConfig.load(out)
    assert (config.fp_recent, config.fp_sink) == (64, 4)
    assert main([*argv, "--json"]) == 2
    assert "kv.json exists; --overwrite replaces it" in capsys.readouterr().err
    assert main([*argv, "--json", "--overwrite"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kind"] == "optiq.kv.report"
    # 68 tokens in 3 layers, with 2 heads of 16 keys and values of 2 bytes each
    assert report["exact"] == {"recent": 64, "sink": 4, "nbytes": 68 * 3 * 2 * 2 * 16 * 2}

"""The model card: every figure from a record, nothing from another model, nothing lost."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import ModelCard
from mlx_lm import convert as stock_convert

import optiq
from optiq.cli import main
from optiq.cli.tables import card_table
from optiq.errors import EvalError, ExportError, OptiqError, UsageError
from optiq.evals import metrics, runs
from optiq.evals.runner import evaluate
from optiq.planning.plan import Plan, build
from optiq.planning.scores import Scores
from optiq.planning.size import UNIFORM4_SIZE, Size
from optiq.quality import statistics
from optiq.quality.results import Distribution, Mean, Measured
from optiq.quantize.export import export
from optiq.sources import resolve
from tests.evals.fakes import BENCHMARKS, ITEMS, write_all, write_run
from tests.planned import scores_of, source_of

MEASURED = Measured(
    kl=Distribution(0.1234, 0.011, median=0.09, p95=0.4, p99=0.7, p999=1.1, max=2.5),
    top1=Mean(0.777, 0.013),
    ppl_ratio=1.02,
    tokens=2036,
    sequences=9,
    text_sha256="ab" * 32,
    nbytes=1000,
    bpw=4.5,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, written by a plan; `stock` at 4 and 8 bits by mlx-lm's converter; no records."""
    home = tmp_path_factory.mktemp("card")
    source = source_of(home)
    scores = scores_of(source)
    plan = build(scores, UNIFORM4_SIZE, command="optiq convert /a/b -o c")
    assert plan.uniform4
    stock = replace(MEASURED, top1=Mean(0.55, None))
    plan = replace(plan, measured=MEASURED, uniform4=replace(plan.uniform4, measured=stock))
    export(source, plan, home / "model", scores=scores)
    for bits in (4, 8):
        out = str(home / f"stock{bits}")
        stock_convert(str(source.path), out, quantize=True, q_bits=bits)
    return home


@pytest.fixture
def model(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the model of its own; the hub cannot be asked."""
    monkeypatch.setattr(huggingface_hub, "HfApi", Offline)
    return Path(shutil.copytree(home / "model", tmp_path / "model"))


class Offline:
    """A hub that nobody reaches."""

    def model_info(self, *_: Any, **__: Any) -> Any:
        raise ConnectionError


def fingerprint(folder: Path) -> str:
    return resolve(str(folder)).fingerprint


def evaluated(folder: Path, quality: float = 0.6, kl: float = 0.1, **options: Any) -> None:
    write_all(folder / runs.FOLDER, quality, kl, fingerprint=fingerprint(folder), **options)


def section(text: str, title: str) -> str:
    """The text under a heading."""
    return re.split(r"^## ", text.split(f"\n## {title}\n")[1], flags=re.M)[0]


def table(text: str, title: str) -> list[list[str]]:
    """The cells of the table under a heading, head first."""
    lines = [line for line in section(text, title).splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]
    assert len({len(row) for row in rows}) == 1
    return [rows[0], *rows[2:]]


def test_figures_are_those_of_the_records(model: Path) -> None:
    evaluated(model)
    card = optiq.card(model, name="org/model-optiq")
    assert card.path == model / "README.md"
    text = card.path.read_text()
    found = {row[0].strip("*"): row for row in table(text, "Benchmarks")[1:]}
    right = {}
    for task in BENCHMARKS:
        records = runs.load(model / runs.FOLDER)[task].records
        for metric in metrics.of_task(task):
            values = np.concatenate([np.atleast_1d(r.metrics[metric.name]) for r in records])
            cells = found[metric.label]
            assert cells[1] == str(len(values))
            assert cells[2].startswith(f"{100 * values.mean():.1f} (")
            if metric.main:
                right[task] = float(values.mean())
    score = 100 * np.mean(list(right.values()))
    assert found["Capability Score"][2].startswith(f"{score:.1f} (")
    low, high = statistics.wilson(right["bfcl"] * 120, 120)
    assert f"({100 * low:.1f}\N{EN DASH}{100 * high:.1f})" in found["BFCL-V3 simple"][2]

    data = ModelCard.load(card.path).data
    assert data.model_name == "org/model-optiq"
    assert data.library_name == "mlx"
    assert data.pipeline_tag == "text-generation"
    assert "mlx" in data.tags
    listed = {r.dataset_name: (r.metric_value, r.metric_args["items"]) for r in data.eval_results}
    expected = dict(zip(("MMLU", "GSM8K", "IFEval", "BFCL", "HumanEval"), BENCHMARKS, strict=True))
    assert listed == {
        name: (pytest.approx(100 * right[task], abs=0.005), ITEMS[task])
        for name, task in expected.items()
    }


def test_kl(model: Path) -> None:
    evaluated(model)
    rows = table(optiq.card(model).path.read_text(), "Distance from the base model")
    assert rows[1][:3] == ["this model", "0.123 ± 0.011", "0.0900"]
    assert rows[1][-2:] == ["77.7 ± 1.3 %", "2,036"]
    assert rows[2][-2:] == ["55.0 %", "2,036"]
    records = runs.load(model / runs.FOLDER)["kl"].records
    kl = np.concatenate([r.metrics["kl"] for r in records])
    assert rows[3][0] == "this model, as evaluated against another model"
    assert rows[3][1].startswith(f"{kl.mean():.3f}")
    assert rows[3][6] == f"{kl.max():.3g}"
    assert rows[3][-1] == str(len(kl))


def test_kl_to_the_base_model(model: Path) -> None:
    """As `optiq eval` records it: the reference is the model that plan.json names."""
    evaluate(model, tasks="kl", limit=2, progress=False)
    card = optiq.card(model)
    rows = table(card.path.read_text(), "Distance from the base model")
    assert rows[3][0] == "this model, as evaluated (quick look)"
    assert card.facts.kl
    assert card.facts.kl.sequences == 2
    assert float(rows[3][1].split()[0]) == pytest.approx(card.facts.kl.kl.value, rel=0.01)


def test_without_records_there_are_no_figures(model: Path) -> None:
    path = model / "optiq" / "plan.json"
    plan = json.loads(path.read_text())
    plan["measured"] = plan["uniform4"]["measured"] = None
    path.write_text(json.dumps(plan))
    text = optiq.card(model).path.read_text()
    rows = table(text, "Benchmarks")[1:]
    assert len(rows) == 10
    assert {tuple(row[1:]) for row in rows[:-1]} == {("", "not measured")}
    assert rows[-1][1:] == ["", "not all measured"]
    kl = table(text, "Distance from the base model")[1:]
    assert [row[1:] for row in kl] == [["not measured", *[""] * 7]] * 2
    data = ModelCard.load(model / "README.md").data
    assert data.eval_results is None
    assert "model_name" not in data.to_dict()


def test_quick_looks_and_unfinished_runs_are_labelled(model: Path) -> None:
    mark, folder = fingerprint(model), model / runs.FOLDER
    write_run(folder / "limit-20", "gsm8k", 0.6, items=20, limit=20, fingerprint=mark)
    write_run(folder / "limit-40", "gsm8k", 0.6, items=40, limit=40, fingerprint=mark)
    write_run(folder / "limit-20", "bfcl", 0.6, items=20, limit=20, fingerprint=mark)
    path = write_run(folder, "bfcl", 0.6, fingerprint=mark)
    path.write_text("\n".join(path.read_text().splitlines()[:51]) + "\n")
    path = write_run(folder, "humaneval", 0.6, fingerprint=mark)
    path.write_text("\n".join(path.read_text().splitlines()[:8]) + "\n")
    text = optiq.card(model).path.read_text()
    rows = {row[0]: row[1:] for row in table(text, "Benchmarks")}
    assert rows["**GSM8K, 3-shot** (quick look)"][0] == "40"
    assert rows["**BFCL-V3 simple** (quick look)"][0] == "20"
    assert "too few to tell" not in str(rows)
    assert rows["**HumanEval pass@1**"] == ["", "unfinished, 7 of 164 items"]
    assert "do not compare with any others" in section(text, "Benchmarks")
    assert ModelCard.load(model / "README.md").data.eval_results is None


def test_two_items_are_too_few_to_tell(model: Path) -> None:
    for task in BENCHMARKS:
        write_run(
            model / runs.FOLDER / "limit-2", task, 0.0, items=2, limit=2,
            fingerprint=fingerprint(model),
        )  # fmt: skip
    text = optiq.card(model).path.read_text()
    benchmarks = section(text, "Benchmarks")
    assert "0.0" not in benchmarks
    assert "0.0" not in card_table(optiq.card(model))
    assert benchmarks.count("too few to tell") == len(table(text, "Benchmarks")) - 1


def test_the_model_is_loaded_by_what_works(model: Path) -> None:
    """The id on the hub, or from within its folder, wherever that is."""
    text = optiq.card(model).path.read_text()
    assert "mlx_lm.generate --model . --prompt" in text
    assert 'load(".")' in text
    assert "In the folder of the model:" in text
    text = optiq.card(model, name="org/it").path.read_text()
    assert "mlx_lm.generate --model org/it --prompt" in text
    assert "In the folder" not in text


def test_a_whole_run_comes_before_a_quick_look(model: Path) -> None:
    mark, folder = fingerprint(model), model / runs.FOLDER
    write_run(folder / "limit-20", "gsm8k", 0.6, items=20, limit=20, fingerprint=mark)
    write_run(folder, "gsm8k", 0.6, fingerprint=mark)
    rows = {row[0]: row[1:] for row in table(optiq.card(model).path.read_text(), "Benchmarks")}
    assert rows["**GSM8K, 3-shot**"][0] == "200"


def test_against_uniform(home: Path, model: Path) -> None:
    evaluated(model, 0.65, 0.1, seed=1)
    stock = Path(shutil.copytree(home / "stock4", model.parent / "stock"))
    evaluated(stock, 0.45, 0.4, seed=2)
    card = optiq.card(model, uniform=stock)
    text = card.path.read_text()
    head, *rows = table(text, "Benchmarks")
    assert head == ["", "items", "score", "uniform 4-bit, groups of 64", "difference", "verdict"]
    own, other = (runs.load(folder / runs.FOLDER) for folder in (model, stock))
    five = [score for score in card.facts.scores if score.metric.task != "kl"]
    for row, score in zip(rows[:-1], five, strict=True):
        metric = score.metric
        means = [
            np.concatenate([np.atleast_1d(r.metrics[metric.name]) for r in run.records]).mean()
            for run in (own[metric.task], other[metric.task])
        ]
        assert score.against
        assert score.against.paired.difference == pytest.approx(means[0] - means[1])
        assert row[3].startswith(f"{100 * means[1]:.1f} (")
        assert row[4].startswith(f"{100 * (means[0] - means[1]):+.1f} (")
        assert row[5] == ("better" if metric.main else "")
    assert rows[-1][0] == "**Capability Score**"
    assert rows[-1][5] == "better"
    assert ": better." in section(text, "Distance from the base model")
    nbytes = json.loads((model / "optiq" / "plan.json").read_text())["nbytes"]
    assert f"this model {nbytes:,}" in section(text, "Benchmarks")


def test_uniform_without_the_same_benchmarks(home: Path, model: Path) -> None:
    mark = fingerprint(model)
    write_run(model / runs.FOLDER, "gsm8k", 0.6, fingerprint=mark)
    stock = Path(shutil.copytree(home / "stock4", model.parent / "stock"))
    rows = table(optiq.card(model, uniform=stock).path.read_text(), "Benchmarks")
    assert rows[2][3:] == ["not measured", "", ""]


def test_refuses_what_is_no_uniform_build(home: Path, model: Path) -> None:
    with pytest.raises(UsageError, match="takes a build of the same size, within 1 %"):
        optiq.card(model, uniform=home / "stock8")
    with pytest.raises(UsageError, match=r"is not what mlx_lm\.convert makes"):
        optiq.card(model, uniform=home / "model")
    with pytest.raises(UsageError, match=r"is not what mlx_lm\.convert makes"):
        optiq.card(model, uniform=home / "source-llama")
    stock = Path(shutil.copytree(home / "stock4", model.parent / "stock"))
    write_run(stock / runs.FOLDER, "gsm8k", 0.6, fingerprint=fingerprint(model))
    with pytest.raises(EvalError, match=r"stock.*gsm8k.jsonl is of another model"):
        optiq.card(model, uniform=stock)
    assert not (model / "README.md").exists()


def test_refuses_records_of_another_model(model: Path) -> None:
    write_run(model / runs.FOLDER / "limit-5", "bfcl", 1.0, items=5, limit=5, fingerprint="f" * 64)
    with pytest.raises(EvalError, match=r"limit-5/bfcl.jsonl is of another model \(ffffffffffff"):
        optiq.card(model)
    assert not (model / "README.md").exists()


def test_refuses_the_plan_of_other_weights(home: Path, model: Path) -> None:
    scores = Scores.from_json(json.loads((model / "optiq" / "sensitivity.json").read_text()))
    other = build(scores, Size.parse("6bpw"))
    path = model / "optiq" / "plan.json"
    kept = path.read_text()
    path.write_text(json.dumps(other.to_json()))
    with pytest.raises(UsageError, match="is not the plan of the weights beside it"):
        optiq.card(model)
    path.write_text(kept[:100])
    with pytest.raises(UsageError, match="cannot be read"):
        optiq.card(model)
    plan = json.loads(kept)
    del plan["measured"]["kl"]["median"]
    path.write_text(json.dumps(plan))
    with pytest.raises(UsageError, match="is incomplete"):
        optiq.card(model)
    path.unlink()
    with pytest.raises(UsageError, match=r"has no optiq/plan\.json"):
        optiq.card(model)
    assert not (model / "README.md").exists()


def test_quantization_table(model: Path) -> None:
    plan = Plan.from_json(json.loads((model / "optiq" / "plan.json").read_text()))
    rows = table(optiq.card(model).path.read_text(), "Quantization")[1:]
    assert sum(int(row[3].replace(",", "")) for row in rows) == plan.nbytes
    assert sum(int(row[1]) for row in rows[:-1]) == len(plan.modules)
    counts = {row[0].strip("`"): int(row[1]) for row in rows[:-1]}
    formats = [str(m.format) for m in plan.modules]
    assert counts == {fmt: formats.count(fmt) for fmt in formats}


def test_provenance_hides_folders(model: Path) -> None:
    write_run(model / runs.FOLDER, "bfcl", 0.6, fingerprint=fingerprint(model))
    text = optiq.card(model).path.read_text()
    rows = dict(table(text, "How the numbers were made"))
    assert rows["command"] == "`optiq convert b -o c`"
    assert rows["weights"] == f"`{fingerprint(model)}`"
    run = runs.load(model / runs.FOLDER)["bfcl"]
    assert run.sha256()[:12] in rows["bfcl records"]
    assert str(model.parent) not in text


@pytest.mark.parametrize("name", ["a|b", "```\n---\n<b>", '"; rm -rf ~ #', "*x* [y](z)", "yes: no"])
def test_names_break_nothing(model: Path, name: str) -> None:
    write_run(model / runs.FOLDER, "gsm8k", 0.6, fingerprint=fingerprint(model))
    plan = json.loads((model / "optiq" / "plan.json").read_text())
    plan["command"] = f"optiq convert '{name}"
    plan["versions"] = {"optiq": name}
    (model / "optiq" / "plan.json").write_text(json.dumps(plan))
    path = optiq.card(model, name=name).path
    data = ModelCard.load(path).data
    assert data.model_name == name
    text = path.read_text()
    for title in ("Benchmarks", "Quantization", "How the numbers were made"):
        assert len(table(text, title)) > 2
    assert len(re.findall("^```", text, re.M)) == 6
    assert "<b>" not in re.split("^```", text.split("\n---\n", 1)[1], flags=re.M)[0]


Card = Callable[..., dict[str, Any]]


@pytest.fixture
def front(model: Path) -> Card:
    """The front matter of the model made from what `source` names."""

    def front(source: str, **options: Any) -> dict[str, Any]:
        path = model / "optiq" / "plan.json"
        plan = json.loads(path.read_text())
        kind = "folder" if Path(source).is_absolute() else "hub"
        plan["model"] |= {"name": source, "kind": kind, "path": None if kind == "hub" else source}
        path.write_text(json.dumps(plan))
        optiq.card(model, **options)
        data: dict[str, Any] = ModelCard.load(model / "README.md").data.to_dict()
        return data

    return front


def test_base_model_on_disk(front: Card, tmp_path: Path, model: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\nlanguage:\n- en\n- pt\n---\n# base\n")
    found = front(str(base))
    assert found["license"] == "mit"
    assert found["language"] == ["en", "pt"]
    assert "base_model" not in found
    text = (model / "README.md").read_text()
    assert "mit, as the base model" in section(text, "Licence")
    assert "\nbase in **" in text
    assert front(str(base), license="apache-2.0", base_model="org/base")["license"] == "apache-2.0"
    (base / "README.md").write_text("---\n: [\n---\n")
    assert "license" not in front(str(base))


def test_how_mlx_lm_departs_from_the_original_is_said_first(model: Path) -> None:
    path = model / "optiq" / "plan.json"
    plan = json.loads(path.read_text())
    plan["model"]["departures"] = ["without its attention window of 64 tokens"]
    path.write_text(json.dumps(plan))
    optiq.card(model)
    introduction, _ = (model / "README.md").read_text().split("\n## ", 1)
    assert "**Not as the original:** mlx-lm runs " in introduction
    assert "without its attention window of 64 tokens." in introduction


def test_the_card_of_the_source_is_replaced_and_kept(front: Card, model: Path) -> None:
    """And what it says holds, though the source itself is gone."""
    said = "---\nlicense: mit\nlanguage: no\n---\n# The source\n"
    kept = model / "optiq" / "source-card.md"
    for path in (model / "README.md", kept):
        path.write_text(said)
    found = front("/gone/base")
    assert (found["license"], found["language"]) == ("mit", "no")
    assert kept.read_text() == said
    (model / "README.md").write_text(f"{said}Somebody's words.\n")
    with pytest.raises(UsageError, match="was changed since"):
        front("/gone/base")


@pytest.mark.parametrize("said", ["[en, no]", "\n- en\n- no", "[en, 'no']"])
def test_languages_are_read_as_the_hub_reads_them(front: Card, tmp_path: Path, said: str) -> None:
    """YAML 1.2: no is Norwegian."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(f"---\nlicense: mit\nlanguage: {said}\n---\n")
    assert front(str(base))["language"] == ["en", "no"]
    (base / "README.md").write_text("---\nlanguage: no\ngated: true\n---\n")
    assert front(str(base))["language"] == "no"


def test_base_model_on_the_hub(front: Card, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = front("org/base")
    assert found["base_model"] == "org/base"
    assert found["base_model_relation"] == "quantized"
    assert "license" not in found
    assert "Not recorded" in section((model / "README.md").read_text(), "Licence")

    class Hub:
        def model_info(self, name: str, **_: Any) -> Any:
            link = "https://example.org/licence"
            data = {"license": "other", "license_name": "x-2", "license_link": link}
            return huggingface_hub.hf_api.ModelInfo(id=name, cardData=data, tags=[])

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    found = front("org/base")
    assert (found["license"], found["license_name"]) == ("other", "x-2")
    licence = section((model / "README.md").read_text(), "Licence")
    assert "[x-2](https://example.org/licence)" in licence
    with pytest.raises(UsageError, match="--base-model base is not a hub id"):
        front("org/base", base_model="base")


@pytest.mark.parametrize("kind", [None, "folder", "gguf"])
def test_what_looks_like_a_hub_id_but_is_a_path(model: Path, kind: str | None) -> None:
    """A relative path with one slash; plans of earlier versions do not say what it is."""
    path = model / "optiq" / "plan.json"
    plan = json.loads(path.read_text())
    name = "demo/SmolLM2-135M-Instruct.Q4_1.gguf"
    plan["model"] |= {"name": name, "kind": kind, "path": kind and f"/gone/{name}"}
    path.write_text(json.dumps(plan))
    optiq.card(model)
    assert "base_model" not in ModelCard.load(model / "README.md").data.to_dict()
    assert "huggingface.co/demo" not in (model / "README.md").read_text()


def test_only_an_unchanged_card_is_replaced(model: Path) -> None:
    path = model / "README.md"
    path.write_text("precious")
    with pytest.raises(UsageError, match="was not written, or was changed since"):
        optiq.card(model)
    assert path.read_text() == "precious"
    optiq.card(model, force=True)
    first = path.read_text()
    write_run(model / runs.FOLDER, "gsm8k", 0.6, fingerprint=fingerprint(model))
    optiq.card(model)
    assert path.read_text() != first
    path.write_text(path.read_text().replace("plain mlx-lm model", "plain model"))
    with pytest.raises(UsageError, match="was changed since"):
        optiq.card(model)
    other = optiq.card(model, model.parent / "card.md").path
    assert other.read_text().replace("plain mlx-lm model", "plain model") != first
    path.unlink()
    path.mkdir()
    with pytest.raises(UsageError, match="was changed since"):
        optiq.card(model)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_loses_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    optiq.card(model)
    before = (model / "README.md").read_text()
    write_run(model / runs.FOLDER, "gsm8k", 0.6, fingerprint=fingerprint(model))

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(ExportError if isinstance(error, OSError) else KeyboardInterrupt):
        optiq.card(model)
    assert (model / "README.md").read_text() == before
    assert not list(model.glob(".*"))


def test_command(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(model, items=12)
    assert main(["card", str(model), "--name", "org/m"]) == 0
    text = capsys.readouterr().out
    assert f"card       {model / 'README.md'}" in text
    assert "licence    not recorded: --license" in text
    assert "lacking" not in text
    check_json(json.loads(run_json(model, capsys)), model)
    (model / runs.FOLDER / "bfcl.jsonl").unlink()
    assert main(["card", str(model)]) == 0
    assert "lacking    bfcl: the card says so" in capsys.readouterr().out
    (model / "README.md").write_text("precious")
    assert main(["card", str(model)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["card", str(model / "nothing")]) == 1


def check_json(data: dict[str, Any], model: Path) -> None:
    """What --json prints, key by key as readers of it know it."""
    keys = "name base fingerprint plan metrics capability against_uniform kl runs uniform"
    assert list(data) == keys.split()
    assert data["name"] == "model"
    assert data["fingerprint"] == fingerprint(model)
    assert list(data["base"]) == [
        *("hub_id", "name", "license", "license_name", "license_link", "language")
    ]
    plan = json.loads((model / "optiq" / "plan.json").read_text())
    formats = data["plan"].pop("formats")
    assert data["plan"] == {key: value for key, value in plan.items() if key != "modules"}
    assert list(formats[0]) == ["format", "roles", "modules", "weights", "nbytes"]
    row = data["metrics"][0]
    expected = {"task": "mmlu", "metric": "accuracy", "label": "MMLU, 5-shot", "main": True}
    expected |= {"scale": 100, "limit": None, "state": "measured", "against_uniform": None}
    assert {key: value for key, value in row.items() if key != "estimate"} == expected
    assert list(row["estimate"]) == list(data["capability"]) == ["value", "low", "high", "n"]
    assert list(data["kl"]) == ["kl", "top1", "sequences", "limit", "to_base"]
    assert list(data["kl"]["kl"]) == [*row["estimate"], "median", "p95", "p99", "p999", "max"]
    run = "protocol data_sha256 items limit seed versions file_sha256"
    assert list(data["runs"]["kl"]) == run.split()


def run_json(model: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["card", str(model), "--json"]) == 0
    return capsys.readouterr().out


def test_damaged_records_are_an_error(model: Path) -> None:
    path = write_run(model / runs.FOLDER, "kl", 0.1, fingerprint=fingerprint(model))
    path.write_text(path.read_text().replace('"kl": [', '"kl": 3, "x": [', 1))
    with pytest.raises(OptiqError, match="is not a list"):
        optiq.card(model)

"""The frontier of a tiny model: its points against convert and stock, stops, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from optiq.cli import main
from optiq.distributed.ranks import ALONE
from optiq.errors import BudgetError, CheckpointError, OptiqError, UsageError
from optiq.models import stock
from optiq.planning.plan import uniform_plan
from optiq.planning.size import Size
from optiq.quantize import frontier as module
from optiq.quantize import frontier_files
from optiq.quantize.convert import convert
from optiq.quantize.frontier import frontier
from optiq.quantize.options import Options
from optiq.quantize.prepare import given, prepare, texts_of
from optiq.sources import load, resolve
from tests.planned import describe, scores_of
from tests.test_docs import example
from tests.tiny import tiny_folder

FILES = ["frontier.html", "frontier.json"]
QUICK: dict[str, Any] = {"tokens": 320, "held_out_tokens": 320, "progress": False}
SIZES = ("uniform4", "6bpw", "2bpw")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A folder with `model`, random `scores.json` of it, and its frontier `out`."""
    path = tmp_path_factory.mktemp("frontier")
    folder = tiny_folder(path, name="model", dtype="bfloat16")
    scores = path / "scores.json"
    scores.write_text(json.dumps(scores_of(resolve(str(folder))).to_json()))
    found = frontier(folder, path / "out", sizes=SIZES, scores=scores, **QUICK)
    return SimpleNamespace(
        path=path,
        model=folder,
        scores=scores,
        out=path / "out",
        found=found,
        result=found.to_json(),
    )


def test_every_point_is_there_with_its_own_bytes(home: SimpleNamespace) -> None:
    assert names(home.path) == ["model", "out", "scores.json"]
    assert names(home.out) == FILES
    result = home.result
    assert json.loads((home.out / "frontier.json").read_text()) == result
    points = {p["name"]: p for p in result["points"]}
    assert list(points) == sorted(points, key=lambda name: points[name]["nbytes"])
    families = {p["name"]: p["family"] for p in points.values()}
    assert families == {
        **{f"uniform {bits}-bit": "uniform" for bits in (3, 4, 5, 6, 8)},
        **dict.fromkeys(stock.recipes(), "recipe"),
        **{f"optiq {asked}": "ours" for asked in ("uniform4", "6bpw")},
    }
    widths = [points[f"uniform {bits}-bit"] for bits in (3, 4, 5, 6, 8)]
    assert [p["nbytes"] for p in widths] == sorted({p["nbytes"] for p in widths})
    assert [p["kl"]["mean"] for p in widths] == sorted(p["kl"]["mean"] for p in widths)[::-1]
    model, modules = describe(resolve(str(home.model)))
    uniform4 = uniform_plan(model, modules)
    assert (widths[1]["nbytes"], widths[1]["bpw"]) == (uniform4.nbytes, uniform4.bpw)
    assert widths[1]["formats"] == {"4g64": len(modules)}
    assert points["optiq uniform4"]["nbytes"] <= uniform4.nbytes
    for p in points.values():
        assert p["kl"]["se"] > 0
        assert 0 <= p["top1"]["mean"] <= 1
        assert p["text_sha256"] == widths[0]["text_sha256"]
        assert (p["uniform"] is None) is (p["family"] == "uniform")
    (note,) = result["notes"]
    assert note.startswith("optiq 2bpw is left out: ")
    assert result["sizes"] == ["uniform4", "6bpw"]


def test_the_documented_example_has_the_same_keys(home: SimpleNamespace) -> None:
    data = example("optiq.frontier")
    assert data.keys() == home.result.keys()
    assert data["points"][0].keys() == home.result["points"][0].keys()


def test_the_peak_stays_below_the_memory_stated(home: SimpleNamespace, tmp_path: Path) -> None:
    source = resolve(str(home.model))
    loaded = load(source)
    options = Options.parse(scores=home.scores, **QUICK)
    texts = texts_of(options, loaded.tokenizer)
    ready = prepare(loaded, texts, tmp_path, options, given(options, loaded))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    sizes = [Size.parse("6bpw")]
    for candidate in module._candidates(ready, sizes):
        module._point(ready, candidate)
    peak = mx.get_peak_memory() - before
    stated = module.memory(ready, sizes).total
    assert peak < stated < 10 * peak


def test_ours_is_what_convert_ships(home: SimpleNamespace, tmp_path: Path) -> None:
    shipped = convert(home.model, tmp_path / "q", size="6bpw", scores=home.scores, **QUICK)
    measured, selection = shipped.plan.measured, shipped.plan.selection
    assert measured is not None
    assert selection is not None
    (ours,) = (p for p in home.found.points if p.name == "optiq 6bpw")
    assert (ours.nbytes, ours.measured.bpw) == (measured.nbytes, measured.bpw)
    assert (ours.chosen, ours.rounding) == (selection.chosen, selection.rounding)
    assert ours.measured.text_sha256 == measured.text_sha256
    assert vars(ours.measured.kl) == pytest.approx(vars(measured.kl), rel=1e-4)
    assert vars(ours.measured.top1) == pytest.approx(vars(measured.top1), rel=1e-4)
    (stock4,) = (p for p in home.found.points if p.name == "uniform 4-bit")
    uniform4 = shipped.plan.uniform4
    assert uniform4 is not None
    assert uniform4.measured is not None
    assert vars(stock4.measured.kl) == pytest.approx(vars(uniform4.measured.kl), rel=1e-4)


@pytest.mark.parametrize("after", [1, 10])
def test_interrupted_and_resumed_it_writes_the_same_file(
    home: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    measure, calls = module.divergence.tables, []

    def counted(*args: Any, **options: Any) -> Any:
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(args)
        return measure(*args, **options)

    def again(**options: Any) -> Any:
        sizes = SIZES if options.get("resume") else SIZES[:2]
        return frontier(
            home.model, tmp_path / "out", sizes=sizes, scores=home.scores, **options, **QUICK
        )

    monkeypatch.setattr(module.divergence, "tables", counted)
    with pytest.raises(KeyboardInterrupt):
        again()
    assert names(tmp_path) == ["out.optiq-work"]
    with pytest.raises(UsageError, match=r"unfinished work; --resume goes on"):
        again()
    with pytest.raises(CheckpointError, match=r"another job \(.*seed: 0 then, 1 now"):
        again(seed=1, resume=True)
    calls.clear()
    after = 100
    again(resume=True)
    assert 0 < len(calls) < len(home.result["points"])
    assert names(tmp_path) == ["out"]
    for file in FILES:
        assert (tmp_path / "out" / file).read_bytes() == (home.out / file).read_bytes()


def test_without_scores_they_are_measured_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(tmp_path, name="model")
    out = tmp_path / "out"

    def again(**options: Any) -> Any:
        return frontier(folder, out, sizes=["uniform4"], formats="4,8", **options, **QUICK)

    with monkeypatch.context() as patch:
        patch.setattr(module.Prepared, "best", lambda *args: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            again()
    assert names(tmp_path) == ["model", "out.optiq-work"]
    with pytest.raises(UsageError, match=r"unfinished work; --resume goes on"):
        again()
    # Nothing is measured anew.
    monkeypatch.setattr("optiq.quantize.sensitivity.fisher._Batch.score", None)
    result = again(resume=True)
    assert result.scores.method == "auto"
    assert names(out) == [*FILES, "sensitivity.json"]
    kept = json.loads((out / "sensitivity.json").read_text())
    assert {f for m in kept["modules"] for f in m["scores"]} == {"4g64", "4g128", "8g64", "8g128"}
    assert names(tmp_path) == ["model", "out"]


def test_a_recipe_for_other_models_is_left_out(
    home: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stock, "recipes", lambda: ("mixed_9_9",))
    monkeypatch.setattr(stock, "UNIFORM_WIDTHS", (4,))
    options: dict[str, Any] = {"rounding": "minmax", "scores": home.scores, **QUICK}
    result = frontier(home.model, tmp_path / "out", sizes=["uniform4"], **options)
    (note,) = result.notes
    assert note.startswith("mixed_9_9 is left out: mlx-lm ")
    assert len(result.points) == 2


@pytest.fixture
def refused(
    home: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., None]:
    """Run `optiq frontier` in vain: one line, nothing measured, nothing left behind."""
    monkeypatch.setattr(module, "prepare", lambda *args, **options: pytest.fail("in vain"))

    def run(message: str, *arguments: str, code: int = 2) -> None:
        before = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
        assert main(["frontier", str(home.model), "-o", str(tmp_path / "out"), *arguments]) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert message in err
        assert err.startswith("optiq frontier: ")
        assert err.count("\n") == 1
        assert {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")} == before

    return run


def test_what_is_refused_at_once(refused: Callable[..., None]) -> None:
    refused("size '4bits' is not understood", "--sizes", "4bpw,4bits")
    refused("size '' is not understood", "--sizes", "")
    refused("format 'q4' is not understood", "--formats", "q4")
    refused("the smallest possible", "--sizes", "2bpw,1bpw", code=1)
    refused("10 calibration tokens are too few", "--tokens", "10", code=1)


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_not_ours_is_kept(
    tmp_path: Path, refused: Callable[..., None], file: str
) -> None:
    (tmp_path / "out").mkdir()
    for content in (b"precious", b"{}", b"\xff\xfe"):
        (tmp_path / "out" / file).write_bytes(content)
        refused(f"{file} exists and was not made by optiq frontier")
    (tmp_path / "out" / file).unlink()
    (tmp_path / "out" / file).mkdir()
    refused(f"{file} exists and was not made by optiq frontier")


def test_scores_of_another_kind_and_a_file_in_place_of_the_folder(
    tmp_path: Path, refused: Callable[..., None]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sensitivity.json").write_text("precious")
    refused("sensitivity.json exists and holds no scores")
    (tmp_path / "out" / "sensitivity.json").unlink()
    (tmp_path / "out").rmdir()
    (tmp_path / "out").write_text("precious")
    refused("cannot be written: Not a directory", code=1)


def test_sizes_that_the_scores_cannot_give(home: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"smallest possible plan"):
        frontier(home.model, tmp_path / "out", sizes=["2bpw"], scores=home.scores, **QUICK)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"kind": "optiq.frontier.checkpoint", "identity": {}}',
        '{"kind": "optiq.frontier.checkpoint", "identity": {}, "points": {"a": {"kl": 1}}}',
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "points.json"
    path.write_text(content)
    with pytest.raises(OptiqError, match=r"points.json is damaged .*; start anew with --restart"):
        frontier_files.Finished(path, {}, resume=True, world=ALONE)
    assert path.read_text() == content


def test_both_files_or_none(
    home: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text = Path.write_text

    def full(self: Path, text: str, **options: Any) -> int:
        if "frontier.json" in self.name:
            raise OSError(28, "No space left on device")
        return write_text(self, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OptiqError, match=r"No space left on device\); free space"):
        frontier_files.write(home.found, None, tmp_path / "out")
    assert names(tmp_path) == []


def test_the_command_replaces_its_own_files(
    home: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(stock, "UNIFORM_WIDTHS", (4, 8))
    command = ["frontier", str(home.model), "-o", str(tmp_path / "out"), "--sizes", "uniform4"]
    command += ["--scores", str(home.scores), "--rounding", "minmax", "--tokens", "320"]
    assert main(command) == 0
    text = capsys.readouterr().out
    for word in ("optiq uniform4", "uniform 8-bit", "mixed_3_4", "/ uniform", "frontier.html"):
        assert word in text
    assert main([*command, "--json", "--seed", "1"]) == 2
    assert "frontier.json exists; --overwrite replaces it" in capsys.readouterr().err
    assert main([*command, "--json", "--seed", "1", "--overwrite"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data == json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert data["seed"] == 1

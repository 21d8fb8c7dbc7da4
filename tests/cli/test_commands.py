"""Every command on tiny models: tables for people, JSON for programs."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlx_lm.utils import load_model

from optiq.cli import main
from optiq.cli.tables import shell_lines
from optiq.formats import Format
from optiq.planning.plan import Plan
from optiq.planning.proposals import propose
from optiq.planning.scores import Scores
from optiq.planning.size import UNIFORM4_SIZE
from optiq.quantize import demo as demo_module
from optiq.quantize.convert import convert
from tests.report.page import figures, read, rows
from tests.scored import PEER
from tests.tiny import tiny_folder

Optiq = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` and its conversion `out`."""
    home = tmp_path_factory.mktemp("cli")
    tiny_folder(home, name="model")
    convert(str(home / "model"), home / "out", tokens=320, held_out_tokens=320)
    return home


@pytest.fixture
def optiq(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Optiq:
    """Run a command in `folder` that succeeds; returns what it printed."""
    monkeypatch.chdir(folder)

    def run(*argv: str) -> str:
        capsys.readouterr()
        assert main(argv) == 0
        return capsys.readouterr().out

    return run


def test_convert(optiq: Optiq, tmp_path: Path) -> None:
    out = str(tmp_path / "q")
    text = optiq("convert", "model", "-o", out, "--tokens", "320", "--size", "5bpw")
    for word in ("(5bpw)", "% used", "predicted", "KL mean", "uniform 4-bit", "report.html"):
        assert word in text
    chosen = json.loads((tmp_path / "q" / "optiq" / "plan.json").read_text())["selection"]
    count = len({c["name"] for c in chosen["candidates"]})
    assert f"chosen     plan {chosen['chosen']} of {count} by measured KL" in text
    assert f"rounding {chosen['rounding']}, measured / predicted {chosen['ratio']:.2f}" in text
    assert str(tmp_path / "q" / "optiq" / "report.html") in text
    given = ["--scores", f"{out}/optiq/sensitivity.json", "--json"]
    data = json.loads(optiq("convert", "model", "-o", str(tmp_path / "again"), *given))
    plan = Plan.from_json(data)
    assert plan.asked == "uniform4"
    assert plan.measured is not None
    stored = json.loads((tmp_path / "again" / "optiq" / "plan.json").read_text())
    assert Plan.from_json(stored) == plan


def test_a_dry_run_says_where_its_scores_are(optiq: Optiq, tmp_path: Path) -> None:
    out = str(tmp_path / "q")
    quick = ["--tokens", "320", "--formats", "4,8"]
    text = optiq("convert", "model", "-o", out, *quick, "--dry-run")
    assert f"{out}.optiq-work" in text
    assert "--scores" in text
    assert not (tmp_path / "q").exists()
    json.loads(optiq("convert", "model", "-o", out, *quick, "--resume", "--dry-run", "--json"))


def test_a_conversion_ends_with_what_one_asks_first(optiq: Optiq, tmp_path: Path) -> None:
    out = tmp_path / "q"
    text = optiq("convert", "model", "-o", str(out), "--tokens", "320")
    for word in ("MB before, ", "stock uniform 4-bit of the same size: ", "time  ", "report  "):
        assert word in text.partition("tokens  ")[2]
    *_, generate, evaluate = text.splitlines()
    assert generate.split()[:3] == ["optiq", "generate", str(out)]
    assert evaluate.split()[:3] == ["optiq", "eval", str(out)]


def test_a_model_is_only_replaced_when_asked_to(
    optiq: Optiq, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, job = tmp_path / "q", ["--tokens", "320", "--formats", "4,8", "--sensitivity", "fisher"]
    optiq("convert", "model", "-o", str(out), *job)
    before = (out / "config.json").read_bytes()
    assert main(["convert", "model", "-o", str(out), *job, "--size", "6bpw"]) == 1
    assert "replace a model of optiq's with --overwrite" in capsys.readouterr().err
    assert main(["convert", "model", "-o", str(out), *job, "--size", "1bpw", "--overwrite"]) == 1
    assert (out / "config.json").read_bytes() == before  # a failure loses nothing
    optiq("convert", "model", "-o", str(out), *job, "--size", "6bpw", "--overwrite")
    assert json.loads((out / "optiq" / "plan.json").read_text())["budget"]["asked"] == "6bpw"
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
    (out / "optiq" / "plan.json").unlink()
    assert main(["convert", "model", "-o", str(out), *job, "--overwrite"]) == 1
    assert "was not written by optiq convert" in capsys.readouterr().err


def test_restart_measures_again(
    optiq: Optiq, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A dry run with another seed: the scores of the first are no obstacle."""
    job = ["convert", "model", "-o", str(tmp_path / "q"), "--tokens", "320", "--dry-run"]
    job += ["--formats", "4,8", "--sensitivity", "fisher"]
    optiq(*job)
    assert main([*job, "--seed", "3"]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in ("--scores", "--resume", "--restart"))
    assert main([*job, "--seed", "3", "--resume"]) == 1
    assert "another job (calibration: " in capsys.readouterr().err
    data = json.loads(optiq(*job, "--seed", "3", "--restart", "--json"))
    assert data["seed"] == 3


def test_info(optiq: Optiq) -> None:
    text = optiq("info", "out")
    for word in ("made from  ", "KL  ", "stock uniform 4-bit", "4g64", "asked for uniform4"):
        assert word in text
    assert f"made from  {Path('model').resolve()} (" in text  # a path that can be copied
    data = json.loads(optiq("info", "out", "--json"))
    written = json.loads(Path("out/optiq/plan.json").read_text())
    assert data["nbytes"] == written["nbytes"]
    assert (
        sum(f["nbytes"] for f in data["formats"]) + written["model"]["fixed_bytes"]
        == data["nbytes"]
    )
    assert data["plan"]["measured"] == written["measured"]
    plain = json.loads(optiq("info", "model", "--json"))
    assert (plain["plan"], plain["quantized"], plain["formats"]) == (None, None, [])
    assert main(["info", "nothing"]) == 1


def test_completion_is_a_script_that_completes(optiq: Optiq) -> None:
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    script = optiq("completion", "bash")
    asked = {
        "optiq con": "convert",
        "optiq convert --siz": "--size",
        "optiq convert m --reference b": "bf16",
    }
    for line, found in asked.items():
        at = f"COMP_WORDS=({line}); COMP_CWORD={len(line.split()) - 1}"
        call = f"{script}\n{at}; _optiq; echo ${{COMPREPLY[0]}}"
        done = subprocess.run(["bash", "-c", call], capture_output=True, text=True, check=True)
        assert done.stdout == f"{found}\n"
    assert "compdef" in optiq("completion", "zsh") or "bashcompinit" in optiq("completion", "zsh")
    assert "complete -c optiq" in optiq("completion", "fish")


def test_convert_refines(optiq: Optiq, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = ["convert", "model", "-o", str(out), "--tokens", "320"]
    assert main([*job, "--refine-tokens", "320"]) == 2
    plan = json.loads(optiq(*job, "--refine", "--refine-tokens", "320", "--json"))
    assert plan["selection"]["candidates"][-1]["rounding"].endswith(", refined")


def test_the_best_effort_refines_unless_told_not_to(optiq: Optiq, tmp_path: Path) -> None:
    def tried(*more: str) -> set[bool]:
        job = ["convert", "model", "-o", str(tmp_path / f"out{len(more)}"), "--tokens", "320"]
        plan = json.loads(optiq(*job, "--sensitivity", "fisher", "--json", *more))
        return {c["rounding"].endswith(", refined") for c in plan["selection"]["candidates"]}

    assert tried("--effort", "best") == {False, True}
    assert tried("--effort", "best", "--no-refine") == {False}


def test_sensitivity_and_plan(optiq: Optiq, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "scores.json"
    measure = ["sensitivity", "model", "-o", str(file), "--tokens", "320"]
    text = optiq(*measure)
    assert "most sensitive at 4g64" in text
    assert (
        "modules    15\nscores     method auto, reference bf16, 320 tokens of optiq.jsonl" in text
    )
    assert [p.name for p in file.parent.iterdir()] == ["scores.json"]
    scores = json.loads(file.read_text())
    found = Scores.from_json(scores)
    converted = json.loads((folder / "out" / "optiq" / "sensitivity.json").read_text())
    assert scores["modules"] == converted["modules"]  # the same text and seed

    data = json.loads(optiq("plan", str(file), "--json"))
    written = json.loads((folder / "out" / "optiq" / "plan.json").read_text())
    proposed = {name: p.to_json()["modules"] for name, p in propose(found, UNIFORM4_SIZE).items()}
    assert data["modules"] == proposed["scores"]
    assert written["modules"] == proposed[written["selection"]["chosen"]]
    assert data["nbytes"] <= data["budget"]["bytes"]
    text = optiq("plan", str(file), "--size", "6bpw", "--formats", "4,8")
    assert "(6bpw)" in text
    formats = [line.split()[0] for line in text.split("\n\n")[0].splitlines()[1:]]
    assert {Format.parse(f).bits for f in formats} == {4, 8}

    data = json.loads(
        optiq(*measure, "--formats", "4", "--sensitivity", "kl", "--overwrite", "--json")
    )
    assert data["method"] == "kl"
    assert data == json.loads(file.read_text())


def test_plan_of_the_peers_file(optiq: Optiq, tmp_path: Path) -> None:
    file = tmp_path / "sensitivity.json"
    file.write_text(json.dumps(PEER))
    data = json.loads(optiq("plan", str(file), "--size", "8bpw", "--json"))
    assert data["model"]["name"] == "org/model"
    assert len(data["modules"]) == 3
    assert "4g64" in optiq("plan", str(file), "--size", "7.5bpw")


def test_compare(optiq: Optiq, folder: Path) -> None:
    text = optiq("compare", "model", "out", "--tokens", "320")
    for word in ("reference: model", "held-out rows", "bits per weight", "KL 99.9 %", "out"):
        assert word in text
    data = json.loads(optiq("compare", "out", "model", "--reference", "model", "--json"))
    written = json.loads((folder / "out" / "optiq" / "plan.json").read_text())
    assert list(data["models"]) == ["out", "model"]
    assert data["models"]["out"]["nbytes"] == written["nbytes"]
    assert data["models"]["out"]["bpw"] == pytest.approx(written["bpw"])
    assert data["models"]["model"]["kl"]["mean"] == pytest.approx(0, abs=1e-7)
    assert data["models"]["model"]["bpw"] == 32
    sizes = [a.nbytes for a in load_model(folder / "model")[0].model.embed_tokens.values()]
    assert data["models"]["model"]["nbytes"] > sum(sizes)


def test_compare_writes_a_page(
    optiq: Optiq, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    job = ["compare", "model", "out", "--tokens", "320", "-o", str(page)]
    data = json.loads(optiq(*job, "--json"))
    root = read(page.read_text())
    (cells,) = rows(root.first("table")).values()
    kl = data["models"]["out"]["kl"]
    assert figures(cells[2]) == [kl["mean"], kl["se"]]
    assert main(job) == 2
    assert "page.html exists; --overwrite replaces it" in capsys.readouterr().err
    assert f"page       {page}" in optiq(*job, "--overwrite")


def test_compare_gives_the_numbers_of_the_conversion(optiq: Optiq, folder: Path) -> None:
    """The same held-out text, tokens and seed; a conversion runs block by block."""
    data = json.loads(optiq("compare", "model", "out", "--tokens", "320", "--json"))
    written = json.loads((folder / "out" / "optiq" / "plan.json").read_text())
    found, noted = data["models"]["out"], written["measured"]
    assert found.keys() == noted.keys()
    for key, value in noted.items():
        same = pytest.approx(value, rel=1e-5) if isinstance(value, dict | float) else value
        assert found[key] == same, key


def test_compare_on_rows_of_ones_own(optiq: Optiq, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    text = "The river turned silver when the evening light reached it. " * 6
    rows.write_text(json.dumps({"domain": "prose", "text": text}))
    data = json.loads(optiq("compare", "model", "out", "--text", str(rows), "--json"))
    assert data["text"] == str(rows)
    assert data["models"]["out"]["sequences"] == 1
    assert data["models"]["out"]["kl"]["se"] is None
    assert "KL mean" in optiq("compare", "model", "out", "--text", str(rows))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["model"], "one model alone cannot be compared"),
        (["out", "out", "--reference", "model"], "named twice"),
    ],
)
def test_compare_refuses(
    optiq: Optiq, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert main(["compare", *argv]) == 2
    assert message in capsys.readouterr().err


def test_generate(optiq: Optiq, monkeypatch: pytest.MonkeyPatch) -> None:
    text = optiq("generate", "out", "-p", "Hello", "-m", "5")
    data = json.loads(optiq("generate", "out", "-p", "Hello", "-m", "5", "--json"))
    assert data["text"] + "\n" == text
    assert 1 <= data["generated_tokens"] <= 5
    assert data["finish_reason"] in ("length", "stop")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello"))
    assert optiq("generate", "out", "-p", "-", "-m", "5") == text
    assert optiq("generate", "out", "-p", "Hello", "-m", "5", "--raw") != ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-p", " "], "the prompt is empty"),
        (["-p", "x", "--temp=-1"], "a temperature of -1.0"),
        (["-p", "x", "--temp", "nan"], "a temperature of nan"),
        (["-p", "x", "--raw", "--system", "s"], "--system needs a chat template"),
    ],
)
def test_generate_refuses(
    optiq: Optiq, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert main(["generate", "model", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_doctor(optiq: Optiq) -> None:
    text = optiq("doctor")
    names = [finding["name"] for finding in json.loads(optiq("doctor", "--json"))]
    assert {"optiq", "python", "mlx", "mlx-lm", "native kernels", "memory"} <= set(names)
    assert all(name in text for name in names)


def test_doctor_prints_advice_under_its_finding(
    optiq: Optiq, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = SimpleNamespace(name="compiler", value="none", advice="apt-get install g++")
    monkeypatch.setattr("optiq.doctor.checks.examine", lambda: [finding])
    assert optiq("doctor") == "compiler  none\n          -> apt-get install g++\n"


def test_demo(optiq: Optiq, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo_module, "fetch", lambda folder, say: "model")
    monkeypatch.setattr(demo_module, "TOKENS", 320)
    monkeypatch.setattr(demo_module, "HELD_OUT_TOKENS", 320)
    text = optiq("demo", "--dir", str(tmp_path))
    for word in ("320 tokens only", "What is the capital of France?", "report.html", "took"):
        assert word in text
    data: dict[str, Any] = json.loads(optiq("demo", "--dir", str(tmp_path), "--json"))
    assert set(data["answers"]) == {"optiq", "uniform4"}
    assert Plan.from_json(data["plan"]).measured is not None


@pytest.mark.parametrize("out", [".", "model"])
def test_sensitivity_needs_a_file_to_write(
    optiq: Optiq, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    assert main(["sensitivity", "model", "-o", out]) == 2
    assert "is not a regular file; name a new file" in capsys.readouterr().err
    assert main(["sensitivity", "model", "-o", "model/config.json/x"]) == 1
    assert "cannot be written: Not a directory" in capsys.readouterr().err


def test_sensitivity_never_overwrites_what_is_not_scores(
    optiq: Optiq, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("precious")
    assert main(["sensitivity", "model", "-o", str(file), "--tokens", "320"]) == 2
    assert "exists and holds no scores" in capsys.readouterr().err
    assert file.read_text() == "precious"
    scores = tmp_path / "scores.json"
    optiq("sensitivity", "model", "-o", str(scores), "--tokens", "320", "--formats", "4")
    again = ["sensitivity", "model", "-o", str(scores), "--tokens", "320", "--formats", "4,8"]
    assert main(again) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    optiq(*again, "--overwrite")
    assert "8g64" in scores.read_text()


@pytest.mark.parametrize("columns", [40, 60, 200])
def test_a_command_is_broken_as_a_shell_allows(columns: int) -> None:
    command = (
        'optiq convert "a b/model" -o out --size 5bpw -p "why -o not?" --scores fr/scores.json'
    )
    lines = shell_lines(command, columns)
    assert all(len(line) <= columns for line in lines.split("\n"))
    assert (lines == command) == (columns == 200)
    assert shlex.split(lines.replace("\\\n", "")) == shlex.split(command)

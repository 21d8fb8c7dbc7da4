"""The documentation says what the code does: commands, names, paths and examples."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

import optiq
from optiq import cli
from optiq.calibration.rows import check_row
from optiq.cli.foreign import RENAMED, TRANSLATED
from optiq.cli.parser import SHARED
from optiq.formats import Format
from optiq.planning.pareto import Frontier
from optiq.planning.scores import Scores
from optiq.quality.results import Measured
from tests.scored import build
from tests.tiny import tiny_folder

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "optiq"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OURS = [ROOT / "CONTRIBUTING.md", *PAGES]
SOURCES = {".py", ".h", ".cpp", ".metal", ".md", ".toml"}


def blocks(page: Path, *languages: str) -> list[str]:
    """Fenced code blocks of these languages."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S)
    return [body for language, body in fenced if language in languages]


def spans(page: Path) -> list[str]:
    """Inline code outside the fenced blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def commands(page: Path) -> list[str]:
    """Command lines of a page; one named in passing, as `optiq plan`, has nothing to parse."""
    lines = "\n".join(blocks(page, "", "sh", "bash")).split("\n")
    lines += [span for span in spans(page) if len(span.split()) != 2]
    lines = [line.removeprefix("$ ") for line in lines]
    return [line for line in lines if line.startswith("optiq ")]


COMMANDS = [(page.name, line) for page in PAGES for line in commands(page)]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_command_lines_parse(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for name in cli.COMMANDS:
        module = importlib.import_module(f"optiq.cli.{name}")
        monkeypatch.setattr(module, "run", lambda args: ran.append(args) or 0)
    _, *argv = shlex.split(line, comments=True)
    assert cli.main(argv) == 0
    assert len(ran) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_named_exist(page: Path) -> None:
    named = {span.split()[1] for span in spans(page) if span.startswith("optiq ")}
    assert named <= cli.COMMANDS.keys()


def test_commands_were_found() -> None:
    assert {shlex.split(line)[1] for _, line in COMMANDS} >= {"convert", "plan", "compare"}


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """Those of its actions included."""
    found = {option for action in parser._actions for option in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found = found.union(*map(options_of, action.choices.values()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_options_named_exist(page: Path) -> None:
    known = {"--version", *SHARED}
    known |= {name for names in (*RENAMED.values(), *TRANSLATED.values()) for name in names}
    for name in cli.COMMANDS:
        parser = argparse.ArgumentParser()
        importlib.import_module(f"optiq.cli.{name}").add_arguments(parser)
        known |= options_of(parser)
    named = {word for span in spans(page) for word in re.findall(r"(?<!\S)--[\w-]+", span)}
    assert named <= known


@pytest.mark.parametrize("page", OURS, ids=lambda p: p.name)
def test_python_blocks_compile_and_use_what_exists(page: Path) -> None:
    for body in blocks(page, "python", "py"):
        compile(body, str(page), "exec")
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == "optiq":
                        importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optiq"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"
            elif isinstance(node, ast.Call) and (target := attribute(node.func)) is not None:
                keywords = {k.arg: None for k in node.keywords if k.arg}
                inspect.signature(target).bind(*node.args, **keywords)


def attribute(node: ast.expr) -> Any:
    """What `optiq.name` stands for; None for other expressions."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return getattr(optiq, node.attr) if node.value.id == "optiq" else None
    return None


@pytest.mark.parametrize("page", OURS, ids=lambda p: p.name)
def test_links_and_paths_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in (link for link in links if not re.match(r"[a-z]+:|#", link)):
        assert (page.parent / link.partition("#")[0]).exists(), link
    files = {
        f.name for part in ("python", "csrc", "docs", "tests") for f in (ROOT / part).rglob("*")
    }
    for span in spans(page):
        if not re.fullmatch(r"[\w.][\w./-]*", span):
            continue
        if "/" in span and (span.endswith("/") or Path(span).suffix in SOURCES):
            places = [folder / span for folder in (ROOT, PACKAGE, page.parent)]
            assert any(place.exists() for place in places), span
        elif Path(span).suffix in SOURCES:
            assert span in files or (ROOT / span).exists(), span


def test_the_examples_of_the_python_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In order, on a tiny model in the place of the one named; little text is measured on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen").mkdir()
    tiny_folder(tmp_path / "Qwen", "qwen3_moe", name="Qwen3-0.6B")
    monkeypatch.setattr("optiq.quantize.prepare.CALIBRATION_TOKENS", 320)
    monkeypatch.setattr("optiq.quantize.score.SCORING_TOKENS", 320)
    monkeypatch.setattr("optiq.evals.tasks.kl.HELD_OUT_TOKENS", 320)
    names: dict[str, Any] = {}
    page = ROOT / "docs" / "python.md"
    for body in blocks(page, "python"):
        exec(compile(body, str(page), "exec"), names)
    assert names["result"].stdout == "42\n"
    assert names["card"].path.name == "README.md"
    assert capsys.readouterr().out.count("\n") > 20


def test_the_python_page_has_every_export() -> None:
    text = (ROOT / "docs" / "python.md").read_text()
    missing = [name for name in optiq.__all__ if f"optiq.{name}" not in text]
    assert missing == ["Plan", "Result", "Scores"]  # what the others return
    assert set(optiq.__all__) <= set(dir(optiq))


def example(kind: str) -> dict[str, Any]:
    """The JSON example of docs/files.md with this kind, or this key."""
    found = [json.loads(body) for body in blocks(ROOT / "docs" / "files.md", "json")]
    (one,) = [data for data in found if data.get("kind") == kind or kind in data]
    return dict(one)


def test_sensitivity_example_is_read() -> None:
    data = example("optiq.sensitivity")
    found = Scores.from_json(data, "the example")
    assert found.to_json() == data
    assert build(found, "8bpw").modules[0].module == found.modules[0].module


def test_plan_example_has_every_key() -> None:
    data = example("optiq.plan")
    made = build(example("optiq.sensitivity"), "8bpw").to_json()
    assert data.keys() == made.keys()
    for key in ("model", "budget", "objective", "uniform4"):
        assert data[key].keys() == made[key].keys()
    (row,) = data["modules"]
    assert row.keys() == made["modules"][0].keys()
    fmt, itemsize = Format.parse(row["format"]), data["model"]["itemsize"]
    assert row["nbytes"] == fmt.nbytes(row["shape"], itemsize)
    assert Measured.from_json(data["measured"]).to_json() == data["measured"]


def test_frontier_example_is_read() -> None:
    data = example("optiq.frontier")
    found = Frontier.from_json(data)
    assert found.to_json() == data
    (point,) = found.points
    assert point.uniform is not None
    assert point.uniform.ratio == pytest.approx(point.kl / point.uniform.kl, rel=1e-3)
    assert data["model"].keys() == example("optiq.plan")["model"].keys()


def test_config_example_is_the_plans() -> None:
    data, row = example("quantization")["quantization"], example("optiq.plan")["modules"][0]
    assert data.pop(row["path"]) == Format.parse(row["format"]).config()
    assert data == Format.parse("4g64").config()


def test_rows_in_the_docs_are_valid() -> None:
    rows = [line for page in PAGES for b in blocks(page, "jsonl") for line in b.splitlines()]
    assert len(rows) == 2
    for row in rows:
        check_row(json.loads(row))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is in Python 3.11")
def test_the_build_group_has_what_the_build_asks_for() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    group = set(project["dependency-groups"]["build"])
    assert set(project["build-system"]["requires"]) <= group

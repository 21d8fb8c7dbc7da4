"""The same verdicts as bfcl-eval on thousands of answers to the 400 simple cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optiq.evals.bfcl import Call, check, parse
from optiq.evals.data import load
from tests.peers.bfcl_variants import variants
from tests.peers.packages import ask, install

ORACLE = Path(__file__).with_name("oracle_bfcl.py")
FILE = "BFCL_v4_simple_python.json"  # the cases of v3, with other ids

Case = tuple[dict[str, Any], dict[str, Any], list[Call]]


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bfcl-eval")
    install(folder, "bfcl-eval==2026.3.23")
    return folder


@pytest.fixture(scope="module")
def cases(peer: Path) -> list[Case]:
    data = peer / "bfcl_eval" / "data"
    questions = [json.loads(line) for line in (data / FILE).open()]
    answers = [json.loads(line) for line in (data / "possible_answer" / FILE).open()]
    assert len(questions) == 400
    return [
        (question["function"][0], answer["ground_truth"][0], calls)
        for question, answer in zip(questions, answers, strict=True)
        for calls in variants(question["function"][0], answer["ground_truth"][0])
    ]


def test_the_package_has_the_questions_that_are_asked(peer: Path) -> None:
    """Another layout and other ids than version 3's, and the same checksum."""
    folder = peer / "bfcl_eval" / "data"
    lines = [json.loads(line) for line in (folder / FILE).open(encoding="utf-8")]
    asked = {line["id"].replace("simple_python_", "simple_"): line for line in lines}
    found = load("bfcl", folder)
    assert {id: row["question"] for id, row in found.rows.items()} == {
        id: question["question"] for id, question in asked.items()
    }
    assert set(found.ids) < asked.keys()


def _plain(calls: list[Call]) -> list[dict[str, Any]]:
    return [{call.name: call.arguments} for call in calls]


def test_the_checker_agrees(peer: Path, cases: list[Case]) -> None:
    theirs = ask(ORACLE, peer, [[f, p, repr(_plain(calls))] for f, p, calls in cases])
    ours = [check(f, p, calls) for f, p, calls in cases]
    differences = [
        (calls, reason, verdict)
        for (_, _, calls), reason, verdict in zip(cases, ours, theirs, strict=True)
        if (reason is None) != (verdict is not None and verdict[0])
    ]
    assert not differences, differences[:3]
    assert len(cases) > 2000
    assert 1000 < sum(reason is None for reason in ours) < len(cases) - 1000
    # Where bfcl-eval raises, its run stops; here the answer is wrong. Only in one way: a number
    # too large for a float.
    raised = [r for r, verdict in zip(ours, theirs, strict=True) if verdict is None]
    assert raised
    assert all(reason and reason.endswith("too large for a float") for reason in raised)


def test_the_parser_agrees_on_python_syntax(peer: Path, cases: list[Case]) -> None:
    """The notation that BFCL's own system prompt asks for."""
    texts = [
        f"[{', '.join(f'{c.name}({_keywords(c)})' for c in calls)}]"
        for _, _, calls in cases
        if calls
    ]
    texts += ["f(a=1), g(b=x.y)", "f(a=-2, b=(1, 2), c=2*3.5)", "f(a=g(1), b=h(c=2), d=x[0])"]
    texts += ["`f(a=true)`", "f(", "no call", "f(a=...)", "f(a={'b': [None, True]})", "m.n.f()"]
    for text, theirs in zip(texts, ask(ORACLE, peer, texts), strict=True):
        calls = parse(text)
        ours = _plain(calls) if isinstance(calls, list) else None
        assert json.loads(json.dumps(ours)) == theirs, text


def _keywords(call: Call) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())

"""Options of an evaluation as users give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optiq.errors import UsageError
from optiq.evals.options import TASKS, EvalOptions


def test_what_is_not_given_is_all_there_is() -> None:
    options = EvalOptions.parse()
    assert options == EvalOptions.parse(tasks="capability") == EvalOptions()
    assert options.tasks == ("mmlu", "gsm8k", "ifeval", "bfcl", "humaneval", "kl", "size")


def test_tasks_that_are_named_are_required() -> None:
    one = EvalOptions.parse(tasks="kl", data="folder")
    assert one == EvalOptions(tasks=("kl",), required=True, data=Path("folder"))
    assert EvalOptions.parse(tasks=["kl", "bfcl"]).tasks == ("kl", "bfcl")
    assert EvalOptions.parse(tasks=list(TASKS)).required


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": ("mmlu", "arc")}, "no task is called 'arc'; use one of capability, mmlu"),
        ({"limit": 0}, "asks nothing; give at least 1"),
        ({"limit": 3, "full": True}, "give one of them"),
    ],
)
def test_refuses(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EvalOptions.parse(**given)


def test_several_tasks() -> None:
    assert EvalOptions.parse(tasks=["kl", "size", "kl"]).tasks == ("kl", "size")
    assert EvalOptions.parse(tasks=["kl", "capability"]) == EvalOptions.parse()


def test_an_unknown_option_is_an_error() -> None:
    with pytest.raises(TypeError, match="suite"):
        EvalOptions.parse(suite="kl")  # type: ignore[call-arg]

"""Strict and loose verdicts on an answer, as Google's evaluation and lm-eval give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import EvalError
from .extras import require
from .kinds import KINDS


@dataclass(frozen=True)
class Verdict:
    """One truth value per instruction, in the order of the prompt's list.

    Prompt level is `all(strict)`, `all(loose)`; instruction level counts every value.
    """

    strict: list[bool]
    loose: list[bool]


def validate(instruction_id_list: Sequence[str], kwargs: Sequence[Mapping[str, Any]]) -> None:
    """Check one prompt's instructions before any answer is asked for.

    Arguments that are None count as not given: the hub's copy fills every kind's columns with them.

    Raises:
        EvalError: a kind is unknown; an argument is missing, unknown or not of its type; a package
            that the kind needs is not installed. (The official code draws a random argument for
            one that is missing or wrong, and so would give a verdict on something never asked.)
    """
    if len(instruction_id_list) != len(kwargs):
        raise EvalError(
            f"IFEval: {len(instruction_id_list)} instructions but {len(kwargs)} sets of arguments"
        )
    for name, given in zip(instruction_id_list, kwargs, strict=True):
        if name not in KINDS:
            raise EvalError(f"IFEval: {name!r} is not one of the {len(KINDS)} kinds of instruction")
        kind, arguments = KINDS[name], _given(given)
        if unknown := sorted(arguments.keys() - kind.parameters.keys()):
            raise EvalError(f"IFEval: {name} takes no argument {unknown[0]!r}")
        for argument, parameter in kind.parameters.items():
            if argument not in arguments:
                raise EvalError(f"IFEval: {name} needs the argument {argument!r}")
            if not parameter.accepts(arguments[argument]):
                raise EvalError(
                    f"IFEval: {name} needs as {argument!r} {parameter.description}, "
                    f"not {arguments[argument]!r}"
                )
        for package in kind.needs:
            require(package)


def check(
    prompt: str,
    response: str,
    instruction_id_list: Sequence[str],
    kwargs: Sequence[Mapping[str, Any]],
) -> Verdict:
    """Which of the prompt's instructions `response` follows.

    Strict judges the response as it is. Loose accepts any of eight readings: with and without
    asterisks, times all lines, without the first, without the last, without both. Empty readings
    follow nothing. `prompt` is not looked at: the one kind that repeats it has the text to repeat
    among its arguments.

    Raises:
        EvalError: as `validate`.
    """
    validate(instruction_id_list, kwargs)
    strict, loose = [], []
    readings = _readings(response)
    for name, given in zip(instruction_id_list, kwargs, strict=True):
        follows, arguments = KINDS[name].follows, _given(given)
        verdicts = (bool(r.strip()) and follows(r, **arguments) for r in readings)
        strict.append(next(verdicts))  # the first reading is the response itself
        loose.append(strict[-1] or any(verdicts))
    return Verdict(strict, loose)


def _given(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if value is not None}


def _readings(response: str) -> list[str]:
    lines = response.split("\n")
    cuts = [lines[1:], lines[:-1], lines[1:-1]]
    readings = [response, *("\n".join(cut).strip() for cut in cuts)]
    readings += [reading.replace("*", "") for reading in readings]
    return list(dict.fromkeys(readings))  # most answers have fewer than eight that differ

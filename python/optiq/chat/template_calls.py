"""Tool calls in the notation of a model's own chat template, read by mlx-lm's parser for it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from .calls import Call, ParseError
from .parser import json_calls, parse


def read_calls(
    answer: str, tokenizer: Any, tools: Sequence[Mapping[str, Any]]
) -> list[Call] | ParseError:
    """The calls in `answer`: in the template's own notation, else in any of the common ones."""
    return template_calls(answer, tokenizer, tools) or parse(answer)


def template_calls(
    answer: str, tokenizer: Any, tools: Sequence[Mapping[str, Any]]
) -> list[Call] | None:
    """The calls in `answer`, in order; None where mlx-lm knows no notation for the model, or finds
    no call in it.

    `tools` (OpenAI's shape) give untyped notations such as Qwen3-Coder's XML the types of values.
    As in `parse`, a broken call beside a whole one is passed over.
    """
    start, end, read = tokenizer.tool_call_start, tokenizer.tool_call_end, tokenizer.tool_parser
    if not start or start not in answer:
        return None
    calls: list[Call] = []
    for part in answer.split(start)[1:]:
        # Each parser has its own way to fail on what a model writes; those that use Python's warn.
        with suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            calls += json_calls(read(part.partition(end)[0] if end else part, tools))
    return calls or None

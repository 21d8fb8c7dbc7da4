"""What an answer must look like, as a request says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["text", "json_object", "json_schema", "regex", "choice", "lark"]


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. `parameters` is a JSON schema; of a `strict` tool it is
    always held to."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False


@dataclass(frozen=True)
class AnswerForm:
    """The form of one answer.

    `value` is the JSON schema, the regular expression, the texts to choose from or the Lark grammar
    that `kind` names. `tool_choice` is "auto", "none", "required" or the name of a tool; without
    `parallel` at most one is called. `reasoning`: the prompt has opened the reasoning
    (`Prompt.reasoning`); after `reasoning_budget` tokens of it, its end is forced.
    """

    kind: Kind = "text"
    value: Any = None
    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    parallel: bool = True
    reasoning: bool = False
    reasoning_budget: int | None = None

"""What a client asks for, in no protocol's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .engine.request import Sampling

FormKind = Literal["text", "json_object", "json_schema", "regex", "choice", "lark"]


@dataclass(frozen=True)
class Form:
    """What the text of an answer must look like."""

    kind: FormKind = "text"
    value: Any = None


@dataclass(frozen=True)
class Thinking:
    """How much the model is to reason before it answers; None leaves it to the model.

    `on` switches reasoning on or off, `effort` is a level that chat templates know by name, and
    `budget` the most tokens of reasoning.
    """

    on: bool | None = None
    effort: str | None = None
    budget: int | None = None


@dataclass(frozen=True)
class Interpreter:
    """The Python that the server runs for the model: in which container, with which new files,
    and how many programs at most. Without a `container` the last of those `seen` goes on that is
    still there, or else a new one begins."""

    container: str | None = None
    seen: tuple[str, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    most_calls: int = 16


@dataclass(frozen=True)
class Chat:
    """A conversation, the tools on offer, and the form of the answer.

    `messages` and `tools` have OpenAI's shape, with the arguments of calls as objects.
    `tool_choice` is "auto", "none", "required" or the name of a tool. `arguments` are for the chat
    template. With an `interpreter` the model may run Python, beside the `tools`. If it `continues`,
    the last message is the beginning of the answer.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: str = "auto"
    parallel: bool = True
    form: Form = Form()
    thinking: Thinking = Thinking()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    interpreter: Interpreter | None = None
    continues: bool = False


@dataclass(frozen=True)
class Wishes:
    """How each answer is made, and how many there are to each prompt.

    Without `max_tokens` an answer may fill the context. Clients of different names take turns.
    """

    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    n: int = 1
    client: str = ""
    adapter: str | None = None

"""The tools of a request: what the model sees of them, and what the client calls them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...asked import Interpreter
from ...tools.python import NAME, TOOL
from ..fields import Fields
from ..interpreter import MAX_CALLS, interpreter, with_python
from ..openai.conversation import MAX_TOOLS, function_tool

MODES = ("auto", "none", "required")
# Of a custom tool, whose input is a text: models call functions with arguments.
INPUT = "input"


@dataclass(frozen=True)
class Called:
    """What the client calls a tool."""

    kind: Literal["function", "custom"]
    name: str
    namespace: str | None = None


@dataclass(frozen=True)
class Offer:
    """`tools` are in the shape that templates take, `called` by the names that stand there.

    `shown` are those that the response lists, `skipped` the types of those that this server does
    not have. `choice` is as in `Chat.tool_choice`.
    """

    tools: tuple[Mapping[str, Any], ...]
    called: Mapping[str, Called]
    shown: tuple[Mapping[str, Any], ...]
    skipped: tuple[str, ...]
    choice: str
    interpreter: Interpreter | None = None


def flat(name: str, namespace: str | None) -> str:
    """The name by which the model knows a tool of a namespace."""
    return f"{namespace}__{name}" if namespace else name


@dataclass
class _Reading:
    tools: list[dict[str, Any]] = field(default_factory=list)
    called: dict[str, Called] = field(default_factory=dict)

    def add(self, tool: Fields, namespace: str | None = None) -> dict[str, Any]:
        """Reads a function or a custom tool; returns what the response shows of it."""
        custom = tool.text("type") == "custom"
        name = tool.text("name")
        if custom:
            written = function_tool(tool, "-", strict=False, name=flat(name or "", namespace))
            written["function"]["parameters"] = _text_input(tool)
        else:
            written = function_tool(
                tool, "parameters", strict=tool.flag("strict"), name=flat(name or "", namespace)
            )
        known = written["function"]["name"]
        if not name or known in self.called:
            raise tool.wrong("name", "is missing, or that of another tool")
        self.tools.append(written)
        self.called[known] = Called("custom" if custom else "function", name, namespace)
        shown: dict[str, Any] = {
            "type": "custom" if custom else "function",
            "name": name,
            "description": tool.text("description"),
        }
        if not custom:
            shown["parameters"] = written["function"]["parameters"]
            shown["strict"] = tool.flag("strict")
        elif "format" in tool:
            shown["format"] = tool.values["format"]
        return shown


def _text_input(tool: Fields) -> dict[str, Any]:
    """A schema for a text. A grammar for it cannot be enforced within JSON, so it is explained."""
    form = tool.object("format")
    described = {"type": "string"}
    if form is not None and form.text("type") == "grammar":
        described["description"] = (
            f"A text of this {form.text('syntax')} grammar:\n{form.text('definition')}"
        )
    return {
        "type": "object",
        "properties": {INPUT: described},
        "required": [INPUT],
        "additionalProperties": False,
    }


def offer(body: Fields, python: bool, seen: Sequence[str]) -> Offer:
    """Types of tools that this server does not have are left out: clients offer them unasked.

    `python`: it has Python. `seen` are containers that the conversation has used.
    """
    reading, shown, skipped = _Reading(), [], []
    runs: Interpreter | None = None
    for tool in body.objects("tools", MAX_TOOLS):
        tool.required("type")
        sort = tool.text("type") or ""
        if sort in ("function", "custom"):
            shown.append(reading.add(tool))
        elif sort == "namespace":
            name = tool.text("name")
            if not name:
                raise tool.wrong("name", "is required")
            inner = [reading.add(each, name) for each in _inner(tool)]
            described = tool.text("description") or ""
            shown.append({"type": sort, "name": name, "description": described, "tools": inner})
        elif sort == "code_interpreter" and python:
            runs = _interpreter(tool, seen, body.integer("max_tool_calls", 1, MAX_CALLS))
            with_python(reading.tools, tool)
            shown.append({"type": sort, "container": runs.container or {"type": "auto"}})
        else:
            skipped.append(sort[:50])
    tools, choice = _choose(body, reading)
    return Offer(tuple(tools), reading.called, tuple(shown), tuple(skipped), choice, runs)


def _interpreter(tool: Fields, seen: Sequence[str], most_calls: int | None) -> Interpreter:
    container = tool.values.get("container")
    if container is not None and not isinstance(container, str):
        given = tool.object("container")
        assert given is not None
        given.one_of("type", ("auto",), "auto")
        container = None
    return interpreter(tool, container, seen, most_calls)


def _inner(namespace: Fields) -> Iterator[Fields]:
    for tool in namespace.objects("tools", MAX_TOOLS):
        if tool.text("type") not in ("function", "custom"):
            raise tool.wrong("type", "must be 'function' or 'custom'")
        yield tool


def _choose(body: Fields, reading: _Reading) -> tuple[list[dict[str, Any]], str]:
    """The tools that may be called, and how."""
    value = body.values.get("tool_choice")
    if not isinstance(value, dict):
        choice = body.one_of("tool_choice", MODES, "auto")
        if choice == "required" and not reading.tools:
            raise body.wrong("tool_choice", "is 'required', and there are no tools to call")
        return reading.tools, choice
    chosen = body.object("tool_choice")
    assert chosen is not None
    if chosen.text("type") == "allowed_tools":
        allowed = {_named(tool, reading) for tool in chosen.objects("tools", MAX_TOOLS)}
        tools = [t for t in reading.tools if t["function"]["name"] in allowed]
        choice = chosen.one_of("mode", ("auto", "required"), "auto")
        if not tools:
            raise chosen.wrong("tools", "names none of 'tools'")
        return tools, choice
    return reading.tools, _named(chosen, reading)


def _named(chosen: Fields, reading: _Reading) -> str:
    if chosen.text("type") == "code_interpreter" and TOOL in reading.tools:
        return NAME
    name = flat(chosen.text("name") or "", chosen.text("namespace"))
    if chosen.text("type") not in ("function", "custom") or name not in reading.called:
        raise chosen.wrong("name", "names a tool that is not among 'tools', or not offered here")
    return name

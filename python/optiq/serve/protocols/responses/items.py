"""Input items, read into the messages that templates take."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...tools.rounds import turns
from ..fields import Fields
from ..openai.conversation import MAX_MESSAGES
from ..signature import verified
from ..store import ResponseStore
from .tools import INPUT, flat

ROLES = ("system", "developer", "user", "assistant")


def given_items(body: Fields, store: ResponseStore) -> list[Mapping[str, Any]]:
    """The items of `input`, those of earlier responses in the place of references."""
    value = body.values.get("input")
    if value is None or isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value or ""}]
    items: list[Mapping[str, Any]] = []
    for item in body.objects("input", MAX_MESSAGES):
        if item.text("type") == "item_reference":
            found = store.item(item.text("id") or "")
            if found is None:
                raise item.wrong("id", "is not that of a stored item; send the item itself")
            items.append(found)
        else:
            items.append(item.values)
    return items


class Messages:
    """Reads items one by one. What an assistant thought, said and called until somebody else has
    the word is one message."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._called: dict[str, str] = {}  # names of functions by the id of the call
        self._turn: dict[str, Any] | None = None
        self.messages: list[dict[str, Any]] = []
        self.skipped: list[str] = []  # types of items that mean nothing here
        self.containers: list[str] = []  # in which programs ran

    def read(self, items: Sequence[Mapping[str, Any]], offset: int = 0) -> None:
        """`offset` items are stored ones, in front of those of `input`."""
        for i, item in enumerate(items):
            path = f"input[{i - offset}]" if i >= offset else "previous_response_id"
            self._add(Fields(item, path))

    def _add(self, item: Fields) -> None:
        sort = item.text("type") or "message"
        if sort == "message":
            self._message(item)
        elif sort == "reasoning":
            self._reasoning(item)
        elif sort in ("function_call", "custom_tool_call"):
            self._call(item, custom=sort == "custom_tool_call")
        elif sort in ("function_call_output", "custom_tool_call_output"):
            self._output(item)
        elif sort == "code_interpreter_call":
            self._program(item)
        else:
            self.skipped.append(sort[:50])

    def _message(self, item: Fields) -> None:
        item.required("role")
        role = item.one_of("role", ROLES, "user")
        if role == "assistant":
            turn = self._assistant()
            turn["content"] = "\n".join(filter(None, [turn["content"], _text(item, "content")]))
        else:
            self._say({"role": role, "content": _text(item, "content")})

    def _reasoning(self, item: Fields) -> None:
        """Ours, which is signed, or else what the item shows of it."""
        thought = verified(self._secret, "", item.text("encrypted_content") or "")
        if not thought and "content" in item:
            thought = "\n".join(
                part.text("text") or "" for part in item.objects("content", MAX_MESSAGES)
            )
        if thought:
            turn = self._assistant()
            earlier = turn.get("reasoning_content")
            turn["reasoning_content"] = f"{earlier}\n{thought}" if earlier else thought

    def _call(self, item: Fields, *, custom: bool) -> None:
        identity, name = item.text("call_id"), item.text("name")
        if not identity or not name:
            raise item.wrong("name" if identity else "call_id", "is required")
        known = flat(name, item.text("namespace"))
        if custom:
            arguments: Any = {INPUT: item.text("input") or ""}
        else:
            arguments = _arguments(item)
        self._called[identity] = known
        self._assistant().setdefault("tool_calls", []).append(
            {
                "id": identity,
                "type": "function",
                "function": {"name": known, "arguments": arguments},
            }
        )

    def _output(self, item: Fields) -> None:
        identity = item.text("call_id")
        if not identity:
            raise item.wrong("call_id", "is required")
        if identity not in self._called:
            raise item.wrong("call_id", "answers no call of an earlier item")
        name = self._called[identity]
        self._say(
            {
                "role": "tool",
                "tool_call_id": identity,
                "name": name,
                "content": _text(item, "output"),
            }
        )

    def _program(self, item: Fields) -> None:
        """A program that this server has run, and what came of it: one round of an answer."""
        outputs = item.objects("outputs", MAX_MESSAGES)
        told = "\n".join(o.text("logs") or "" for o in outputs if o.text("type") == "logs")
        turn = self._assistant()
        text, reasoning = turn["content"], turn.get("reasoning_content")
        if "tool_calls" in turn:  # calls for the client, of an earlier answer
            text, reasoning = "", None
        else:
            self.messages.pop()
        run = (item.text("id") or "", item.text("code") or "", told)
        self.messages += turns(text, reasoning, [run])
        self._turn = None
        if container := item.text("container_id"):
            self.containers.append(container)

    def _assistant(self) -> dict[str, Any]:
        if self._turn is None:
            self._turn = {"role": "assistant", "content": ""}
            self.messages.append(self._turn)
        return self._turn

    def _say(self, message: dict[str, Any]) -> None:
        self._turn = None
        self.messages.append(message)


def read_answer(secret: bytes, items: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """An answer of ours, as it is read when it comes back."""
    read = Messages(secret)
    read.read(items)
    return read.messages[-1]


def _arguments(item: Fields) -> dict[str, Any]:
    try:
        arguments = json.loads(item.text("arguments") or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise item.wrong("arguments", "must be the JSON text of an object")
    return arguments


def _text(item: Fields, name: str) -> str:
    """A string, or parts of which all are text."""
    value = item.values.get(name)
    if value is None or isinstance(value, str):
        return value or ""
    return "\n".join(_parts(item, name))


def _parts(item: Fields, name: str) -> Iterator[str]:
    for part in item.objects(name, MAX_MESSAGES):
        sort = part.text("type") or ""
        if sort in ("input_text", "output_text", "text", "summary_text"):
            yield part.text("text") or ""
        elif sort == "refusal":
            yield part.text("refusal") or ""
        else:
            raise part.wrong("type", f"is {sort[:50]!r}; this server's model reads text only")

"""The forms in which a chat template may take a conversation, from the most native to the plainest.

Messages and tools have OpenAI's shape. Each form gives them in another one; what a template does
not know becomes text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]]
Chat = tuple[Messages, Tools]


def _native(messages: Messages, tools: Tools) -> Chat:
    return messages, tools


def _json_arguments(messages: Messages, tools: Tools) -> Chat:
    """Call arguments as JSON text (DeepSeek concatenates them; dicts are what Qwen wants)."""
    return _map_calls(messages, lambda call: {"arguments": _json(call["arguments"])}), tools


def _nine_character_ids(messages: Messages, tools: Tools) -> Chat:
    """Call ids as nine alphanumeric characters, the only ones that Mistral templates accept."""
    ids: dict[str, str] = {}
    renamed = []
    for message in messages:
        message = dict(message)
        if "tool_calls" in message:
            message["tool_calls"] = [
                {**call, "id": ids.setdefault(call.get("id", ""), f"call{len(ids):05}")}
                for call in message["tool_calls"]
            ]
        if "tool_call_id" in message:
            message["tool_call_id"] = ids[message["tool_call_id"]]
        renamed.append(message)
    return renamed, tools


def _function_ids(messages: Messages, tools: Tools) -> Chat:
    """Call ids as functions.NAME:NUMBER: Kimi templates write them in the place of names."""
    ids: dict[str, str] = {}
    renamed = []
    for message in messages:
        message = dict(message)
        if "tool_calls" in message:
            calls = []
            for call in message["tool_calls"]:
                written = f"functions.{call['function']['name']}:{len(ids)}"
                ids[call.get("id", written)] = written
                calls.append({**call, "id": written})
            message["tool_calls"] = calls
        if "tool_call_id" in message:
            message["tool_call_id"] = ids.get(message["tool_call_id"], message["tool_call_id"])
        renamed.append(message)
    return renamed, tools


def tools_as_text(messages: Messages, tools: Tools) -> Chat:
    """Tools as JSON in the system message, calls in the assistant's text, results as user turns."""
    written = []
    for message in messages:
        role, parts = message["role"], [message["content"]]
        if role == "tool":
            role, parts = "user", [f"<tool_response>\n{message['content']}\n</tool_response>"]
        for call in message.get("tool_calls", []):
            body = {key: call["function"][key] for key in ("name", "arguments")}
            parts.append(f"<tool_call>\n{_json(body)}\n</tool_call>")
        written.append({"role": role, "content": "\n".join(part for part in parts if part)})
    if tools:
        listing = "\n".join(_json(tool) for tool in tools)
        note = f"Tools:\n<tools>\n{listing}\n</tools>\nTo use one, answer " + (
            '<tool_call>{"name": ..., "arguments": ...}</tool_call>.'
        )
        if written[0]["role"] == "system":
            note = f"{written.pop(0)['content']}\n\n{note}"
        written.insert(0, {"role": "system", "content": note})
    return list(_joined(written)), []


def _merged_system(messages: Messages, tools: Tools) -> Chat:
    """As `tools_as_text`, with every system message at the head of a user turn (Gemma)."""
    written, _ = tools_as_text(messages, tools)
    for message in written:
        if message["role"] == "system":
            message["role"] = "user"
    return list(_joined(written)), []


Form = Callable[[Messages, Tools], Chat]
_TEXT: dict[str, Form] = {"tools as text": tools_as_text, "merged system": _merged_system}
# The forms a chat is offered in, in this order.
FORMS: dict[str, Form] = {
    "native": _native,
    "json arguments": _json_arguments,
    "nine-character ids": _nine_character_ids,
    **_TEXT,
}
# For Kimi templates in prompts.
KIMI_FORMS: dict[str, Form] = {"function ids": _function_ids, **_TEXT}


def _joined(messages: Messages) -> Iterator[dict[str, Any]]:
    """Neighbouring turns of one role as one turn: templates that alternate refuse two."""
    last: dict[str, Any] | None = None
    for message in messages:
        if last is not None and last["role"] == message["role"]:
            last["content"] += "\n\n" + message["content"]
            continue
        if last is not None:
            yield last
        last = dict(message)
    if last is not None:
        yield last


def _map_calls(messages: Messages, change: Callable[[Any], dict[str, Any]]) -> Messages:
    return [
        {
            **message,
            "tool_calls": [
                {**call, "function": {**call["function"], **change(call["function"])}}
                for call in message["tool_calls"]
            ],
        }
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)

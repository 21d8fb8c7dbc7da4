"""What can be asked about a response that is stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ....errors import RequestError
from ..problems import Refusal
from ..store import Item, Stored

MOST_LISTED = 100
LISTED = 20

# What makes a part of a message the one that OpenAI's types have, by the role of the message.
_INPUT = {"type": "input_text"}
_OUTPUT = {"type": "output_text", "annotations": [], "logprobs": []}
_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "custom_tool_call": "ctc",
    "code_interpreter_call": "ci",
}


def retrieve(stored: Stored, query: Mapping[str, str]) -> dict[str, Any]:
    if query.get("stream") == "true":
        raise RequestError("a stored response is not streamed again; leave 'stream' out", "stream")
    return dict(stored.response)


def cancel(stored: Stored) -> dict[str, Any]:
    raise Refusal(
        400,
        "invalid_value",
        f"the response {stored.response['id']!r} does not run in the background, so it cannot be "
        "cancelled; close the connection to stop an answer",
    )


def list_input(stored: Stored, query: Mapping[str, str]) -> dict[str, Any]:
    """A page of the items that a response answers, those of earlier responses too."""
    items = list(_shown(stored))
    if _one_of(query, "order", ("desc", "asc")) == "desc":
        items.reverse()
    if (after := query.get("after")) is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise RequestError(f"'after' is {after[:100]!r}, not the id of an item", "after")
        items = items[ids.index(after) + 1 :]
    page = items[: _limit(query)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else "",
        "last_id": page[-1]["id"] if page else "",
        "has_more": len(page) < len(items),
    }


def _one_of(query: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str:
    value = query.get(name, allowed[0])
    if value not in allowed:
        raise RequestError(f"{name!r} must be one of {', '.join(allowed)}", name)
    return value


def _limit(query: Mapping[str, str]) -> int:
    text = query.get("limit", str(LISTED))
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:4]) <= MOST_LISTED):
        raise RequestError(f"'limit' must be from 1 to {MOST_LISTED}", "limit")
    return int(text)


def _shown(stored: Stored) -> Iterator[dict[str, Any]]:
    """Input items with what the client may leave out: ids, types, and texts as parts."""
    response = stored.response
    given = stored.items[: len(stored.items) - len(response["output"])]
    for number, item in enumerate(given):
        kind = item.get("type") or "message"
        prefix = _PREFIXES.get(kind, "item")
        identity, status = item.get("id"), item.get("status")
        if not isinstance(identity, str) or not identity:
            identity = f"{prefix}_{response['id'].removeprefix('resp_')}_{number}"
        if status not in ("in_progress", "incomplete"):
            status = "completed"
        shown = {**item, "id": identity, "type": kind, "status": status}
        if kind == "message":
            shown["content"] = _content(item)
        yield shown


def _content(item: Item) -> list[dict[str, Any]]:
    form = _OUTPUT if item["role"] == "assistant" else _INPUT
    content = item.get("content") or ""
    parts = [{"text": content}] if isinstance(content, str) else content
    return [
        part
        if part.get("type") == "refusal"
        else {**form, **part, "text": part.get("text") or "", "type": form["type"]}
        for part in parts
    ]

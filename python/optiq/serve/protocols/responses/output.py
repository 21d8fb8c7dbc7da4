"""Output items: the parts of an answer as events, and as the output of a response."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ....chat.parts import CallArguments, CallEnd, CallStart, Part, Reasoning, Text
from ...runs import Ran, Running
from ..interpreter import pictures, written_files
from .tools import INPUT, Called

Event = dict[str, Any]


class Output:
    """Collects the output of one response, and says what happens to it in events.

    Arguments of functions are streamed while they are written. What turns out not to be a call is
    never done, so no client carries it out; it comes again as text. `seal` makes the
    `encrypted_content` of reasoning, if it is asked for.
    """

    def __init__(self, called: Mapping[str, Called], seal: Callable[[str], str] | None) -> None:
        self._called, self._seal = called, seal
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._space = ""  # before a text that may not come
        self._arguments = ""

    @property
    def items(self) -> list[dict[str, Any]]:
        """Those that are done."""
        return [item for item in self._items if item["status"] != "in_progress"]

    def add(self, part: Part, logprobs: Sequence[Mapping[str, Any]] = ()) -> Iterator[Event]:
        """`logprobs` are those of a text's tokens."""
        if isinstance(part, Text):
            yield from self._text(part.text, logprobs)
        elif isinstance(part, Reasoning):
            yield from self._reasoning(part.text)
        elif isinstance(part, CallStart):
            yield from self._start_call(part.name)
        elif isinstance(part, CallArguments):
            assert self._open is not None
            self._arguments += part.text
            if self._open["type"] == "function_call":
                yield self._event("function_call_arguments.delta", delta=part.text)
        else:
            assert isinstance(part, CallEnd)
            yield from self._end_call()

    def close(self, status: str = "completed") -> Iterator[Event]:
        """Complete the open item, if there is one and it is not a broken call."""
        item, self._open = self._open, None
        if item is None or "content" not in item:
            return
        part = item["content"][0]
        if item["type"] == "reasoning":
            yield self._event("reasoning_text.done", content_index=0, text=part["text"])
            if self._seal is not None:
                item["encrypted_content"] = self._seal(part["text"])
        else:
            logprobs = part["logprobs"]
            text = part["text"]
            yield self._event("output_text.done", content_index=0, text=text, logprobs=logprobs)
        yield self._event("content_part.done", content_index=0, part=dict(part))
        yield self._done(item, status)

    def _text(self, text: str, logprobs: Sequence[Mapping[str, Any]]) -> Iterator[Event]:
        if self._open is None or self._open["type"] != "message":
            self._space += text
            if not self._space.strip():
                return
            text, self._space = self._space, ""
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield from self._start("msg", {"type": "message", "role": "assistant"}, part)
        assert self._open is not None
        part = self._open["content"][0]
        part["text"] += text
        part["logprobs"] = [*part["logprobs"], *logprobs]
        yield self._event("output_text.delta", content_index=0, delta=text, logprobs=list(logprobs))

    def _reasoning(self, text: str) -> Iterator[Event]:
        if self._open is None or self._open["type"] != "reasoning":
            part = {"type": "reasoning_text", "text": ""}
            yield from self._start("rs", {"type": "reasoning", "summary": []}, part)
        assert self._open is not None
        self._open["content"][0]["text"] += text
        yield self._event("reasoning_text.delta", content_index=0, delta=text)

    def _start(self, prefix: str, item: dict[str, Any], part: dict[str, Any]) -> Iterator[Event]:
        """An item with one part begins."""
        yield from self.close()
        self._space = ""
        self._open = {**_identified(prefix), **item, "content": []}
        yield self._added(self._open)
        self._open["content"].append(part)
        yield self._event("content_part.added", content_index=0, part=dict(part))

    def _start_call(self, name: str) -> Iterator[Event]:
        yield from self.close()
        called = self._called.get(name, Called("function", name))
        custom = called.kind == "custom"
        self._space = self._arguments = ""
        self._open = {
            **_identified("ctc" if custom else "fc"),
            "type": "custom_tool_call" if custom else "function_call",
            "call_id": f"call_{secrets.token_hex(12)}",
            "name": called.name,
            **({"namespace": called.namespace} if called.namespace is not None else {}),
            "input" if custom else "arguments": "",
        }
        yield self._added(self._open)

    def _end_call(self) -> Iterator[Event]:
        item, self._open = self._open, None
        assert item is not None
        if item["type"] == "function_call":
            item["arguments"] = self._arguments
            named = {"name": item["name"], "arguments": self._arguments}
            yield self._event("function_call_arguments.done", **named)
        else:  # a text within JSON, which can be read when it is complete
            item["input"] = text = str(json.loads(self._arguments).get(INPUT, ""))
            yield self._event("custom_tool_call_input.delta", delta=text)
            yield self._event("custom_tool_call_input.done", input=text)
        yield self._done(item, "completed")

    def program(self, event: Running | Ran) -> Iterator[Event]:
        """A program of the model's begins, or has ended."""
        kind = "code_interpreter_call"
        if isinstance(event, Running):
            yield from self.close()
            item: dict[str, Any] = {
                "id": event.id,
                "type": kind,
                "status": "in_progress",
                "code": "",
                "container_id": event.container,
                "outputs": None,
            }
            yield self._added(item)
            yield self._event(f"{kind}.in_progress")
            yield self._event(f"{kind}_code.delta", delta=event.code)
            item["code"] = event.code
            yield self._event(f"{kind}_code.done", code=event.code)
            yield self._event(f"{kind}.interpreting")
        else:
            item = self._items[-1]
            logs = {"type": "logs", "logs": event.text}
            item["outputs"] = [logs, *({"type": "image", "url": u} for u in pictures(event))]
            if event.files:
                item["files"] = written_files(event)
            yield self._event(f"{kind}.completed")
            yield self._done(item, "failed" if event.failed else "completed")

    def _added(self, item: dict[str, Any]) -> Event:
        self._items.append(item)
        return self._item_event("added", item)

    def _done(self, item: dict[str, Any], status: str) -> Event:
        item["status"] = status
        return self._item_event("done", item)

    def _item_event(self, what: str, item: dict[str, Any]) -> Event:
        return {
            "type": f"response.output_item.{what}",
            "output_index": len(self._items) - 1,
            "item": json.loads(json.dumps(item)),
        }

    def _event(self, kind: str, **fields: Any) -> Event:
        """An event about the newest item."""
        where = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
        return {"type": f"response.{kind}", **where, **fields}


def _identified(prefix: str) -> dict[str, Any]:
    return {"id": f"{prefix}_{secrets.token_hex(16)}", "status": "in_progress"}

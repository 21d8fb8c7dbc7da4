"""Content blocks: the parts of an answer as events, and as the content of a message."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from typing import Any

from ....chat.parts import CallArguments, CallEnd, CallStart, Part, Reasoning, Text
from ...runs import Ran, Running

Event = dict[str, Any]


class Blocks:
    """Collects the content of one message, and says what happens to it in events.

    A call is held back until it is complete, as Anthropic does unless a tool asks for
    `eager_input_streaming`: what turns out not to be a call comes as text. `sign` makes the
    signature of reasoning; with `hidden` the client sees the signature only.
    """

    def __init__(self, sign: Callable[[str], str], eager: frozenset[str], hidden: bool) -> None:
        self._sign, self._eager, self._hidden = sign, eager, hidden
        self._blocks: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._space = ""  # before a text that may not come
        self._thinking = ""  # of the open block
        self._call: CallStart | None = None
        self._arguments = ""

    @property
    def content(self) -> list[dict[str, Any]]:
        """The blocks so far. An eager call that was never complete has been repeated as text."""
        return [b for b in self._blocks if b["type"] != "tool_use" or b["input"] is not None]

    def add(self, part: Part) -> Iterator[Event]:
        if isinstance(part, Text):
            yield from self._text(part.text)
        elif isinstance(part, Reasoning):
            yield from self._reasoning(part.text)
        elif isinstance(part, CallStart):
            self._call, self._arguments = part, ""
            if part.name in self._eager:
                yield from self._start_call(part)
        elif isinstance(part, CallArguments):
            self._arguments += part.text
            if self._open is not None and self._open["type"] == "tool_use":
                yield self._delta({"type": "input_json_delta", "partial_json": part.text})
        else:
            assert isinstance(part, CallEnd)
            yield from self._end_call()

    def close(self) -> Iterator[Event]:
        """Complete the open block, if there is one."""
        if self._open is None:
            return
        if self._open["type"] == "thinking":
            self._open["thinking"] = "" if self._hidden else self._thinking
            self._open["signature"] = self._sign(self._thinking)
            yield self._delta({"type": "signature_delta", "signature": self._open["signature"]})
        yield {"type": "content_block_stop", "index": len(self._blocks) - 1}
        self._open = None

    def program(self, event: Running | Ran) -> Iterator[Event]:
        """A program of the model's begins, or has ended."""
        if isinstance(event, Running):
            use = {
                "type": "server_tool_use",
                "id": f"srvtoolu_{event.id}",
                "name": "code_execution",
                "input": {"code": event.code},
                "caller": {"type": "direct"},
            }
            yield from self._start(use, {**use, "input": {}})
            written = json.dumps(use["input"])
            yield self._delta({"type": "input_json_delta", "partial_json": written})
        else:
            files = [{"type": "code_execution_output", "file_id": name} for name in event.files]
            yield from self._start(
                {
                    "type": "code_execution_tool_result",
                    "tool_use_id": f"srvtoolu_{event.id}",
                    "caller": {"type": "direct"},
                    "content": {
                        "type": "code_execution_result",
                        "stdout": event.stdout,
                        "stderr": event.stderr,
                        "return_code": 1 if event.failed else 0,
                        "content": files,
                    },
                }
            )
        yield from self.close()

    def _text(self, text: str) -> Iterator[Event]:
        self._call = None
        if self._open is None or self._open["type"] != "text":
            self._space += text
            if self._space.isspace() or not self._space:
                return
            text, self._space = self._space, ""
            yield from self._start({"type": "text", "text": ""})
        assert self._open is not None
        self._open["text"] += text
        yield self._delta({"type": "text_delta", "text": text})

    def _reasoning(self, text: str) -> Iterator[Event]:
        if self._open is None or self._open["type"] != "thinking":
            yield from self._start({"type": "thinking", "thinking": "", "signature": ""})
            self._thinking = ""
        self._thinking += text
        if not self._hidden:
            yield self._delta({"type": "thinking_delta", "thinking": text})

    def _start_call(self, call: CallStart) -> Iterator[Event]:
        identity = f"toolu_{secrets.token_hex(12)}"
        block = {"type": "tool_use", "id": identity, "name": call.name, "input": None}
        yield from self._start(block, {**block, "input": {}})

    def _end_call(self) -> Iterator[Event]:
        assert self._call is not None
        if self._call.name not in self._eager:
            yield from self._start_call(self._call)
            yield self._delta({"type": "input_json_delta", "partial_json": self._arguments})
        assert self._open is not None
        self._open["input"] = json.loads(self._arguments)
        yield from self.close()

    def _start(self, block: dict[str, Any], shown: dict[str, Any] | None = None) -> Iterator[Event]:
        yield from self.close()
        self._space = ""
        self._blocks.append(block)
        self._open = block
        yield {
            "type": "content_block_start",
            "index": len(self._blocks) - 1,
            "content_block": dict(shown or block),
        }

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

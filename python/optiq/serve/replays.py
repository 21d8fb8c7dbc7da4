"""The tokens of what the model has said, found again when a client sends it back.

A chat template may write an answer otherwise than the model did: without its reasoning, with other
white space in the arguments of a call. Then nothing after it would be in the prefix cache, and the
model would read words that it never said.
"""

from __future__ import annotations

import json
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from ..chat.prompt import Replay
from .asked import Chat

MOST_TOKENS = 8 * 2**20  # four bytes each


@dataclass(frozen=True)
class _Said:
    tokens: array[int]
    reasoning: str | None


class Replays:
    """The newest answers, each with all tokens before it. May be used from several threads."""

    def __init__(self, most_tokens: int = MOST_TOKENS) -> None:
        self._most, self._count = most_tokens, 0
        self._said: OrderedDict[bytes, _Said] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, chat: Chat, message: Mapping[str, Any], tokens: tuple[int, ...]) -> None:
        """`message` is what the model has answered to `chat`, as it is read when it comes back;
        `tokens` are those of the prompt and of the answer, without one that ends it."""
        if chat.continues:
            *before, begun = chat.messages
            message = {**message, "content": begun["content"] + message["content"]}
            chat = replace(chat, messages=tuple(before))
        *_, (_, key) = _keys(chat, message)
        with self._lock:
            self._drop(key)
            self._said[key] = _Said(array("I", tokens), message.get("reasoning_content"))
            self._count += len(tokens)
            while self._count > self._most:
                self._drop(next(iter(self._said)))

    def find(self, chat: Chat) -> Replay | None:
        """The last message of a conversation that the model has said, if its tokens are known."""
        for index, key in reversed(list(_keys(chat))):
            message = chat.messages[index]
            with self._lock:
                said = self._said.get(key) if message["role"] == "assistant" else None
                if said is None or message.get("reasoning_content") not in (None, said.reasoning):
                    continue
                self._said.move_to_end(key)
                return Replay(index, tuple(said.tokens))
        return None

    def _drop(self, key: bytes) -> None:
        said = self._said.pop(key, None)
        self._count -= len(said.tokens) if said else 0


def _keys(chat: Chat, answer: Mapping[str, Any] | None = None) -> Iterator[tuple[int, bytes]]:
    """The conversation up to each message: all that decides about its tokens, but for reasoning,
    which clients may leave out, and the ids of calls."""
    thinking = (chat.thinking.on, chat.thinking.effort)
    digest = sha256(_text([chat.tools, dict(chat.arguments), thinking]))
    messages = (*chat.messages, *([answer] if answer is not None else []))
    for index, message in enumerate(messages):
        calls = [call["function"] for call in message.get("tool_calls") or []]
        said = [message["role"], message["content"].strip(), message.get("name"), calls]
        digest.update(_text(said))
        yield index, digest.digest()


def _text(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, default=dict).encode()

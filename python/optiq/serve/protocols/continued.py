"""Answers that go on from text that the client has written."""

from __future__ import annotations

from dataclasses import replace

from ..asked import Chat, Form
from .fields import Fields


def continued(body: Fields, chat: Chat) -> Chat:
    """The conversation, with its last message as the beginning of the answer."""
    last = chat.messages[-1]
    if last["role"] != "assistant" or not last["content"] or last.get("tool_calls"):
        raise body.wrong(
            "messages", "must end with text of the assistant's, for the answer to go on from"
        )
    thinking = chat.thinking
    strict = any(tool["function"].get("strict") for tool in chat.tools)
    held = strict or not chat.parallel or chat.tool_choice not in ("auto", "none")
    for unlike, asked in (
        ("an answer of a given form", chat.form != Form()),
        ("calls that are forced, strict or one at a time", bool(chat.tools) and held),
        ("reasoning", thinking.on or thinking.budget or thinking.effort),
        ("Python that the server runs", chat.interpreter),
    ):
        if asked:
            raise body.wrong(
                "messages",
                f"ends with the assistant's text, which excludes {unlike}; leave one of them out",
            )
    return replace(chat, continues=True)

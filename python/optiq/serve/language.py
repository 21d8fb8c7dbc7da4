"""The model's own language: conversations as tokens, answers as parts, tokens as bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..chat.notation import notation
from ..chat.prompt import Prompt, render
from ..chat.reader import Reader
from ..errors import ChatError, RequestError, TooLongError
from .asked import Chat
from .engine.request import Guide
from .grammar import AnswerForm, Grammars, Tool
from .replays import Replays
from .tokens import TokenBytes

# Most tokens of reasoning for an effort that the chat template does not know by name.
BUDGETS = {"minimal": 512, "low": 2048, "medium": 8192, "high": None, "xhigh": None, "max": None}


class Language:
    """What is known of a model beside its weights. All of it may be used from several threads."""

    def __init__(self, tokenizer: Any, vocabulary: int, context: int) -> None:
        self._tokenizer = tokenizer
        # A text of more characters cannot fit; so huge ones need not be made into tokens.
        self._most = context * max(map(len, tokenizer.get_vocab()))
        self._notation = notation(tokenizer)
        self._grammars = Grammars(tokenizer, self._notation, vocabulary)
        self.tokens = TokenBytes(tokenizer)
        template = tokenizer.chat_template
        self.replays = Replays()
        self._knows_effort = isinstance(template, str) and "reasoning_effort" in template

    @property
    def reasons(self) -> bool:
        """Whether the model marks its reasoning."""
        return self._notation.reasoning is not None or self._notation.channels is not None

    def encode(self, text: str) -> tuple[int, ...]:
        """A text as it is, without a chat template."""
        self._check_length(len(text))
        return tuple(self._tokenizer.encode(text))

    def decode(self, tokens: tuple[int, ...]) -> str:
        return str(self._tokenizer.decode(list(tokens)))

    def prompt(self, chat: Chat) -> Prompt:
        """Raises RequestError for a conversation that the chat template refuses."""
        self._check_length(sum(len(message["content"]) for message in chat.messages))
        arguments = dict(chat.arguments)
        if chat.thinking.effort is not None and self._knows_effort:
            arguments["reasoning_effort"] = chat.thinking.effort
        try:
            return render(
                [dict(message) for message in chat.messages],
                self._tokenizer,
                [dict(tool) for tool in chat.tools] or None,
                thinking=chat.thinking.on,
                arguments=arguments,
                replay=self.replays.find(chat),
                continues=chat.continues,
            )
        except ChatError as error:
            raise RequestError(str(error), "messages") from error

    def _check_length(self, characters: int) -> None:
        if characters > self._most:
            raise TooLongError(
                f"the prompt has {characters} characters, more than any {self._most} that fit the "
                "context; shorten it"
            )

    def guide(self, chat: Chat, prompt: Prompt) -> Callable[[], Guide] | None:
        """Makes a guide for each answer; None where any text will do."""
        return self._grammars.compile(
            AnswerForm(
                kind=chat.form.kind,
                value=chat.form.value,
                tools=tuple(_tool(tool["function"]) for tool in chat.tools),
                tool_choice=chat.tool_choice,
                parallel=chat.parallel,
                reasoning=prompt.reasoning,
                reasoning_budget=self._budget(chat),
            )
        )

    def _budget(self, chat: Chat) -> int | None:
        thinking = chat.thinking
        if not self.reasons:
            if thinking.budget or thinking.effort not in (None, "minimal") or thinking.on:
                raise RequestError(
                    "this model does not reason before it answers; leave the reasoning options out",
                    "reasoning_effort" if thinking.effort else "thinking",
                )
            return None
        if thinking.budget is not None:
            return thinking.budget
        if thinking.effort is None or self._knows_effort:
            return None
        return BUDGETS[thinking.effort]

    def reader(self, chat: Chat, prompt: Prompt) -> Reader:
        calls = bool(chat.tools) and chat.tool_choice != "none"
        known = self._notation
        if chat.continues:  # calls without a mark stand at the beginning of an answer only
            known = replace(known, calls=tuple(form for form in known.calls if form.start))
        return Reader(known, chat.tools, reasoning=prompt.reasoning, calls=calls)


def _tool(function: Mapping[str, Any]) -> Tool:
    return Tool(function["name"], function["parameters"], function.get("strict", False))

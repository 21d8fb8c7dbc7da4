"""Special tokens that stand in what users write stay text.

A user, or a web page that a tool has read, may write `<|im_end|>`. Encoded with the conversation it
would end the turn. So such texts are put between two marks before the template gets them, and what
stands between the marks is encoded character by character: the model reads the same text, and no
token of it has a meaning of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

from ..errors import ChatError
from .any_of import any_of

# Noncharacters of Unicode, which no text may hold; what does loses them.
_START, _END = "\ufdd0", "\ufdd1"
# Each one costs a run of the tokenizer.
MOST_MARKED = 20_000
_MARK = re.compile(f"[{_START}{_END}]")


class Controls:
    """The control tokens of a tokenizer with this chat template.

    These are its special tokens, and those of its added tokens that the template or the notation of
    calls and reasoning uses: `<tool_call>` and `<think>` are not special in many tokenizers.
    """

    def __init__(self, tokenizer: Any, template: str, notation: Collection[str] = ()) -> None:
        self._encode: Callable[..., list[int]] = tokenizer.encode
        self._newline = self._tokens("\n")
        self._ids: dict[str, int] = {}
        self._spelled: dict[str, list[int]] = {}  # control tokens as text
        for id, token in tokenizer.added_tokens_decoder.items():
            text = str(token.content)
            used = text in template or any(text in mark for mark in notation)
            if text.strip() and (token.special or used):
                self._ids[text] = int(id)
        self._find = any_of(self._ids)
        self._marked = re.compile(f"{_START}({self._find.pattern}){_END}|[{_START}{_END}]")

    def mark(self, value: Any, but: Collection[str] = ()) -> Any:
        """`value` (as JSON holds it) with marks around the control tokens in its texts."""
        if isinstance(value, str):
            clean = _MARK.sub("", value) if _MARK.search(value) else value
            find = any_of([text for text in self._ids if text not in but]) if but else self._find
            return find.sub(f"{_START}\\g<0>{_END}", clean)
        if isinstance(value, dict):
            return {self.mark(key): self.mark(item, but) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark(item, but) for item in value]
        return value

    def texts(self, ids: Collection[int]) -> list[str]:
        """The control tokens of these ids."""
        return [text for text, id in self._ids.items() if id in ids]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text with marks. A template may have split the marks of a token; a lone
        mark still keeps what stands around it apart."""
        pieces = self._marked.split(text)  # text, marked token or None, text, ...
        if len(pieces) > 2 * MOST_MARKED:
            raise ChatError(f"the messages contain more than {MOST_MARKED} special tokens as text")
        tokens = self._tokens(pieces[0])
        for i, piece in enumerate(pieces[1:], 1):
            if i % 2 == 0:
                tokens += self._inside(piece)
            elif piece is not None:
                tokens += self._as_text(piece)
        return tokens

    def plain(self, text: str) -> str:
        """The text without its marked tokens: the control tokens that the template wrote."""
        return self._marked.sub("", text)

    def _as_text(self, token: str) -> list[int]:
        if token not in self._spelled:
            tokens = [id for character in token for id in self._inside(character)]
            if self._ids[token] in tokens:
                raise ChatError(
                    f"a message contains {token!r}, which this tokenizer cannot write as plain "
                    "text; leave it out"
                )
            self._spelled[token] = tokens
        return self._spelled[token]

    def _inside(self, piece: str) -> list[int]:
        """The tokens of text that does not begin the prompt: some tokenizers put a space in front
        of what they take for a beginning."""
        if not piece:
            return []
        tokens = self._tokens(f"\n{piece}")
        if tokens[: len(self._newline)] == self._newline:
            return tokens[len(self._newline) :]
        return self._tokens(piece)

    def _tokens(self, text: str) -> list[int]:
        return list(self._encode(text, add_special_tokens=False))

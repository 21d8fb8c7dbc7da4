"""What a conversation looks like in a terminal, and in a pipe."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import Any, TextIO

from ..runs import Ran
from ..usage import Usage

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
CLEAR = "\r\x1b[K"
SHOWN_LINES = 12  # of a program's output
# A model may write to the terminal what the user never asked for: escape sequences.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    """Text without control characters, which show as escapes."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Screen:
    """Writes to `out`. With `fold`, reasoning is a line that counts, on a terminal only."""

    def __init__(self, out: TextIO, *, terminal: bool, fold: bool = True) -> None:
        self._out, self._terminal = out, terminal
        self.fold = fold
        self._thought = 0  # characters
        self._fresh = True  # nothing of this turn stands on the line
        self._line = False  # a line that will be overwritten stands there

    def say(self, text: str) -> None:
        """A line of ours."""
        self._write(f"{self._dim(text)}\n")

    def reading(self) -> None:
        self._passing("reading the prompt ...")

    def reasoning(self, text: str) -> None:
        if self.fold:
            self._thought += len(text)
            self._passing(f"thinking ... {self._thought} characters")
            return
        self._clear()
        self._write(self._dim(harmless(text)))
        self._thought += len(text)

    def text(self, text: str) -> None:
        self._end_reasoning()
        self._write(harmless(text))
        self._fresh = False

    def program(self, code: str) -> None:
        self._end_reasoning()
        self._new_line()
        lines = harmless(code).splitlines()
        self._write("".join(f"{self._dim('>>> ' + line)}\n" for line in lines))

    def program_ended(self, ran: Ran) -> None:
        lines = harmless(ran.text).splitlines()
        for line in lines[:SHOWN_LINES]:
            self._write(f"{self._dim('... ' + line)}\n")
        if len(lines) > SHOWN_LINES:
            self._write(f"{self._dim(f'... and {len(lines) - SHOWN_LINES} lines more')}\n")

    def turn_took(self, usage: Usage, rate: float, reason: str) -> None:
        self._end_reasoning()
        self._new_line()
        cut = ", cut at the limit of tokens" if reason == "length" else ""
        self.say(
            f"{usage.generated} tokens at {rate:.1f}/s, {usage.cached} of {usage.prompt} tokens of "
            f"the prompt from the cache{cut}"
        )

    def end_turn(self) -> None:
        """Whatever happened: the next line is a new one."""
        self._clear()
        self._new_line()
        self._thought = 0

    def _end_reasoning(self) -> None:
        self._clear()
        if self._thought and self.fold:
            self.say(f"thought for {self._thought} characters; /reasoning shows it")
        elif self._thought:
            self._write("\n\n")
        self._thought = 0

    def _passing(self, text: str) -> None:
        """A line that the next one overwrites."""
        if self._terminal:
            self._write(f"{CLEAR}{self._dim(text)}")
            self._line = True

    def _clear(self) -> None:
        if self._line:
            self._write(CLEAR)
            self._line = False

    def _new_line(self) -> None:
        if not self._fresh:
            self._write("\n")
            self._fresh = True

    def _dim(self, text: str) -> str:
        return f"{DIM}{text}{PLAIN}" if self._terminal else text

    def _write(self, text: str) -> None:
        coding = self._out.encoding or "utf-8"
        self._out.write(text.encode(coding, "backslashreplace").decode(coding))
        self._out.flush()


class JsonLines(Screen):
    """A line of JSON for each answer, and for each error or reply to a command."""

    def __init__(self, out: TextIO) -> None:
        super().__init__(out, terminal=False)
        self._answer: dict[str, Any] = {}

    def say(self, text: str) -> None:
        self._line_of({"note": text})

    def reading(self) -> None:
        self._answer = {"text": "", "reasoning": "", "programs": []}

    def reasoning(self, text: str) -> None:
        self._answer["reasoning"] += text

    def text(self, text: str) -> None:
        self._answer["text"] += text

    def program(self, code: str) -> None:
        pass  # when it has ended

    def program_ended(self, ran: Ran) -> None:
        self._answer["programs"].append({"code": ran.code, "output": ran.text})

    def turn_took(self, usage: Usage, rate: float, reason: str) -> None:
        told = {"usage": asdict(usage), "tokens_per_second": round(rate, 2), "finish": reason}
        self._line_of({**self._answer, **told})

    def end_turn(self) -> None:
        pass

    def _line_of(self, value: dict[str, Any]) -> None:
        self._out.write(json.dumps(value) + "\n")
        self._out.flush()

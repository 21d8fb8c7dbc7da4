"""Reading what the user types: turns of one or more lines, and commands."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from ...errors import OptiqError
from .screen import Screen, harmless
from .talk import Talk, interruptible

HELP = """\
Enter sends. A line that ends in \\ goes on in the next; what begins with \"\"\" ends with \"\"\".
Ctrl-C stops an answer, Ctrl-D or /exit ends.
/system TEXT   set the system message, without TEXT show it
/tools         list the tools; /tools python switches Python on or off
/think on|off|auto   whether the model reasons before it answers
/reasoning     show the reasoning of the last answer; /reasoning on|off always shows or folds it
/temperature T, /tokens N   how answers are made; 0 tokens: no limit
/save FILE     write the conversation as JSON
/new           forget the conversation
/help          this list"""
QUOTES = '"""'
HISTORY = 1000  # lines

Read = Callable[[str], str]


def turns_of(read: Read) -> Iterator[str]:
    """What the user says, turn by turn, until the input ends."""
    while True:
        try:
            lines = [read("> ")]
            if lines[0].strip().startswith(QUOTES):
                lines[0] = lines[0].strip().removeprefix(QUOTES)
                while not lines[-1].rstrip().endswith(QUOTES):
                    lines.append(read(". "))
                lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
            while lines[-1].endswith("\\"):
                lines[-1] = lines[-1][:-1]
                lines.append(read(". "))
        except EOFError:
            return
        except KeyboardInterrupt:  # a line that nobody wants
            print(file=sys.stderr)
            continue
        if text := "\n".join(lines).strip():
            yield text


class Session:
    """Carries out commands and asks for answers, until the user ends it."""

    def __init__(
        self, talk: Talk, screen: Screen, loop: asyncio.AbstractEventLoop, *, python: bool
    ) -> None:
        self._talk, self._screen, self._loop = talk, screen, loop
        self._python = python  # whether there is Python to switch on
        self.failed = False  # the last answer did

    def run(self, read: Read) -> None:
        for text in turns_of(read):
            if not text.startswith("/"):
                self._answer(text)
            elif text.split()[0] in ("/exit", "/quit"):
                return
            else:
                name, _, rest = text[1:].partition(" ")
                self._command(name.strip(), rest.strip())

    def _answer(self, text: str) -> None:
        task = self._loop.create_task(self._talk.answer(text))
        self.failed = False
        try:
            with interruptible(self._loop, task):
                self._loop.run_until_complete(task)
        except asyncio.CancelledError:
            self._screen.say("stopped")
        except OptiqError as error:
            self._screen.say(f"error: {error}")
            self.failed = True

    def _command(self, name: str, rest: str) -> None:
        commands: dict[str, Callable[[str], str]] = {
            "help": lambda _: HELP,
            "system": self._system,
            "tools": self._tools,
            "think": self._think,
            "reasoning": self._reasoning,
            "temperature": self._temperature,
            "tokens": self._tokens,
            "save": self._save,
            "new": self._new,
        }
        if name not in commands:
            self._screen.say(f"there is no command /{harmless(name)}; /help lists them")
            return
        self._screen.say(commands[name](rest))

    def _system(self, rest: str) -> str:
        if rest:
            self._talk.change(system=rest)
        return f"system: {harmless(self._talk.settings.system) or '(none)'}"

    def _tools(self, rest: str) -> str:
        if rest == "python" and self._python:
            self._talk.change(python=not self._talk.settings.python)
        elif rest:
            return f"{harmless(rest)} is not a tool here; python needs --tools python"
        if not self._python:
            return "no tools; start with --tools python"
        return f"python: {'on' if self._talk.settings.python else 'off'}"

    def _think(self, rest: str) -> str:
        choices = {"on": True, "off": False, "auto": None}
        if rest not in choices:
            return "/think takes on, off or auto"
        self._talk.change(thinking=choices[rest])
        return f"thinking: {rest}"

    def _reasoning(self, rest: str) -> str:
        if rest in ("on", "off"):
            self._screen.fold = rest == "off"
            return f"reasoning is {'folded' if self._screen.fold else 'shown'}"
        return harmless(self._talk.reasoning) or "the last answer came without reasoning"

    def _temperature(self, rest: str) -> str:
        try:
            value = float(rest)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 2:
            return "/temperature takes a number from 0 to 2"
        sampling = replace(self._talk.settings.sampling, temperature=value)
        self._talk.change(sampling=sampling)
        return f"temperature: {value:g}"

    def _tokens(self, rest: str) -> str:
        if not rest.isdecimal():
            return "/tokens takes a number; 0 means no limit"
        self._talk.change(max_tokens=int(rest) or None)
        return f"tokens of an answer: {rest if int(rest) else 'no limit'}"

    def _save(self, rest: str) -> str:
        if not rest:
            return "/save takes the name of a file"
        try:
            self._talk.save(Path(rest).expanduser())
        except OSError as error:
            return f"not saved to {rest}: {error.strerror or error}"
        return f"saved to {rest}"

    def _new(self, rest: str) -> str:
        self._talk.forget()
        return "the conversation is forgotten"

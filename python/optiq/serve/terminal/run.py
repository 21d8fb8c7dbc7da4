"""From a model's name to a conversation, and to its end."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...kv import KVConfig
from ..answers import Answers
from ..language import Language
from ..metrics import Metrics
from ..opening import check_libraries, open_model
from ..options import Options
from ..preparing import Preparer
from ..tools.python import open_tool
from .commands import HISTORY, Read, Session
from .screen import JsonLines, Screen
from .talk import Settings, Talk


def chat(
    model: str | Path | tuple[Any, Any],
    *,
    kv: KVConfig | Path | str | None = None,
    revision: str | None = None,
    settings: Settings,
    fold: bool = True,
    json_lines: bool = False,
    **options: Any,
) -> bool:
    """Talk to a model in the terminal, or with `json_lines` by lines of JSON.

    `options` are fields of `serve.options.Options`. Returns whether the last answer came
    whole. Raises as `serve` does, before anything is asked.
    """
    check_libraries()
    read = Options(**options)
    python = open_tool(read.sandbox_packages) if settings.python else None
    try:
        opened = open_model(model, read, kv=kv, revision=revision)
        engine = opened.engine
        engine.start()
        loop = asyncio.new_event_loop()
        answers = Answers(
            engine,
            Language(opened.tokenizer, engine.vocabulary, engine.context),
            Metrics(dict),
            preparer := Preparer(read.preparing_seconds),
            answer_tokens=read.answer_tokens,
            deadline=read.deadline,
            python=python,
        )
        screen = Screen(sys.stdout, terminal=sys.stdout.isatty(), fold=fold)
        if json_lines:
            screen = JsonLines(sys.stdout)
        elif sys.stdin.isatty():
            screen.say(f"{opened.models.name}, a context of {engine.context} tokens; /help")
        session = Session(Talk(answers, screen, settings), screen, loop, python=python is not None)
        try:
            with _lines() as lines:
                session.run(lines)
        finally:
            engine.close()
            preparer.close()
            loop.close()
            if opened.prefix is not None:
                opened.prefix.close()
        return not session.failed
    finally:
        if python is not None:
            python.close()


@contextmanager
def _lines() -> Iterator[Read]:
    """How lines are read: on a terminal with a history, if Python has readline."""
    if not sys.stdin.isatty():
        yield lambda prompt: _piped()
        return
    try:
        import readline
    except ImportError:
        yield input
        return
    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    file = state / "optiq" / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        readline.read_history_file(file)
    except OSError:
        pass  # the first time, or nowhere to keep it
    readline.set_history_length(HISTORY)
    try:
        yield input
    finally:
        try:
            readline.write_history_file(file)
        except OSError:
            print(f"the history could not be written to {file}", file=sys.stderr)


def _piped() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")

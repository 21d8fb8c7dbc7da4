"""A server with a scripted model, and what a client must have done."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from optiq.serve.opening import open_model
from optiq.serve.options import Options
from optiq.serve.server import Server, bind, one
from tests.clients.agent import TASK, AgentModel, Watched
from tests.serve.servers import tiny_tokenizer

CLIENTS = Path(os.environ.get("OPTIQ_CLIENTS", "build/clients")).absolute()
NOTES = "The tide is 2.1 m.\nIt rises.\n"
SECONDS = 240
CACHED = 0.95  # of each prompt from the second turn on


def programs() -> str:
    """PATH with the agents in front. Two have their programs in packages for the machine."""
    machine = {"x86_64": "x64", "aarch64": "arm64", "arm64": "arm64"}[platform.machine()]
    packages, system = CLIENTS / "node_modules", f"{sys.platform}-{machine}"
    folders = [
        packages / f"opencode-{system}" / "bin",
        packages / "@anthropic-ai" / f"claude-code-{system}",
        packages / ".bin",
    ]
    return os.pathsep.join([*map(str, folders), os.environ["PATH"]])


@contextmanager
def served(steps: Sequence[str], mark: str = "<tools>") -> Iterator[tuple[Server, Watched]]:
    """`mark` is in the prompts of the task, and not in one that asks for a title."""
    tokenizer = tiny_tokenizer()
    options = Options(port=0, drain=0.0, name="m", prefix_memory=10**9)
    opened = open_model((AgentModel(tokenizer, steps, mark), tokenizer), options)
    watched = Watched(opened.engine, partial(asks_for_the_task, tokenizer, mark))
    opened = replace(opened, engine=watched)  # type: ignore[arg-type]
    with bind(options) as bound:
        server = Server(partial(one, opened), bound, options)
    with server:
        yield server, watched


def asks_for_the_task(tokenizer: Any, mark: str, request: Any) -> bool:
    """Not for a title."""
    text = tokenizer.decode(list(request.tokens))
    return mark in text and TASK in text


def environment(folder: Path) -> dict[str, str]:
    """A home that nobody has touched yet."""
    home = folder / "home"
    home.mkdir()
    return {**os.environ, "PATH": programs(), "HOME": str(home),
            "PWD": str(folder / "work")}  # fmt: skip


def check(folder: Path, watched: Watched, *, rewrites: bool = False) -> None:
    """The file is right, and from the second turn on nearly nothing was read again: in a long
    prompt nearly all of it came from the cache, in a short one all that was there before. A
    client that `rewrites` sends another answer than the model gave, and that is read anew."""
    assert (folder / "copy.txt").read_text() == NOTES
    assert len(watched.turns) >= 3
    for before, now in zip(watched.turns[:2], watched.turns[1:3], strict=True):
        said = 0 if rewrites else before.generated_tokens - 1  # the end of an answer is not kept
        known = before.prompt_tokens + said
        assert now.cached_tokens >= min(known, CACHED * now.prompt_tokens), watched.turns
    print([f"{100 * turn.cached_tokens / turn.prompt_tokens:.1f} %" for turn in watched.turns])

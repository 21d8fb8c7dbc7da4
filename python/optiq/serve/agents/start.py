"""Start an agent on a server that runs already, or on one that ends with the agent."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...base.text import cause
from ...errors import ServeError, UsageError
from ..engine.model import CONTEXT
from .configure import AGENTS, Agent, Served, Setup

ASKING_SECONDS = 10


def run_agent(
    name: str,
    arguments: Sequence[str],
    *,
    model: str | None = None,
    url: str | None = None,
    key: str | None = None,
    **options: Any,
) -> int:
    """Run the agent on `model`, served with `options` for as long as it runs; or with `url` on a
    server that runs, which is asked for its models. Returns the agent's exit status.

    Raises UsageError, ServeError, and what `serve` raises.
    """
    agent = AGENTS[name]
    program = shutil.which(agent.program)
    if program is None:
        raise UsageError(
            f"the command {agent.program!r} is not there; npm install -g {agent.package} brings it"
        )
    with (
        TemporaryDirectory(prefix="optiq-agent-") as folder,
        _server(model, url, key, options) as served,
    ):
        setup = agent.set_up(served, Path(folder))
        for file, text in setup.files.items():
            file.write_text(text, encoding="utf-8")
        command = [program, *setup.arguments, *arguments]
        with _left_to_the_agent():
            return subprocess.run(
                command, env={**os.environ, "PWD": str(Path.cwd()), **setup.environment}
            ).returncode


def described(agent: Agent, arguments: Sequence[str], setup: Setup) -> str:
    """What `run_agent` would set, as lines for a shell."""
    lines = []
    for file, text in setup.files.items():
        quoted = shlex.quote(str(file))
        lines += [f"mkdir -p {shlex.quote(str(file.parent))}", f"cat > {quoted} <<'END'"]
        lines += [text.rstrip("\n"), "END"]
    lines += [f"export {key}={shlex.quote(value)}" for key, value in setup.environment.items()]
    lines.append(shlex.join([agent.program, *setup.arguments, *arguments]))
    return "\n".join(lines)


def ask_server(url: str, model: str | None, key: str | None) -> Served:
    """A model on a server that runs: the one of this name, or the first. Raises ServeError."""
    request = urllib.request.Request(f"{url}/v1/models")
    if key is not None:
        request.add_header("authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=ASKING_SECONDS) as answer:
            listed = json.load(answer)["data"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ServeError(
            f"no server answers at {url} ({cause(error)}); start optiq serve"
        ) from None
    names = [found["id"] for found in listed]
    found = next((m for m in listed if model in (None, m["id"])), None)
    if found is None:
        raise ServeError(f"{url} does not serve {model!r}; it has {', '.join(names)}")
    return Served(url, found["id"], found.get("context_window") or CONTEXT, key)


@contextmanager
def _server(
    model: str | None, url: str | None, key: str | None, options: dict[str, Any]
) -> Iterator[Served]:
    if url is not None:
        yield ask_server(url.rstrip("/").removesuffix("/v1"), model, key)
        return
    if model is None:
        raise UsageError("say which model: --model MODEL, or --url of a server that runs")
    from ..server import Server

    with Server.open(model, port=0, **options) as server:
        served = server.models[0]
        yield Served(server.url, served.name, served.context or CONTEXT)


@contextmanager
def _left_to_the_agent() -> Iterator[None]:
    """Ctrl-C is for the agent, which shares the terminal. A handler, as what is ignored here would
    be ignored there."""
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

"""Real coding agents do a task of three turns on our server, in a namespace without network.

    make test-clients

installs them into build/clients. The model is scripted: it reads a file, writes one and says
that it is done. What the agents send, how they read it and what they carry out is their own.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from optiq.serve.agents.configure import AGENTS
from optiq.serve.agents.start import ask_server
from optiq.serve.opening import open_model
from optiq.serve.options import Options
from optiq.serve.server import Server, bind, one
from tests.clients.agent import TASK, AgentModel, Watched, call
from tests.serve.servers import tiny_tokenizer

pytestmark = pytest.mark.clients

CLIENTS = Path(os.environ.get("OPTIQ_CLIENTS", "build/clients")).absolute()
NOTES = "The tide is 2.1 m.\nIt rises.\n"
SECONDS = 240
CACHED = 0.95  # of each prompt from the second turn on

ARGUMENTS = {
    "codex": ["exec", "--json", "--skip-git-repo-check",
              "--dangerously-bypass-approvals-and-sandbox", TASK],
    "opencode": ["run", "--format", "json", TASK],
    "pi": ["-p", "--no-session", TASK],
    "qwen": ["--approval-mode", "yolo", "-p", TASK],
}  # fmt: skip


def steps(agent: str, folder: Path) -> list[str]:
    """What the model says: two calls in the agent's own words, and that it is done."""
    notes, copy = str(folder / "notes.txt"), str(folder / "copy.txt")
    calls = {
        "codex": [
            call("exec_command", cmd="cat notes.txt"),
            call("exec_command", cmd="cp notes.txt copy.txt && cat copy.txt"),
        ],
        "opencode": [
            call("read", filePath=notes),
            call("write", filePath=copy, content=NOTES),
        ],
        "pi": [call("read", path=notes), call("write", path=copy, content=NOTES)],
        "qwen": [
            call("read_file", file_path=notes),
            call("write_file", file_path=copy, content=NOTES),
        ],
    }
    return [*calls[agent], "It is done."]


def programs() -> str:
    """PATH with the agents in front. opencode's package has its program in one for the machine."""
    machine = {"x86_64": "x64", "aarch64": "arm64", "arm64": "arm64"}[platform.machine()]
    own = CLIENTS / "node_modules" / f"opencode-{sys.platform}-{machine}" / "bin"
    return os.pathsep.join([str(own), str(CLIENTS / "node_modules" / ".bin"), os.environ["PATH"]])


@contextmanager
def served(agent: str, folder: Path) -> Iterator[tuple[Server, Watched]]:
    if shutil.which(AGENTS[agent].program, path=programs()) is None:
        pytest.skip(f"{AGENTS[agent].package} is not in {CLIENTS}; make test-clients installs it")
    tokenizer = tiny_tokenizer()
    options = Options(port=0, drain=0.0, name="m", prefix_memory=10**9)
    opened = open_model((AgentModel(tokenizer, steps(agent, folder)), tokenizer), options)
    watched = Watched(opened.engine, partial(asks_for_the_task, tokenizer))
    opened = replace(opened, engine=watched)  # type: ignore[arg-type]
    with bind(options) as bound:
        server = Server(partial(one, opened), bound, options)
    with server:
        yield server, watched


def asks_for_the_task(tokenizer: Any, request: Any) -> bool:
    """Not a title, nor what some agents ask besides."""
    text = tokenizer.decode(list(request.tokens))
    last = text.rpartition("<|im_start|>user")[2]
    return "<tools>" in text and (TASK in last or "<|im_start|>tool" in last)


def environment(folder: Path) -> dict[str, str]:
    """A home that nobody has touched yet."""
    home = folder / "home"
    home.mkdir()
    return {**os.environ, "PATH": programs(), "HOME": str(home),
            "PWD": str(folder / "work")}  # fmt: skip


def check(folder: Path, watched: Watched, home: Path) -> None:
    """The file is right, and from the second turn on nearly nothing was read again."""
    assert (folder / "copy.txt").read_text() == NOTES
    assert len(watched.turns) >= 3
    for prompt, cached in watched.turns[1:3]:
        assert cached >= CACHED * prompt, watched.turns
    print(f"{[f'{cached / prompt:.4f}' for prompt, cached in watched.turns]}")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "notes.txt").write_text(NOTES)
    return folder


@pytest.mark.parametrize("agent", sorted(AGENTS))
def test_optiq_run(agent: str, work: Path, tmp_path: Path) -> None:
    """As a user starts it. Nothing of the user's home is touched by its configuration."""
    with served(agent, work) as (server, watched):
        optiq = str(Path(sys.executable).with_name("optiq"))
        command = [optiq, "run", agent, "--url", server.url, "--", *ARGUMENTS[agent]]
        variables = environment(tmp_path)
        done = subprocess.run(
            command, cwd=work, env=variables, stdin=subprocess.DEVNULL, timeout=SECONDS,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "It is done." in done.stdout
        check(work, watched, tmp_path / "home")
    left = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert [
        p for p in left if p.suffix in (".json", ".toml", ".jsonl") and "cache" not in str(p)
    ] == []


@pytest.mark.parametrize("protocol", ["anthropic", "responses"])
@pytest.mark.parametrize("agent", ["opencode", "pi"])
def test_the_other_protocols(agent: str, protocol: str, work: Path, tmp_path: Path) -> None:
    with served(agent, work) as (server, watched):
        setup = AGENTS[agent].set_up(ask_server(server.url, None, None), tmp_path)
        ((file, text),) = setup.files.items()
        config = json.loads(text)
        if agent == "opencode":
            packages = {"anthropic": "@ai-sdk/anthropic", "responses": "@ai-sdk/openai"}
            config["provider"]["optiq"]["npm"] = packages[protocol]
        else:
            provider = config["providers"]["optiq"]
            provider["api"] = {
                "anthropic": "anthropic-messages", "responses": "openai-responses"
            }[protocol]  # fmt: skip
            if protocol == "anthropic":
                provider["baseUrl"] = server.url
        file.write_text(json.dumps(config))
        done = subprocess.run(
            [AGENTS[agent].program, *setup.arguments, *ARGUMENTS[agent]],
            cwd=work, env={**environment(tmp_path), **setup.environment}, timeout=SECONDS,
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        check(work, watched, tmp_path)

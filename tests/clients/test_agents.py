"""Real coding agents do a task of three turns on our server, in a namespace without network.

    make test-clients

installs them into build/clients. The model is scripted: it reads a file, writes one and says
that it is done. What the agents send, how they read it and what they carry out is their own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from optiq.serve.agents.configure import AGENTS
from optiq.serve.agents.start import ask_server
from optiq.serve.server import Server
from tests.clients.agent import TASK, Watched, call
from tests.clients.serving import CLIENTS, NOTES, SECONDS, check, environment, programs, served

pytestmark = pytest.mark.clients

ARGUMENTS = {
    "claude": ["-p", TASK, "--permission-mode", "acceptEdits"],
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
        "claude": [
            call("Read", file_path=notes),
            call("Write", file_path=copy, content=NOTES),
        ],
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


@contextmanager
def served_for(agent: str, folder: Path) -> Iterator[tuple[Server, Watched]]:
    if shutil.which(AGENTS[agent].program, path=programs()) is None:
        pytest.skip(f"{AGENTS[agent].package} is not in {CLIENTS}; make test-clients installs it")
    with served(steps(agent, folder)) as found:
        yield found


@pytest.mark.parametrize("agent", sorted(AGENTS))
def test_optiq_run(agent: str, work: Path, tmp_path: Path) -> None:
    """As a user starts it. Nothing of the user's home is touched by its configuration."""
    with served_for(agent, work) as (server, watched):
        optiq = str(Path(sys.executable).with_name("optiq"))
        command = [optiq, "run", agent, "--url", server.url, "--", *ARGUMENTS[agent]]
        variables = environment(tmp_path)
        done = subprocess.run(
            command, cwd=work, env=variables, stdin=subprocess.DEVNULL, timeout=SECONDS,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "It is done." in done.stdout
        check(work, watched)
    left = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert [
        p for p in left if p.suffix in (".json", ".toml", ".jsonl") and "cache" not in str(p)
    ] == []


@pytest.mark.parametrize("protocol", ["anthropic", "responses"])
@pytest.mark.parametrize("agent", ["opencode", "pi"])
def test_the_other_protocols(agent: str, protocol: str, work: Path, tmp_path: Path) -> None:
    with served_for(agent, work) as (server, watched):
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
        check(work, watched)


AIDERS_TURNS = 4  # an answer, and what it says in the model's place about files and tests


def test_aider(work: Path, tmp_path: Path) -> None:
    """It has no tools. It writes the files that an answer shows, runs a test of the user's, and
    sends what that says back: twice here, until the third answer is right.

    It puts the files as they are now in front of the conversation, so that all after its
    instructions is read again in each turn.
    """
    program = CLIENTS / "aider" / "bin" / "aider"
    if not program.exists():
        pytest.skip(f"there is no {program}; make test-clients installs it")
    answers = [f"copy.txt\n```\n{text}```\n" for text in ("x\n", "y\n", NOTES)]
    with served([a for a in answers for _ in range(AIDERS_TURNS)], mark=TASK) as (server, watched):
        command = [
            program, "--model", "openai/m", "--openai-api-base", f"{server.url}/v1",
            "--openai-api-key", "none", "--edit-format", "whole", "--message", TASK,
            "--auto-test", "--test-cmd", "cmp notes.txt copy.txt", "--yes-always", "--no-git",
            "--no-show-model-warnings", "--analytics-disable", "--no-check-update",
            "--no-show-release-notes", "--map-tokens", "0", "notes.txt",
        ]  # fmt: skip
        done = subprocess.run(
            command, cwd=work, env=environment(tmp_path), timeout=SECONDS,
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert (work / "copy.txt").read_text() == NOTES
        assert len(watched.turns) >= 3
        shares = [turn.cached_tokens / turn.prompt_tokens for turn in watched.turns]
        assert min(shares[1:]) > 0.4
        print([f"{share:.1%}" for share in shares])

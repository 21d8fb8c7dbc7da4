"""Libraries that people build agents with do the same task, in each protocol that they speak."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.clients.agent import TASK, call
from tests.clients.serving import CLIENTS, NOTES, SECONDS, check, environment, served

pytestmark = pytest.mark.clients

PROGRAMS = Path(__file__).parent / "programs"
STEPS = [
    call("read_file", path="notes.txt"),
    call("write_file", path="copy.txt", content=NOTES),
    "It is done.",
]
# smolagents asks for an answer by a call, and says in its own words what was called.
ENDS = {"smolagents": call("final_answer", answer="It is done.")}
RUNS = [
    *((name, protocol) for name in ("pydantic_ai", "langchain", "ai_sdk")
      for protocol in ("chat", "responses", "anthropic")),
    ("openai_agents", "chat"),
    ("openai_agents", "responses"),
    ("smolagents", "chat"),
    ("llm", "chat"),
]  # fmt: skip


@pytest.mark.parametrize(("library", "protocol"), RUNS)
def test_libraries(library: str, protocol: str, work: Path, tmp_path: Path) -> None:
    command = [CLIENTS / "venv" / "bin" / "python", PROGRAMS / f"with_{library}.py"]
    if library == "ai_sdk":
        # Node looks for packages beside the program.
        program = CLIENTS / "with_ai_sdk.mjs"
        program.write_text((PROGRAMS / "with_ai_sdk.mjs").read_text())
        command = [Path("/usr/bin/env"), Path("node"), program]
    elif not command[0].exists():
        pytest.skip(f"there is no {command[0]}; make test-clients installs it")
    steps = [*STEPS[:2], ENDS.get(library, STEPS[2])]
    with served(steps) as (server, watched):
        variables = {**environment(tmp_path), "URL": server.url, "PROTOCOL": protocol, "TASK": TASK,
                     "LLM_USER_PATH": str(tmp_path / "llm")}  # fmt: skip
        done = subprocess.run(
            [*map(os.fspath, command)], cwd=work, env=variables, timeout=SECONDS,
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "It is done." in done.stdout
        check(work, watched, rewrites=library == "smolagents")

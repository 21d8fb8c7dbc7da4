"""`optiq run`: what it sets, and what it leaves alone. tests/clients runs the agents themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from optiq.cli import main
from optiq.errors import ServeError, UsageError
from optiq.serve.agents.configure import AGENTS, Served
from optiq.serve.agents.start import ask_server, run_agent
from tests.serve.servers import Asked

if sys.version_info >= (3, 11):
    import tomllib


@pytest.mark.parametrize("agent", sorted(AGENTS))
def test_what_is_set_names_the_server_and_stays_in_its_folder(agent: str, tmp_path: Path) -> None:
    served = Served("http://127.0.0.1:1234", 'a "model"', 32768, "secret-key")
    setup = AGENTS[agent].set_up(served, tmp_path)
    everything = json.dumps([*setup.files.values(), *setup.environment.values(), setup.arguments])
    for word in ("http://127.0.0.1:1234", "secret-key"):
        assert word in everything
    assert all(file.parent == tmp_path for file in setup.files)
    # Some variable points the agent to the folder, and none to another place.
    places = [value for value in setup.environment.values() if value.startswith("/")]
    assert places
    assert all(Path(place).is_relative_to(tmp_path) for place in places)
    for file, text in setup.files.items():
        if file.suffix == ".json":
            json.loads(text)
        elif sys.version_info >= (3, 11):
            assert tomllib.loads(text)["model"] == 'a "model"'


def test_print_is_for_a_shell(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What is printed, carried out by a shell with another program in the agent's place."""
    assert main(["run", "codex", "--model", "m", "--print", "--", "exec", "it's"]) == 0
    script = capsys.readouterr().out.replace("/tmp/optiq-codex", str(tmp_path / "home"))
    (tmp_path / "codex").write_text('#!/bin/sh\ncat "$CODEX_HOME/config.toml"; echo "$@"\n')
    (tmp_path / "codex").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-c", script], env={"PATH": path}, capture_output=True, text=True, check=True
    )
    assert 'model = "m"' in done.stdout
    assert done.stdout.endswith("exec it's\n")
    folder = tmp_path / "a" / "qwen"
    folder.mkdir(parents=True)
    for config, context in (('{"max_position_embeddings": 1234}', 1234), ("[]", 32768)):
        (folder / "config.json").write_text(config)
        assert main(["run", "codex", "--model", str(folder), "--print"]) == 0
        shown = capsys.readouterr().out
        assert 'model = "qwen"' in shown
        assert f"model_context_window = {context}\n" in shown
    assert main(["run", "pi", "--json", "--", "-p", "x"]) == 0
    assert json.loads(capsys.readouterr().out)["arguments"][-2:] == ["-p", "x"]


def test_it_runs_the_agent_on_a_server(
    server: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program in the agent's place asks the server that it is told of; its status is ours."""
    program = tmp_path / "qwen"
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys, urllib.request\n"
        "url = os.environ['OPENAI_BASE_URL'] + '/models'\n"
        "found = json.load(urllib.request.urlopen(url))['data'][0]['id']\n"
        "assert found == os.environ['OPENAI_MODEL'], found\n"
        "open(sys.argv[-1], 'w').write(os.environ['QWEN_HOME'])\n"
        "sys.exit(7)\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    noted = tmp_path / "noted"
    assert run_agent("qwen", [str(noted)], url=f"{server.server.url}/v1") == 7
    assert not Path(noted.read_text()).exists()


def test_what_cannot_be_run_is_said(server: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    url = server.server.url
    assert ask_server(url, None, None).model == "tiny"
    with pytest.raises(ServeError, match="it has tiny"):
        ask_server(url, "other", None)
    with pytest.raises(ServeError, match="start optiq serve"):
        ask_server("http://127.0.0.1:9", None, None)
    with monkeypatch.context() as patched:
        patched.setenv("PATH", "/nowhere")
        with pytest.raises(UsageError, match="npm install -g @openai/codex"):
            run_agent("codex", [], url=url)
    which: Any = "shutil.which"
    monkeypatch.setattr(which, lambda program: sys.executable)
    with pytest.raises(UsageError, match="--model"):
        run_agent("codex", [])

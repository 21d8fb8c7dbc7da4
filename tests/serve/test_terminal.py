"""`optiq chat`: what is shown, kept and saved; and in a real terminal, what Ctrl-C stops."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from optiq.cli import main
from optiq.lora.adapter import write
from optiq.runtime.generate import generate
from optiq.serve.terminal.commands import turns_of
from optiq.serve.terminal.run import chat
from optiq.serve.terminal.screen import harmless
from optiq.serve.terminal.talk import Settings
from tests.lora.models import mixed_folder
from tests.lora.test_adapter import random_adapter
from tests.serve.scripted import ScriptedModel
from tests.serve.servers import tiny_tokenizer

THOUGHT = "<think>\nLet me see\n</think>\n\n"


def typed(text: str) -> str:
    return f'"""{text}"""\n' if "\n" in text else f"{text}\n"


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """What is printed when these lines are typed, to a model that follows the script."""
    tokenizer = tiny_tokenizer(thinking=True)

    def run(*lines: str, fold: bool = True, json_lines: bool = False, **settings: Any) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(typed(line) for line in lines)))
        model = ScriptedModel(tokenizer, 4096), tokenizer
        chat(model, settings=Settings(**settings), fold=fold, json_lines=json_lines,
             sandbox_packages=())  # fmt: skip
        return capsys.readouterr().out

    return run


def test_turns_and_what_they_took(talk: Any) -> None:
    out = talk("SAY:One", "SAY:Two")
    assert out.splitlines()[0] == "One"
    assert "Two" in out
    first, second = (line for line in out.splitlines() if "tokens at" in line)
    assert " 0 of " in first
    cached, total = re.search(r"(\d+) of (\d+) tokens", second).groups()  # type: ignore[union-attr]
    assert int(total) - 40 < int(cached) < int(total)


def test_reasoning_is_folded(talk: Any) -> None:
    out = talk(f"SAY:{THOUGHT}Paris", "/reasoning", "/reasoning on", f"SAY:{THOUGHT}Rome")
    folded, shown = out.split("reasoning is shown")
    assert "thought for 10 characters" in folded
    assert folded.index("Paris") < folded.index("Let me see")  # asked for, afterwards
    assert shown.index("Let me see") < shown.index("Rome")


def test_an_adapter_answers(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    folder = mixed_folder(tmp_path)
    write(random_adapter(folder, 0.2), tmp_path / "adapter")
    said = []
    for options in ([], ["--adapter", str(tmp_path / "adapter")]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Where?\n"))
        assert main(["chat", str(folder), "--temp", "0", "-m", "8", "--json", *options]) == 0
        said.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    expected = generate(str(folder), "Where?", adapter=tmp_path / "adapter", max_tokens=8)
    assert said[1]["text"] == expected.text != said[0]["text"]


def test_lines_of_json(talk: Any) -> None:
    first, note, second = map(
        json.loads,
        talk(f"SAY:{THOUGHT}Paris", "/think auto", "SAY:x", json_lines=True).splitlines(),
    )
    assert (first["text"], first["reasoning"], first["finish"]) == ("Paris", "Let me see", "stop")
    assert note == {"note": "thinking: auto"}
    assert second["usage"]["cached"] > 0


def test_python(talk: Any) -> None:
    arguments = json.dumps({"code": "print(chr(83)+'AY:', 6 * 7)"})
    call = f'<tool_call>\n{{"name": "python", "arguments": {arguments}}}\n</tool_call>'
    out = talk(f"SAY:{call}", "/tools", "/tools python", "SAY:x", python=True)
    assert ">>> print(chr(83)+'AY:', 6 * 7)" in out
    assert "... SAY: 42" in out
    assert "python: on" in out
    assert "python: off" in out
    assert "--tools python" in talk("/tools")


def test_commands(talk: Any, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    out = talk("/system Be brief", "SAY:One", f"/save {file}", "/new", f"/save {tmp_path}/none/x",
               "/temperature 9", "/temperature 0.5", "/tokens 1", "SAY:Two words", "/nonsense",
               "/think maybe", "/help", "/exit", "SAY:never")  # fmt: skip
    assert json.loads(file.read_text()) == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "SAY:One"},
        {"role": "assistant", "content": "One"},
    ]
    for expected in ("system: Be brief", "forgotten", "not saved", "from 0 to 2", "at the limit",
                     "no command /nonsense", "on, off or auto", "/temperature T"):  # fmt: skip
        assert expected in out
    assert "never" not in out


def test_an_error_is_told_and_the_next_turn_works(talk: Any) -> None:
    out = talk("SAY(fails=broken):x", "SAY:fine", f"{'long ' * 5000}", "SAY:again")
    assert out.count("error: ") == 2
    assert "fine" in out
    assert "again" in out


def test_lines_become_turns() -> None:
    lines = iter(["one", "two \\", "three", '"""', "four", "", "five", '"""', "", '"""six"""'])

    def read(prompt: str) -> str:
        for line in lines:
            return line
        raise EOFError

    assert list(turns_of(read)) == ["one", "two \nthree", "four\n\nfive", "six"]


def test_a_model_does_not_write_to_the_terminal() -> None:
    assert harmless("a\x1b[2Jb\x9bc\td\n\u202e") == "a\\x1b[2Jb\\x9bc\td\n\\u202e"


PROGRAM = """
import sys
from optiq.serve.terminal.run import chat
from optiq.serve.terminal.talk import Settings
from tests.lora.models import mixed_folder
from tests.lora.test_adapter import random_adapter
from tests.serve.scripted import ScriptedModel
from tests.serve.servers import tiny_tokenizer
tokenizer = tiny_tokenizer()
chat((ScriptedModel(tokenizer, 4096), tokenizer), settings=Settings())
"""


def test_ctrl_c_stops_the_answer_only(tmp_path: Path) -> None:
    """In a terminal: an answer that would take minutes, Ctrl-C, another answer, Ctrl-D."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "dumb"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
        preexec_fn=_take_terminal,
    )  # fmt: skip
    os.close(theirs)
    seen = ""

    def until(text: str) -> None:
        nonlocal seen
        limit = time.monotonic() + 120
        while text not in seen:
            assert time.monotonic() < limit, seen
            if select.select([ours], [], [], 0.1)[0]:
                seen += os.read(ours, 65536).decode(errors="replace")
        seen = seen.partition(text)[2]

    try:
        until("> ")
        os.write(ours, b"SAY(delay=0.2):" + b"slow " * 200 + b"\n")
        until("slow ")  # echoed
        time.sleep(1)
        os.write(ours, b"\x03")
        until("stopped")
        until("> ")
        os.write(ours, b"SAY:Still here\n")
        until("tokens at")
        until("> ")
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert "SAY:Still here" in (tmp_path / "optiq" / "chat_history").read_text()


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)

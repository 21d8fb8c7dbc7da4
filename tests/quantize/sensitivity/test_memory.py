"""Memory is stated before a measurement, and kept."""

from __future__ import annotations

import gc
from pathlib import Path

import mlx.core as mx
import pytest

from optiq.formats import parse_menu
from optiq.sources import resolve
from tests.quantize.sensitivity.cases import calibration, measure
from tests.tiny import tiny_folder

# Large enough that weights, logits and activations count beside each other.
SHAPES = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 4096}
MENU = parse_menu(["4g64", "8g64"])


def memory(
    folder: Path, method: str, reference: str, lengths: tuple[int, ...] = (200, 160, 120)
) -> tuple[int, int]:
    """(stated, peak) bytes; what earlier tests of the process left behind is not of the peak."""
    gc.collect()
    held = mx.get_active_memory()
    found = measure(
        resolve(str(folder)), menu=MENU, calibration=calibration(*lengths), method=method,
        reference=reference, progress=False,
    )["memory"]  # fmt: skip
    return found["stated"], found["peak"] - held


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_the_peak_is_what_was_stated(tmp_path: Path, kind: str) -> None:
    folder = tiny_folder(tmp_path, kind, **SHAPES)
    for method in ("kl", "fisher", "auto"):
        for reference in ("bf16", "uniform4"):
            stated, peak = memory(folder, method, reference)
            assert peak <= stated <= 1.8 * peak, (method, reference, stated / peak)


def test_the_statement_grows_with_what_takes_memory(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, **SHAPES, tie_word_embeddings=False)
    before = memory(folder, "fisher", "bf16")
    longer = memory(folder, "fisher", "bf16", (450,))
    wider = tiny_folder(tmp_path, **SHAPES | {"intermediate_size": 2048}, name="wider")
    for stated, peak in (longer, memory(wider, "fisher", "bf16")):
        assert peak <= stated <= 1.8 * peak
        assert stated > before[0]


def test_it_is_printed_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("optiq.base.lines.EVERY", 0)  # what is said is printed at once
    folder = tiny_folder(tmp_path)
    measure(resolve(str(folder)), menu=MENU, calibration=calibration(20, 30), method="fisher")
    said = capsys.readouterr().err
    for part in ("process", "weights", "block outputs", "at work", "are available"):
        assert part in said
    assert "memory: at most" in said

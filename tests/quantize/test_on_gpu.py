"""Jobs on a GPU whose kernels raise in the middle, in mx.eval: each goes on with stock MLX, with
one warning, to what it gives without kernels of ours. The GPU is a CPU that says it is one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import optiq
from optiq.evals.engine import Engine, Prompt
from optiq.runtime.loading import load
from tests.ops.test_on_gpu import Extension, on_device, raised_later
from tests.tiny import tiny_folder

KERNELS = (
    "quantized_matmul", "mixed_quantized_matmul", "quantize", "kl_divergence", "compare_logits",
    "quantize_kv", "quantized_attention",
)  # fmt: skip
PROMPTS = [Prompt(list(range(5, 9 + n)), 6) for n in range(3)]
Job = Callable[[Path], Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, and what was made of it."""
    top = tmp_path_factory.mktemp("jobs")
    source = tiny_folder(top, "qwen3", name="source")
    optiq.convert(source, top / "out", tokens=320, held_out_tokens=320, progress=False)
    return top


def answers(top: Path) -> Any:
    return Engine(*load(str(top / "out"))).answers(PROMPTS)


def likelihoods(top: Path) -> Any:
    found = Engine(*load(str(top / "out"))).log_likelihoods(
        [p.tokens for p in PROMPTS], [[[7], [8, 9]]] * 3
    )
    return [value for row in found for value in row]


def compared(top: Path) -> Any:
    found = optiq.compare(top / "source", top / "out", tokens=320, progress=False)
    (measured,) = found.models.values()
    return [measured.kl.mean, measured.kl.max, measured.top1.mean]


def keys_and_values(top: Path) -> Any:
    out = top / f"kv{len(list(top.iterdir()))}.json"
    report = optiq.kv_plan(top / "out", out, samples=1, context=192, progress=False)
    scores = [score.kl for slot in report.scores for score in slot.scores.values()]
    return [*scores, *(point.kl for point in report.points)]


def converted(top: Path) -> Any:
    """Measured, planned, fitted by descent, chosen, exported, compared."""
    out = top / f"again{len(list(top.iterdir()))}"
    optiq.convert(top / "source", out, tokens=320, held_out_tokens=320, progress=False)
    measured = json.loads((out / "optiq/plan.json").read_text())["measured"]
    return [measured["kl"]["mean"]]


JOBS = [(answers, 0.5), (likelihoods, 0.5), (compared, 0.5), (keys_and_values, 0.5)]
JOBS += [(converted, 0.5)]
MORE = [(keys_and_values, 0.9), (converted, 0.1), (converted, 0.95)]


@pytest.mark.parametrize(
    ("job", "after"), [*JOBS, *(pytest.param(*job, marks=pytest.mark.families) for job in MORE)]
)
def test_it_goes_on_with_stock_mlx(
    model: Path, job: Job, after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    extension = Extension()
    on_device(monkeypatch, extension)
    job(model)  # from now on all launches are proven
    # and the blocks, which are loaded again
    monkeypatch.setattr("optiq.nn.accelerate.disagreement", lambda *args: "")
    extension.calls.clear()
    expected = job(model)
    calls = sum(extension.calls[name] for name in KERNELS)
    assert calls > 5
    extension.calls.clear()

    def late(y: Any, *args: Any, **kwargs: Any) -> Any:
        if sum(extension.calls[name] for name in KERNELS) < after * calls:
            return y
        return raised_later(y) if isinstance(y, mx.array) else type(y)(map(raised_later, y))

    extension.faults |= dict.fromkeys(KERNELS, late)
    with pytest.warns(RuntimeWarning, match=r"a graph with them raised .* goes on") as warned:
        found = job(model)
    assert sum("optiq" in str(w.message) for w in warned) == 1
    if all(isinstance(value, float) for value in expected):
        expected = pytest.approx(expected, rel=0.05, abs=1e-4)
    assert found == expected
    extension.calls.clear()
    answers(model)
    assert not any(extension.calls[name] for name in KERNELS)

"""Estimates before work: the phases that they name, and what they count."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from optiq.base.machine import scheduled
from optiq.models.roles import Module, Role, quantizable
from optiq.quantize import convert as convert_module
from optiq.quantize import estimate
from optiq.quantize.convert import convert
from optiq.quantize.rounding.descent import TOGETHER_SWEEPS
from optiq.sources import load, resolve
from tests.tiny import tiny_folder

NOTHING = estimate.Speed(*[0.0] * 9)


def test_the_phases_are_those_of_a_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[estimate.Estimate] = []

    def kept(*args: object, **named: object) -> estimate.Estimate:
        found.append(estimate.estimate(*args, **named))  # type: ignore[arg-type]
        return found[0]

    monkeypatch.setattr(convert_module, "estimate", kept)
    model = tiny_folder(tmp_path, name="model")
    result = convert(model, tmp_path / "out", tokens=320, held_out_tokens=320)
    assert result.expected == found[0].seconds
    assert list(found[0].seconds) == [name for name in result.phases if name != "reading"]
    assert all(seconds > 0 for seconds in found[0].seconds.values())


def test_every_speed_is_found(tmp_path: Path) -> None:
    loaded = load(resolve(str(tiny_folder(tmp_path, "qwen3_moe"))))
    speed = estimate.probe(quantizable(loaded.model), loaded, 4)
    assert all(0 < seconds < 1e-3 for seconds in vars(speed).values())


def module(role: Role, *shape: int) -> Module:
    return Module("model.layers.0.some", role, "unit", shape, 0)


def test_rows_go_together_where_they_do() -> None:
    together = replace(NOTHING, together=1.0)
    steps = 64 * 32 * (64 + 32) * TOGETHER_SWEEPS
    for role, shape, seconds in (
        (Role.ATTENTION, (64, 32), steps),
        (Role.MLP, (32, 64), steps),  # down
        (Role.MLP, (64, 32), 0),  # gate and up: each row alone
        (Role.ATTENTION, (4, 64, 32), 0),  # a weight for each head: also
        (Role.EXPERT, (4, 64, 32), 0),
    ):
        found = estimate._fitting(module(role, *shape), together, 100, True)
        assert found == pytest.approx(seconds)
        assert estimate._fitting(module(role, *shape), together, 100, False) == 0


def test_every_weight_descends() -> None:
    alone = replace(NOTHING, descent=1.0)
    for role, shape, steps in (
        (Role.MLP, (64, 32), 64 * 32 * 32),
        (Role.ATTENTION, (4, 64, 32), 4 * 64 * 32 * 32),
        (Role.EXPERT, (4, 64, 32), 4 * 64 * 32 * 32),
    ):
        assert estimate._fitting(module(role, *shape), alone, 100, True) == steps


def test_few_tokens_take_less_than_their_hessian() -> None:
    alone = replace(NOTHING, descent=1.0)

    def found(tokens: int, together: bool = False) -> float:
        return estimate._fitting(module(Role.ATTENTION, 64, 4096), alone, tokens, together)

    whole = 64 * 4096 * 4096
    assert found(2048) == found(100, together=True) == whole
    assert found(100) < found(1000) < 0.6 * whole


def test_what_a_probe_waited_for_a_processor_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(n) for n in range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    threads = iter([(0.0, 0.0), (1.0, 3.0)] * 100)
    monkeypatch.setattr(estimate, "scheduled", lambda: next(threads))
    assert estimate._fastest(lambda: mx.zeros(1)) == 0.25  # of a second that it took
    threads = iter([(0.0, 0.0)] * 100)  # a system that does not say
    assert estimate._fastest(lambda: mx.zeros(1)) == 1.0


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux")
def test_the_time_that_threads_ran() -> None:
    before, started = scheduled(), time.process_time()
    while time.process_time() - started < 0.05:
        pass
    ran, waited = (b - a for a, b in zip(before, scheduled(), strict=True))
    assert ran > 0.03
    assert waited >= 0

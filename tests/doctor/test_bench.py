"""The tuning search, the ratios, and the commands that use them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from optiq import cli
from optiq.doctor import bench, selftest
from optiq.ops import cases, native

needs_kernels = pytest.mark.skipif(
    native.extension is None, reason=f"no native kernels: {native.reason}"
)


def test_ratio_is_of_rounds_not_of_medians() -> None:
    ours = np.array([1.0, 2.0, 4.0])
    assert bench.ratio(3 * ours, ours) == (3.0, 3.0, 3.0)


def test_rounds_run_the_programs_in_turn() -> None:
    order: list[str] = []
    times = bench.rounds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 1e-9)
    assert "".join(order) == "ab" * 6  # one to warm up
    assert all(len(t) == 5 and (t > 0).all() for t in times.values())


def test_tune_finds_the_best_and_ignores_noise() -> None:
    def cost(knobs: Mapping[str, int]) -> float:
        lanes = {4: 0.99, 8: 1.0, 16: 0.7, 32: 0.9}[knobs.get("lanes", 8)]
        return lanes * {1: 1.0, 2: 0.5 if knobs.get("lanes") == 16 else 2.0}[knobs.get("tiles", 1)]

    said: list[str] = []
    knobs = {"lanes": [4, 8, 16, 32], "tiles": [1, 2]}
    assert bench.tune(knobs, cost, said.append) == {"lanes": 16, "tiles": 2}
    assert len(said) == 6
    assert bench.tune({"lanes": [4]}, cost, said.append) == {}  # 1 % is noise
    assert bench.setting({"lanes": 16, "tiles": 2}) == "lanes=16,tiles=2"


@needs_kernels
def test_the_knobs_are_what_the_plans_accept() -> None:
    assert native.extension is not None
    for name, values in native.extension.tuning_knobs().items():
        for value in values:
            plan = native.extension.plan_quantized_matmul(
                4, 512, [(64, (64, 4))], tune=bench.setting({name: value})
            )
            assert plan["launches"]
    with pytest.raises(ValueError, match="k_lanes=4"):
        native.extension.plan_quantized_matmul(4, 512, [(64, (64, 4))], tune="k_lanes=3")


def test_tune_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if native.extension is not None and not native.on_cpu():
        pytest.skip("this machine has a GPU, where it would take half an hour")
    assert cli.main(["bench", "--tune"]) == 1
    error = capsys.readouterr().err
    assert "Apple GPU" in error or "no native kernels" in error


@needs_kernels
def test_bench_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The programs run for real; their times are made up, so that what is said of them is known."""

    def rounds(programs: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Any]:
        for work in programs.values():
            work()
        ours = np.array([2.0, 1.0, 4.0, 3.0, 5.0]) * 1e-3
        return {"optiq": ours, "stock": ours * [3.0, 4.0, 1.0, 5.0, 2.0]}

    monkeypatch.setattr(bench, "rounds", rounds)
    monkeypatch.setattr(bench, "ROWS", (1, 3))
    monkeypatch.setattr(bench, "SIZES", (256,))
    assert cli.main(["bench", "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)["lines"]
    assert [line["work"] for line in lines] == [
        f"{bits}-bit 256x256, {rows} rows" for bits in (4, 8) for rows in (1, 3)
    ]
    for line in lines:
        found = line["ms"], line["faster"], *line["quartiles"]
        assert found == pytest.approx((3.0, 3.0, 2.0, 4.0))
    assert cli.main(["bench"]) == 0
    assert "8-bit 256x256, 3 rows: 3.000 ms, 3.00 [2.00, 4.00]\n" in capsys.readouterr().out


def test_settings_are_timed_in_a_process_that_says_why_it_cannot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPTIQ_NATIVE", "0")
    with pytest.raises(bench.BenchError, match=r"k_lanes=4 cannot be timed: .*no native kernels"):
        bench.gpu_cost({"k_lanes": 4})


@needs_kernels
def test_selftest_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(selftest, "SIDE", 128)
    monkeypatch.setattr(cases, "QUANTIZED", [c for c in cases.QUANTIZED if c.bits == 4])
    assert cli.main(["doctor", "--selftest"]) == 0
    out = capsys.readouterr().out
    assert "quantized_matmul: 45 cases, passed" in out
    assert "FAILED" not in out
    # A kernel that is wrong is found, shown and ends with 1.
    right = native.extension

    class Wrong:
        def __getattr__(self, name: str) -> object:
            return getattr(right, name)

        def quantized_matmul(self, *args: object, **options: object) -> object:
            return 1.01 * right.quantized_matmul(*args, **options)  # type: ignore[union-attr]

    monkeypatch.setattr(native, "extension", Wrong())
    assert cli.main(["doctor", "--selftest"]) == 1
    out = capsys.readouterr().out
    assert "quantized_matmul: 45 cases, 45 FAILED" in out
    assert "times the bound" in out


def test_selftest_without_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "extension", None)
    monkeypatch.setattr(native, "reason", "built for another mlx")
    assert cli.main(["doctor", "--selftest"]) == 1
    assert "no native kernels to test: built for another mlx" in capsys.readouterr().err

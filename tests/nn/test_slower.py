"""`accelerate` leaves to stock MLX what is slower on a GPU, by a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache

from optiq.nn import parts
from optiq.nn.accelerate import Accelerated, accelerate
from optiq.ops import contest
from optiq.ops.contest import Times, Timings
from tests.nn.test_accelerate import TOKENS, divisible, leaves, same, stock
from tests.ops.test_contest import MACHINE, Clock
from tests.ops.test_on_gpu import Extension, on_device

Cost = Callable[[int], float]  # of a product whose weight has so many bits


@pytest.fixture(autouse=True)
def kernels() -> None:
    """In place of the fixture of this folder."""


class Mac:
    """Starts processes on a GPU where products take what the costs say."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.patch, self.folder, self.clock = patch, folder, Clock()
        self.measured: list[str] = []
        patch.setattr(contest, "clock", self.clock)
        self.stock_product = mx.quantized_matmul

    def process(self, ours: Cost, stock: Cost) -> Extension:
        def spend(seconds: float) -> None:
            self.clock.now += seconds

        def product(*args: Any, **kwargs: Any) -> mx.array:
            spend(stock(kwargs["bits"]))
            return self.stock_product(*args, **kwargs)

        def one(y: Any, *args: Any, **kwargs: Any) -> Any:
            spend(ours(args[6]))
            return y

        def several(y: Any, x: Any, parts: Any, **options: Any) -> Any:
            spend(sum(ours(part[4]) for part in parts))
            return y

        extension = Extension(quantized_matmul=one, mixed_quantized_matmul=several)
        on_device(self.patch, extension)
        self.patch.delenv("OPTIQ_METAL")
        self.patch.setattr(mx, "quantized_matmul", product)
        timings = Timings(self.folder, MACHINE)
        self.patch.setattr(contest, "timings", lambda: timings)
        ask = timings.ask

        def asked(work: str, measured: Callable[[], Times]) -> Times:
            if work not in timings.known:
                self.measured.append(work)
            return ask(work, measured)

        self.patch.setattr(timings, "ask", asked)
        return extension


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mac:
    return Mac(monkeypatch, tmp_path / "cache")


def mixed(tmp_path: Path) -> nn.Module:
    """Three bits in the first block, four elsewhere."""
    model = stock(tmp_path, "llama")

    def width(path: str, module: nn.Module) -> bool | dict[str, int]:
        bits = 3 if "layers.0" in path else 4
        return divisible(path, module) and {"group_size": 64, "bits": bits}

    nn.quantize(model, class_predicate=width)
    return model


def decode(model: nn.Module) -> mx.array:
    cache = make_prompt_cache(model)
    steps = [model(TOKENS[:, :30], cache=cache)]
    steps += [model(TOKENS[:, i : i + 1], cache=cache) for i in range(30, 40)]
    return mx.concatenate(steps, axis=1)


def three_bits_are_slow(bits: int) -> float:
    return 4e-3 if bits == 3 else 1e-3


def even(bits: int) -> float:
    return 2e-3


def check(mac: Mac, report: Accelerated, model: nn.Module, expected: nn.Module) -> None:
    found = leaves(expected).items()
    slow = [p for p, m in found if "layers.0." in p and hasattr(m, "bits")]
    assert len(slow) == 7
    assert {report.left[p] for p in slow} == {"stock MLX is faster here: 2 ms against 4 ms"}
    assert report.left["model.layers.0"].startswith("stock MLX is faster here: ")
    assert set(report.fused) == {"model.layers.1"}
    assert not set(report.swapped) & set(slow)
    assert len(report.swapped) == 8
    assert same(decode(model), decode(expected), "quantized")


def test_the_slower_is_left_also_after_a_restart(mac: Mac, tmp_path: Path) -> None:
    expected = mixed(tmp_path)
    mac.process(three_bits_are_slow, even)
    model = mixed(tmp_path)
    check(mac, accelerate(model), model, expected)
    assert len(mac.measured) == len(set(mac.measured)) > 8
    mac.measured.clear()
    # What it would find now is the reverse.
    extension = mac.process(even, three_bits_are_slow)
    model = mixed(tmp_path)
    check(mac, accelerate(model), model, expected)
    assert not mac.measured
    extension.calls.clear()
    mx.eval(model(TOKENS[:, :1], cache=make_prompt_cache(model)))
    assert extension.calls == {"mixed_quantized_matmul": 4, "quantized_matmul": 1}


def test_a_damaged_file_is_made_anew(mac: Mac, tmp_path: Path) -> None:
    mac.process(three_bits_are_slow, even)
    accelerate(mixed(tmp_path))
    first = list(mac.measured)
    file = contest.timings().path
    text = file.read_text()
    file.write_text(text[: len(text) // 2])
    mac.measured.clear()
    mac.process(three_bits_are_slow, even)
    accelerate(mixed(tmp_path))
    assert mac.measured == first
    assert set(Timings(mac.folder, MACHINE).known) == set(first)


@pytest.mark.parametrize("ours", [4e-3, 1e-3])
def test_all_or_nothing(mac: Mac, tmp_path: Path, ours: float) -> None:
    expected = mixed(tmp_path)
    extension = mac.process(lambda bits: ours, even)
    model = mixed(tmp_path)
    report = accelerate(model)
    wins = ours < even(4)
    assert bool(report.swapped) == bool(report.fused) == wins
    extension.calls.clear()
    assert same(decode(model), decode(expected), "quantized")
    assert bool(extension.calls) == wins


def test_a_block_that_is_slower_as_a_whole_is_left(mac: Mac, tmp_path: Path) -> None:
    """Its products win, each by itself; whatever it does besides costs more than they gain."""
    model = mixed(tmp_path)
    mac.process(lambda bits: 1e-3, even)
    real = parts._swiglu

    def slow(gate: mx.array, up: mx.array) -> mx.array:
        mac.clock.now += 1.0
        return real(gate, up)

    mac.patch.setattr(parts, "_swiglu", slow)
    report = accelerate(model)
    assert not report.fused
    assert len(report.swapped) == 15
    assert all(report.left[f"model.layers.{i}"].startswith("stock MLX is faster") for i in (0, 1))

"""Ours against stock by a clock that only moves when the test says so."""

from __future__ import annotations

import json
import random
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from optiq import ops
from optiq.errors import UsageError
from optiq.formats import Format
from optiq.ops import contest, metal, native
from optiq.ops.contest import Times, Timings, measure

from .test_on_gpu import REAL, Extension, activations, on_device, weight

MACHINE = {"chip": "Apple M9 applegpu_g19s", "system": "26.0", "mlx": "0.32.4", "optiq": "1"}


class Clock:
    """Seconds that pass as work is done."""

    def __init__(self) -> None:
        self.now = 0.0
        self.runs: Counter[str] = Counter()

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: Callable[[], float]) -> contest.Work:
        def run(x: mx.array) -> mx.array:
            self.runs[name] += 1
            self.now += seconds()
            return x * 2

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(contest, "clock", clock)
    return clock


@pytest.mark.parametrize(("ours", "stock"), [(1e-5, 2e-5), (3e-3, 2e-3), (0.5, 0.4), (0.0, 0.0)])
def test_it_measures_one_run(ours: float, stock: float, clock: Clock) -> None:
    works = (clock.work("ours", lambda: ours), clock.work("stock", lambda: stock))
    times = measure(*works, mx.ones((1, 8)))
    assert (times.ours, times.stock) == pytest.approx((1e3 * ours, 1e3 * stock))
    assert bool(times.slower) == (ours > stock)
    assert clock.runs["ours"] == clock.runs["stock"]
    if ours:  # some milliseconds, but for work that takes longer
        assert clock.now <= max(0.1, 20 * (ours + stock))


def test_a_disturbance_changes_nothing(clock: Clock) -> None:
    """One run in ten of the faster one takes a hundred times as long."""
    noise = random.Random(1)
    for name, ours, stock in (("ours", 1e-3, 1.1e-3), ("stock", 1.1e-3, 1e-3)):
        shorter = min(ours, stock)

        def late(seconds: float, shorter: float = shorter) -> float:
            return seconds * (100 if seconds == shorter and noise.random() < 0.1 else 1)

        times = measure(
            clock.work("ours", lambda: late(ours)),  # noqa: B023
            clock.work("stock", lambda: late(stock)),  # noqa: B023
            mx.ones((1, 8)),
        )
        assert bool(times.slower) == (name == "stock")


def test_runs_wait_for_each_other(clock: Clock) -> None:
    """What is timed is a chain: each x depends on the result before it."""
    seen = []

    def work(x: mx.array) -> mx.array:
        seen.append(x)
        clock.now += 1e-3
        return x + mx.inf

    measure(work, work, mx.ones((1, 8)))
    assert sum(mx.isnan(x).any().item() for x in seen) == len(seen) - 12  # the first of each chain


def answers(folder: Path, machine: Any = MACHINE) -> Timings:
    return Timings(folder, machine)


def never() -> Times:
    raise AssertionError("this is known")


def test_answers_survive_a_restart(tmp_path: Path) -> None:
    first = answers(tmp_path / "new")
    assert first.ask("a product", lambda: Times(1.5, 2.5)) == Times(1.5, 2.5)
    again = answers(tmp_path / "new")
    assert again.ask("a product", never) == Times(1.5, 2.5)
    assert again.path.name == "metal-Apple_M9_applegpu_g19s-26.0-0.32.4-1.json"
    assert [p.name for p in (tmp_path / "new").iterdir()] == [again.path.name]


@pytest.mark.parametrize("part", MACHINE)
def test_another_machine_asks_anew(tmp_path: Path, part: str) -> None:
    answers(tmp_path).ask("a product", lambda: Times(1, 2))
    other = answers(tmp_path, MACHINE | {part: "other"})
    assert other.known == {}
    other.ask("a product", lambda: Times(3, 2))
    assert answers(tmp_path).known == {"a product": Times(1, 2)}


def test_a_file_of_another_machine_under_this_name_is_not_used(tmp_path: Path) -> None:
    answers(tmp_path, MACHINE | {"chip": "a b"}).ask("a product", lambda: Times(1, 2))
    same_name = answers(tmp_path, MACHINE | {"chip": "a_b"})
    assert same_name.path.exists()
    assert same_name.known == {}


def test_two_processes_keep_the_answers_of_both(tmp_path: Path) -> None:
    one, two = answers(tmp_path), answers(tmp_path)
    one.ask("a", lambda: Times(1, 2))
    two.ask("b", lambda: Times(3, 4))
    assert answers(tmp_path).known == {"a": Times(1, 2), "b": Times(3, 4)}


def damages() -> list[bytes]:
    whole = {"machine": MACHINE, "milliseconds": {"a": [1, 2]}}
    texts = [b"", b"\xff\xfe", b"[" * 100_000, b"[]", b"null", json.dumps(whole).encode()[:-9]]
    for pairs in ([1], {"a": [1]}, {"a": [1, "x"]}, {"a": [-1, 2]}, {"a": None}, {"a": [1, 2, 3]}):
        texts.append(json.dumps(whole | {"milliseconds": pairs}).encode())
    texts.append(json.dumps(whole).replace("[1, 2]", "[NaN, 2]").encode())
    return texts


@pytest.mark.parametrize("damage", range(len(damages())))
def test_a_damaged_file_is_made_anew(tmp_path: Path, damage: int) -> None:
    path = answers(tmp_path).path
    tmp_path.mkdir(exist_ok=True)
    path.write_bytes(damages()[damage])
    timings = answers(tmp_path)
    assert timings.known == {}
    timings.ask("a", lambda: Times(5, 6))
    assert answers(tmp_path).known == {"a": Times(5, 6)}


def test_where_nothing_can_be_written_it_is_asked_once_a_process(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    timings = answers(tmp_path / "file" / "folder")
    assert timings.ask("a", lambda: Times(1, 2)) == Times(1, 2)
    assert timings.ask("a", never) == Times(1, 2)


class Mac:
    """A Metal GPU on which ours and stock take the times of a table, in a process that starts."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, clock: Clock) -> None:
        self.patch, self.folder, self.clock = patch, folder, clock
        self.ours: dict[int, float] = {}  # by rows of x
        self.stock = 1e-3
        self.timed = 0
        stock = mx.quantized_matmul

        def product(*args: Any, **kwargs: Any) -> mx.array:
            clock.now += self.stock
            return stock(*args, **kwargs)

        patch.setattr(mx, "quantized_matmul", product)
        real = contest.measure

        def counted(*args: Any) -> Times:
            self.timed += 1
            return real(*args)

        patch.setattr(contest, "measure", counted)
        self.start()

    def start(self) -> None:
        def spent(y: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            self.clock.now += self.ours.get(x.size // x.shape[-1], 1e-4)
            return y

        self.extension = Extension(quantized_matmul=spent)
        on_device(self.patch, self.extension)
        self.patch.delenv("OPTIQ_METAL")
        timings = Timings(self.folder, MACHINE)
        self.patch.setattr(contest, "timings", lambda: timings)

    def runs_ours(self, x: mx.array, w: ops.AffineWeight) -> bool:
        ops.quantized_matmul(x, *w[:3], group_size=w.group_size, bits=w.bits)
        self.extension.calls.clear()
        y = ops.quantized_matmul(x, *w[:3], group_size=w.group_size, bits=w.bits)
        dense = mx.dequantize(*w[:3], w.group_size, w.bits)
        assert mx.allclose(y, x @ dense.T, rtol=1e-2, atol=1e-2)
        return self.extension.calls == {"quantized_matmul": 1}


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock: Clock) -> Mac:
    return Mac(monkeypatch, tmp_path, clock)


ROWS = (1, 2, 5, 16, 17, 40, 100)


def test_stock_runs_wherever_ours_is_slower(mac: Mac) -> None:
    """Also after a restart, without being timed again."""
    noise = random.Random(7)
    weights = [weight(), weight(96, 192, 3)]
    cases = [(activations(rows, w.scales.shape[1] * 64), w) for w in weights for rows in ROWS]
    # Samples of many rows have a power of two of them.
    mac.ours = {rows: noise.choice([2e-4, 5e-3]) for rows in (1, 2, 5, 16, 32, 64, 128)}
    expected = [mac.ours[sampled(len(x))] < mac.stock for x, _ in cases]
    assert {True, False} <= set(expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # slower is not a fault
        assert [mac.runs_ours(x, w) for x, w in cases] == expected
        assert mac.timed == len(cases)
        mac.start()
        mac.ours = dict.fromkeys(mac.ours, 1.0)  # what it would find now
        assert [mac.runs_ours(x, w) for x, w in cases] == expected
    assert mac.timed == len(cases)


def sampled(rows: int) -> int:
    return rows if rows <= 16 else 1 << (rows - 1).bit_length()


def test_rows_of_one_size_are_timed_once(mac: Mac) -> None:
    for rows in (33, 64, 40):
        mac.runs_ours(activations(rows, 128), weight())
    assert mac.timed == 1
    for rows in (129, 300, 2000):
        mac.runs_ours(activations(rows, 128), weight())
    assert mac.timed == 2


def test_what_is_wrong_at_its_size_is_left_though_it_is_faster(mac: Mac) -> None:
    right = mac.extension.faults["quantized_matmul"]

    def wrong(y: mx.array, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        y = right(y, x, *args, **kwargs)
        return y.at[-1, -1].add(1) if y.shape == (3, 640) else y  # not the case of its trial

    mac.extension.faults["quantized_matmul"] = wrong
    with pytest.warns(RuntimeWarning, match="3 x 128 x 640: it differs from stock MLX") as warned:
        assert not mac.runs_ours(activations(3, 128), weight(640))
    assert len(warned) == 1
    assert mac.runs_ours(activations(3, 128), weight(320))


@pytest.mark.parametrize("value", ["1", "0"])
def test_it_can_be_told(mac: Mac, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mac.ours = {1: 1.0}
    monkeypatch.setenv("OPTIQ_METAL", value)
    assert mac.runs_ours(activations(1, 128), weight()) == (value == "1")
    assert mac.timed == 0


def test_another_word_is_an_error(mac: Mac, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTIQ_METAL", "fast")
    with pytest.raises(UsageError, match="OPTIQ_METAL='fast' must be 0, 1 or auto; unset it"):
        ops.quantized_matmul(activations(1, 128), *weight()[:3])


def test_attention_is_timed_for_each_power_of_two_of_keys(mac: Mac) -> None:
    form = Format("affine", 4, 32)
    q = activations(1, 2, 1, 64)
    for keys in (9, 200, 256, 300, 500):
        kv = REAL.quantize_kv(activations(1, 1, keys, 64), 32, 4)
        ops.quantized_attention(q, kv, kv, k_format=form, v_format=form, scale=0.1)
    assert mac.timed == 2
    assert [w.rpartition(", ")[2] for w in contest.timings().known] == [
        "1 x 256 keys",
        "1 x 512 keys",
    ]


def test_weights_that_are_traced_are_not_timed(mac: Mac) -> None:
    w, x = weight(), activations(1, 128)

    def total(scales: mx.array) -> mx.array:
        return ops.quantized_matmul(x, w.codes, scales, w.biases).sum()

    mx.grad(total)(w.scales)
    assert mac.timed == 0


def test_on_the_cpu_nothing_is_timed(mac: Mac, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "device", lambda: "cpu")
    assert metal.enabled() is None
    ops.quantized_matmul(activations(1, 128), *weight()[:3])
    assert mac.timed == 0

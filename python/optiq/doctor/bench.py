"""Times of the quantized products against stock MLX on this machine, and the tuning of the GPU.

Programs that are compared run in turn, once each per round, so that a disturbance meets all of
them; what is reported is the median of the ratios within a round, with the quartiles.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..base.progress import Progress
from ..errors import OptiqError
from ..ops import native

SIZES = (2048, 4096)
ROWS = (1, 4, 8, 16, 128)
BITS = (4, 8)
SECONDS = 1.0  # for each line

Work = Callable[[], object]
Times = NDArray[np.float64]


class BenchError(OptiqError):
    """There is nothing to measure."""


@dataclass(frozen=True)
class Timing:
    """A product of optiq's and the same of stock MLX's: milliseconds, and times as fast."""

    work: str
    ms: float
    faster: float
    quartiles: tuple[float, float]


def rounds(programs: Mapping[str, Work], seconds: float, pause: float = 0) -> dict[str, Times]:
    """Seconds of each program in each round, after one to warm up; 5 to 100 rounds.

    With a `pause` in seconds, each program waits until the threads of the one before it have gone
    to sleep, and then runs once untimed.
    """
    first = sum(elapsed(work) for work in programs.values())
    count = int(min(100, max(5, seconds / first)))
    times = {name: np.empty(count) for name in programs}
    for i in range(count):
        for name, work in programs.items():
            if pause:
                time.sleep(pause)
                work()
            times[name][i] = elapsed(work)
    return times


def elapsed(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(theirs: Times, ours: Times) -> tuple[float, float, float]:
    """Quartiles of how many times as fast ours is, round by round."""
    low, middle, high = np.quantile(theirs / ours, (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)


def measure(rows: Sequence[int], sizes: Sequence[int]) -> list[Timing]:
    """Every product on the default device. Raises BenchError without native kernels."""
    if native.extension is None:
        raise BenchError(f"no native kernels to time: {native.reason}")
    found = []
    with Progress(len(sizes) * len(BITS) * len(rows), "timing products") as bar:
        for size, bits, m in product(sizes, BITS, rows):
            found.append(_product(size, bits, m))
            bar.step(note=found[-1].work)
    return found


def _product(size: int, bits: int, rows: int) -> Timing:
    extension = native.extension
    assert extension is not None
    dtype = mx.float32 if native.on_cpu() else mx.float16  # 16 bits take stock seconds on CPUs
    weight = mx.quantize(mx.random.normal((size, size)).astype(dtype), 64, bits)
    x = mx.random.normal((rows, size)).astype(dtype)
    mx.eval(x, weight)

    def ours() -> None:
        mx.eval(extension.quantized_matmul(x, *weight, True, 64, bits))

    def stock() -> None:
        mx.eval(mx.quantized_matmul(x, *weight, group_size=64, bits=bits))

    times = rounds({"optiq": ours, "stock": stock}, SECONDS)
    low, middle, high = ratio(times["stock"], times["optiq"])
    name = f"{bits}-bit {size}x{size}, {rows} rows"
    return Timing(name, float(np.median(times["optiq"]) * 1e3), middle, (low, high))


def tune(
    knobs: Mapping[str, Sequence[int]],
    cost: Callable[[Mapping[str, int]], float],
    say: Callable[[str], None] = print,
) -> dict[str, int]:
    """The settings that cost least, one knob after the other, each at the best of those before.

    `cost` takes the settings that differ from the table's; the empty ones are the table itself.
    A setting is taken only if it is more than 2 % better, so that noise changes nothing.
    """
    best: dict[str, int] = {}
    lowest = cost(best)
    for name, values in knobs.items():
        for value in values:
            tried = {**best, name: value}
            got = cost(tried)
            say(f"{setting(tried)}: {got / lowest:.3f} of the best so far")
            if got < 0.98 * lowest:
                best, lowest = tried, got
    return best


def setting(knobs: Mapping[str, int]) -> str:
    """As OPTIQ_TUNE takes it."""
    return ",".join(f"{name}={value}" for name, value in knobs.items())


def gpu_cost(knobs: Mapping[str, int]) -> float:
    """Geometric mean of the times of 1 to 16 rows with these settings, in a process of its own,
    since they are read once."""
    code = (
        "import json; from optiq.doctor import bench;"
        "print(json.dumps([t.ms for t in bench.measure((1, 2, 4, 8, 16), bench.SIZES)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"OPTIQ_TUNE": setting(knobs)},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        why = done.stderr.strip().rpartition("\n")[2][-300:]
        raise BenchError(f"{setting(knobs)} cannot be timed: {why}")
    return float(np.exp(np.mean(np.log(json.loads(done.stdout)))))

"""Our Metal kernels against stock MLX: the same work on the same made-up input.

Whether a kernel is faster depends on the chip, and no chip of Apple's has timed ours before they
reach yours. So both are asked there, on the first use of a shape: they must agree, and then each
runs a few times in turn, for some milliseconds. The answers are kept in a file for each chip,
system and release (`Timings`), so that this happens once.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..base.files import cache_folder, write_json
from ..errors import ExportError
from ..version import __version__

# Both sides accumulate products in float32, from activations of at least 15 bits; of the largest
# value that is computed. And a few roundings of the result.
TOLERANCE = 2.0**-11
ROUNDINGS = 8

CHAIN = 4e-3  # seconds of work that are evaluated together
MOST = 32  # the same in runs, at most
ROUNDS = 5

Clock = Callable[[], float]
Results = mx.array | Sequence[mx.array]
Work = Callable[[mx.array], Results]

clock: Clock = time.perf_counter


@dataclass(frozen=True)
class Sample:
    """Work of one size: its name, the shape of its x, and the arrays that it reads beside x."""

    name: str
    shape: tuple[int, ...]
    reads: tuple[mx.array, ...] = ()

    def x(self, dtype: mx.Dtype) -> mx.array:
        return mx.random.normal(self.shape, key=mx.random.key(0)).astype(dtype)


@dataclass(frozen=True)
class Times:
    """Milliseconds of the same work."""

    ours: float
    stock: float

    @property
    def slower(self) -> str:
        """Why ours is left, or nothing."""
        if self.ours <= self.stock:
            return ""
        return f"stock MLX is faster here: {self.stock:.4g} ms against {self.ours:.4g} ms"


def difference(got: Results, expected: Results) -> str:
    """How far two results are apart, as a part of the largest value, where that is too far."""
    found = (error_of(a, b, b) for a, b in zip(_all(got), _all(expected), strict=True))
    return next((error for error in found if error), "")


def error_of(got: mx.array, expected: mx.array, computed: mx.array) -> str:
    """The same of two arrays, as a part of what was `computed` of the expected one."""
    eps = mx.finfo(expected.dtype).eps
    got, expected, computed = (a.astype(mx.float32) for a in (got, expected, computed))
    error, largest, scale = (mx.abs(a).max() for a in (got - expected, expected, computed))
    if (error <= TOLERANCE * scale + ROUNDINGS * eps * largest).item():  # not where it is NaN
        return ""
    return f"{(error / scale).item():.1e}"


def measure(ours: Work, stock: Work, x: mx.array) -> Times:
    """The shortest of several runs of each, in turn: a disturbance only makes a run longer."""
    works = ours, stock
    once = [_seconds(work, x, 1) for work in works]  # also warms up
    count = max(1, min(MOST, int(CHAIN / max(min(once), CHAIN / MOST))))
    best = [math.inf, math.inf]
    for _ in range(ROUNDS):
        for i, work in enumerate(works):
            best[i] = min(best[i], _seconds(work, x, count) / count)
    return Times(*(1e3 * seconds for seconds in best))


def _seconds(work: Work, x: mx.array, count: int) -> float:
    """Of runs that wait for each other, as the layers of a model do."""
    mx.eval(x)
    outs: list[mx.array] = []
    start = clock()
    for _ in range(count):
        out = _all(work(x))
        outs += out
        x = x + 0 * out[0][..., :1].astype(x.dtype)
    mx.eval(x, outs)
    return clock() - start


def _all(results: Results) -> Sequence[mx.array]:
    return [results] if isinstance(results, mx.array) else results


class Timings:
    """What was timed on one machine, by the name of the work; in a file, whole or not at all.

    A file that is damaged counts as empty and is replaced by the next answer. Where the folder
    cannot be written, the answers last as long as the process.
    """

    def __init__(self, folder: Path, machine: Mapping[str, str]) -> None:
        name = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", value) for value in machine.values())
        self.machine = dict(machine)
        self.path = folder / f"metal-{name[:180]}.json"
        self.known = self._read()

    def ask(self, work: str, measured: Callable[[], Times]) -> Times:
        """The times of this work: known, or measured now and kept."""
        if work not in self.known:
            times = measured()
            self.known = {**self._read(), **self.known, work: times}  # of other processes as well
            with suppress(ExportError):
                write_json(
                    self.path,
                    {
                        "machine": self.machine,
                        "milliseconds": {w: [t.ours, t.stock] for w, t in self.known.items()},
                    },
                )
        return self.known[work]

    def _read(self) -> dict[str, Times]:
        try:
            held = json.loads(self.path.read_text(encoding="utf-8"))
            if held["machine"] != self.machine:
                return {}
            return {str(w): _times(pair) for w, pair in held["milliseconds"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return {}


def _times(pair: Any) -> Times:
    ours, stock = pair
    times = Times(float(ours), float(stock))
    if not (0 <= times.ours < math.inf and 0 <= times.stock < math.inf):
        raise ValueError(f"{pair} are not times")
    return times


def machine() -> dict[str, str]:
    """What the times depend on: the chip, the system, the releases, and changed tile shapes."""
    info = mx.device_info(mx.gpu)
    tune = os.environ.get("OPTIQ_TUNE")
    return {
        "chip": f"{info.get('device_name', 'unknown')} {info.get('architecture', '')}".strip(),
        "system": platform.mac_ver()[0] or platform.release(),
        "mlx": str(mx.__version__),  # type: ignore[attr-defined]
        "optiq": __version__,
        **({"tune": tune} if tune else {}),
    }


@cache
def timings() -> Timings:
    """Of this machine, read once."""
    return Timings(cache_folder(), machine())

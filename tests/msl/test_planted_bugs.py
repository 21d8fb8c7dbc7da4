"""Every planted bug is reported with buffer, byte, thread and line; correct kernels pass."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from .emulator import Counters, InOut, KernelError, Module, Out, needs_emulator

pytestmark = needs_emulator

SOURCE = Path(__file__).with_name("planted.metal")
X = np.arange(64, dtype=np.float32)


class Bug(NamedTuple):
    """What the checked build says, and what the fast one does; None: it cannot know."""

    checked: str
    fast: str | None
    launch: dict[str, Any] = {}  # noqa: RUF012 - never changed


PAST = r"out-of-bounds access at byte 256 of buffer\(0\), which has 256 bytes"
RACE = "with no barrier between that orders threadgroup memory"
BUGS = {
    "read_past_end": Bug(
        r"out-of-bounds load of 4 bytes at byte 256 of buffer\(0\), which has 256 bytes.*"
        r"thread 63 \(63, 0, 0\) of threadgroup \(0, 0, 0\), simdgroup 1 lane 31",
        PAST + r".*simdgroup 1 lane 31",
    ),
    "write_past_end": Bug(
        r"out-of-bounds store of 4 bytes at byte 256 of buffer\(1\).*thread 61 ",
        r"out-of-bounds access at byte 256 of buffer\(1\).*thread 61 ",
    ),
    "vector_past_end": Bug(
        r"out-of-bounds load of (4|16) bytes at byte 256 of buffer\(0\).*thread 60 ", PAST
    ),
    "before_start": Bug(
        r"out-of-bounds load of 4 bytes at byte -4 of buffer\(0\).*thread 0 ", None
    ),
    "far_away": Bug(r"in no buffer", r"in no buffer"),
    "local_array": Bug(
        r"index 4 out of bounds of an array 'thread float\[4\]'.*thread 48 ",
        r"index 4 out of bounds of an array 'thread float\[4\]'.*thread 48 ",
    ),
    "threadgroup_array": Bug(
        r"index 64 out of bounds of an array 'threadgroup float\[64\]'.*thread 63 ",
        r"index 64 out of bounds of an array 'threadgroup float\[64\]'.*thread 63 ",
    ),
    "threadgroup_argument": Bug(
        r"out-of-bounds store at byte 252 of the argument \[\[threadgroup\(0\)\]\], which has 252 "
        r"bytes.*thread 63 ",
        None,
        {"threadgroup_memory": {0: 252}},
    ),
    "unbound": Bug(r"(load|access).* buffer\(7\), which is not bound", None),
    "misaligned": Bug(r"misaligned load of (16|8) bytes", None),
    "write_to_input": Bug(r"store to byte 0 of buffer\(0\), which is an input.*thread 0 ", None),
    "unwritten_output": Bug(r"load of unwritten bytes at byte 0 of buffer\(1\)", None),
    "unwritten_threadgroup": Bug(
        r"load of unwritten bytes at byte 252 of threadgroup variable `a`.*thread 0 ", None
    ),
    "no_barrier": Bug(rf"race: (load|store) of byte \d+ of threadgroup variable `a`.*{RACE}", None),
    "no_barrier_before_reuse": Bug(
        rf"race: (store|load) of byte \d+ of threadgroup variable `a`.*{RACE}", None
    ),
    "both_write": Bug(
        rf"race: store of byte 0 of threadgroup variable `a`.*by thread 0 {RACE}.*thread 1 ",
        None,
    ),
    "simdgroup_barrier_is_not_enough": Bug(
        rf"race: (load|store) of byte \d+ of threadgroup variable `a`.*{RACE}", None
    ),
    "wrong_flags": Bug(rf"race: load of byte \d+ of threadgroup variable `a`.*{RACE}", None),
    "hint_is_no_barrier": Bug(rf"race: load of byte \d+ of threadgroup variable `a`.*{RACE}", None),
    "device_memory_out_of_order": Bug(
        r"race: load of byte \d+ of buffer\(1\), written by thread \d+ with no barrier between "
        r"that orders device memory",
        None,
    ),
    "between_threadgroups": Bug(
        r"race: store of byte 0 of buffer\(1\), written by threadgroup 0 .*threadgroup \(1, 0, 0",
        None,
        {"grid": (2, 1, 1)},
    ),
    "beside_an_atomic": Bug(r"race: .* of byte 0 of buffer\(2\)", None),
    "barrier_in_branch": Bug(
        r"returned while 40 others wait at threadgroup_barrier",
        r"returned while 40 others wait at threadgroup_barrier",
    ),
    "two_barriers": Bug(r"divergent barriers: some", r"divergent barriers: some"),
    "return_before_barrier": Bug(
        r"returned while 50 others wait at threadgroup_barrier",
        r"returned while 50 others wait at threadgroup_barrier",
    ),
    "two_simdgroup_functions": Bug(
        r"simdgroup divergence: lanes of one simdgroup meet in different operations",
        r"simdgroup divergence: lanes of one simdgroup meet in different operations",
    ),
    "part_of_a_simdgroup": Bug(
        r"no thread can go on.*simdgroup 0 lanes 0 to 19 wait in a simdgroup sum.*"
        r"lanes 20 to 31 wait in threadgroup_barrier",
        r"no thread can go on.*simdgroup 0 lanes 0 to 19 wait in a simdgroup sum",
    ),
    "half_a_matrix": Bug(
        r"simdgroup_multiply_accumulate by 16 of 32 lanes",
        r"simdgroup_multiply_accumulate by 16 of 32 lanes",
    ),
    "too_much_threadgroup_memory": Bug(
        r"threadgroup memory over 32 KiB: 32896 bytes with threadgroup variable `b`",
        r"threadgroup memory over 32 KiB: 32896 bytes with threadgroup variable `b`",
    ),
    "too_much_private_memory": Bug(r"stack overflow: .* private", r"stack overflow: .* private"),
    "division_by_zero": Bug(r"integer division by zero", r"integer division by zero"),
}
# The line that a fault of the whole kernel names is not a fixed one.
NO_LINE = {"too_much_threadgroup_memory", "too_much_private_memory"}


@pytest.fixture(scope="module")
def checked() -> Module:
    return Module(SOURCE)


@pytest.fixture(scope="module")
def fast() -> Module:
    return Module(SOURCE, mode="fast")


def run(module: Module, name: str, **launch: Any) -> tuple[np.ndarray, Counters]:
    buffers = {0: X, 1: Out(64, np.float32)}
    if name == "beside_an_atomic":
        buffers[2] = InOut(np.zeros(1, np.uint32))
    if name == "threadgroup_argument":
        launch = {"threadgroup_memory": {0: 256}} | launch
    outputs, counters = module(
        name, buffers, **({"grid": (1, 1, 1), "threads": (64, 1, 1)} | launch)
    )
    return outputs[0], counters


def lines_of(name: str) -> list[str]:
    """The lines that a report may name: a race has two ends."""
    lines = SOURCE.read_text().splitlines()
    return [f"planted.metal:{n}" for n, s in enumerate(lines, 1) if s.endswith(f"// bug {name}")]


def report(module: Module, name: str, **launch: Any) -> str:
    with pytest.raises(KernelError) as caught:
        run(module, name, **launch)
    message = str(caught.value)
    if name not in NO_LINE:
        assert any(re.search(rf"{line}\b", message) for line in lines_of(name)), message
    assert message.startswith(f"{name}: ")
    return message


def test_every_marked_bug_is_tested() -> None:
    assert set(re.findall(r"// bug (\w+)$", SOURCE.read_text(), re.MULTILINE)) == set(BUGS)
    assert len(BUGS) >= 20


@pytest.mark.parametrize("name", BUGS)
def test_the_checked_build_reports(checked: Module, name: str) -> None:
    message = report(checked, name, **BUGS[name].launch)
    assert re.search(BUGS[name].checked, message, re.DOTALL), message


@pytest.mark.parametrize("name", [name for name, bug in BUGS.items() if bug.fast])
def test_the_fast_build_reports(fast: Module, name: str) -> None:
    message = report(fast, name, **BUGS[name].launch)
    assert re.search(BUGS[name].fast or "", message, re.DOTALL), message


def test_an_error_leaves_the_module_usable(checked: Module) -> None:
    for name in ("read_past_end", "barrier_in_branch", "no_barrier", "division_by_zero"):
        report(checked, name)
        y, _ = run(checked, "reduction")
        assert (y == X.sum()).all()


# Poison, where there is no report: the result shows it.
def test_an_unwritten_local_variable_shows(checked: Module) -> None:
    y, _ = run(checked, "unwritten_local")
    assert not np.isin(y, np.cumsum(X[:4])).any()


@pytest.mark.parametrize("mode", ["checked", "fast"])
def test_a_shuffle_from_an_inactive_lane_shows(mode: str, request: pytest.FixtureRequest) -> None:
    y, _ = run(request.getfixturevalue(mode), "inactive_lane")
    assert np.isnan(y[34:48]).all()  # lanes 2 to 15 ask 18 to 31, which have returned
    assert (y[:32] == X[np.arange(32) ^ 16]).all()


def test_a_shuffled_schedule_shows_a_race(fast: Module) -> None:
    orders = {run(fast, "no_barrier_before_reuse", shuffle=seed)[0].tobytes() for seed in range(4)}
    assert len(orders) > 1
    orders = {run(fast, "tiles", shuffle=seed)[0].tobytes() for seed in range(4)}
    assert len(orders) == 1


def test_divergence_can_be_allowed(checked: Module) -> None:
    y, _ = run(checked, "part_of_a_simdgroup", allow_divergence=True)
    assert (y[:20] == X[:20].sum()).all()
    assert (y[20:32] == X[20:32]).all()


def tiled(x: np.ndarray) -> np.ndarray:
    return sum((x * factor for factor in (1, 2, 3, 4)), np.zeros(64, np.float32))[::-1]


CORRECT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "reduction": lambda x: np.full(64, x.sum()),
    "within_a_simdgroup": lambda x: x[np.arange(64) ^ 1],
    "same_value": lambda x: np.full(64, x[0]),
    "tiles": tiled,
    "through_device_memory": lambda x: x[np.arange(64) ^ 1],
    "return_without_barrier": lambda x: np.r_[np.full(32, 32), np.full(18, 18), np.zeros(14)],
    "zeroed": lambda x: x,
}


@pytest.mark.parametrize("shuffle", [False, 1, 2])
@pytest.mark.parametrize("name", CORRECT)
def test_correct_kernels_pass(checked: Module, fast: Module, name: str, shuffle: int) -> None:
    for module in (checked, fast):
        y, _ = run(module, name, shuffle=shuffle)
        np.testing.assert_array_equal(y, CORRECT[name](X))


def test_a_histogram_of_atomics_passes(checked: Module) -> None:
    buffers = {0: X, 1: InOut(np.zeros(4, np.uint32))}
    (bins,), _ = checked("histogram", buffers, (1, 1, 1), (64, 1, 1), shuffle=5)
    assert bins.tolist() == [16] * 4

"""What ranks put together natively, here in threads: the sums of NumPy, the same on all of them."""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from optiq.ops import native

pytestmark = pytest.mark.skipif(native.extension is None, reason=f"no kernels: {native.reason}")
ext: Any = native.extension


def ranks(size: int) -> list[Any]:
    pairs = [socket.socketpair() for _ in range(size - 1)]
    made = [ext.Ranks(0, size, [ours.fileno() for ours, _ in pairs])]
    made += [ext.Ranks(n, size, [pair[1].fileno()]) for n, pair in enumerate(pairs, start=1)]
    for pair in pairs:  # they have their own
        for end in pair:
            end.close()
    return made


def each(work: Callable[[Any, Any], mx.array], parts: list[Any]) -> list[np.ndarray[Any, Any]]:
    """What each rank makes of its part."""

    def one(rank: Any, part: Any) -> np.ndarray[Any, Any]:
        with mx.stream(mx.new_stream(mx.cpu)):
            return np.array(work(rank, mx.array(part)))

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(one, ranks(len(parts)), parts))


@pytest.mark.parametrize("shape", [(1,), (2, 3, 40), (600, 2048)])  # more than a socket holds
@pytest.mark.parametrize("size", [2, 3])
def test_a_sum_is_made_in_the_order_of_the_ranks(size: int, shape: tuple[int, ...]) -> None:
    parts = list(np.random.default_rng(0).standard_normal((size, *shape), np.float32))
    for found in each(lambda rank, x: rank.total(x), parts):
        np.testing.assert_array_equal(found, sum(parts[1:], start=parts[0]))


def test_a_sum_is_of_what_an_array_shows() -> None:
    parts = list(np.random.default_rng(0).standard_normal((2, 6, 9), np.float32))
    for found in each(lambda rank, x: rank.total(x.T[1:]), parts):
        np.testing.assert_array_equal(found, (parts[0] + parts[1]).T[1:])


def test_rows_lie_side_by_side() -> None:
    parts = list(np.random.default_rng(0).standard_normal((3, 2, 5, 7), np.float32))
    for found in each(lambda rank, x: rank.side_by_side(x), parts):
        np.testing.assert_array_equal(found, np.concatenate(parts, -1))


def test_a_connection_that_ends_is_an_error() -> None:
    first, second = ranks(2)
    del second
    with pytest.raises(RuntimeError, match="the connection to another rank"):
        mx.eval(first.total(mx.zeros(4)))


def test_what_does_not_fit_is_refused() -> None:
    first, _second = ranks(2)
    with pytest.raises(ValueError, match="must be float32"):
        first.total(mx.zeros(4, mx.float16))
    with pytest.raises(ValueError, match="must be float32"):
        first.side_by_side(mx.zeros((2, 0)))
    with pytest.raises(ValueError, match="rank 2 of 2"):
        ext.Ranks(2, 2, [0])
    with pytest.raises(RuntimeError, match="cannot be used"):
        ext.Ranks(1, 2, [-1])

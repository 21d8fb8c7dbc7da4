"""Models that ranks share give what whole ones give. The ranks are threads here; processes are in
tests/serve/test_ranks.py."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from optiq.errors import DistributedError
from optiq.nn import check, sharded
from optiq.nn.accelerate import accelerate
from optiq.nn.shard import Span, shard, shares
from tests.nn.test_accelerate import TOKENS, stock

SIZES = {"llama": 2, "qwen2": 2, "qwen3": 2, "gemma3_text": 2, "phi3": 2, "mistral": 2, "wide": 3}
WIDE = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}
BITS = (4, 3, 8, 5, 2, 6)


class Meeting:
    """Of ranks in threads: natively over sockets, and by a barrier without the native part."""

    def __init__(self, size: int) -> None:
        self.size = size
        pairs = [socket.socketpair() for _ in range(size - 1)]
        self.connections = [dict(enumerate((ours for ours, _ in pairs), start=1))]
        self.connections += [{0: theirs} for _, theirs in pairs]
        self._barrier = threading.Barrier(size, timeout=60)
        self._brought: list[Any] = [None] * size

    def exchange(self, rank: int, x: mx.array) -> list[np.ndarray[Any, Any]]:
        self._brought[rank] = np.array(x)
        self._barrier.wait()
        everything = list(self._brought)
        self._barrier.wait()
        return everything


class Rank:
    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.size, self._meeting = rank, meeting.size, meeting

    def same(self, job: dict[str, Any]) -> None:
        pass

    def connections(self) -> dict[int, socket.socket]:
        return self._meeting.connections[self.rank]

    def total(self, x: mx.array) -> mx.array:
        return mx.array(sum(self._meeting.exchange(self.rank, x)))

    def side_by_side(self, x: mx.array) -> mx.array:
        return mx.array(np.concatenate(self._meeting.exchange(self.rank, x), axis=-1))


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that has much work in flight waits until some of it is over, MLX counts that of all
    threads together, and theirs may wait for this one. So nothing is in flight for long."""

    def evaluated(method: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def call(*args: Any) -> mx.array:
            found = method(*args)
            mx.eval(found)
            return found

        return call

    for name in ("total", "side_by_side"):
        monkeypatch.setattr(sharded.Meeting, name, evaluated(getattr(sharded.Meeting, name)))
    monkeypatch.setattr(check, "_run", evaluated(check._run))


def quantized(tmp_path: Path, name: str) -> nn.Module:
    """Widths in turn; the head stays dense."""
    config = WIDE | {"intermediate_size": 160, "vocab_size": 385} if name == "wide" else {}
    model = stock(tmp_path, "llama" if name == "wide" else name, **config)
    widths = iter(BITS * 10)

    def predicate(path: str, module: nn.Module) -> Any:
        fits = hasattr(module, "to_quantized") and "lm_head" not in path
        return fits and {"group_size": 32, "bits": next(widths)}

    nn.quantize(model, class_predicate=predicate)
    mx.eval(model.parameters())
    return model


def run(model: nn.Module) -> np.ndarray[Any, Any]:
    """Logits of a prompt in two slices, and of a token after it."""
    caches = make_prompt_cache(model)
    parts = TOKENS[:, :5], TOKENS[:, 5:], TOKENS[:, :1]
    return np.concatenate([np.array(model(part, cache=caches)) for part in parts], axis=1)


def large(model: nn.Module) -> int:
    """Numbers in matrices."""
    arrays: dict[str, Any] = dict(tree_flatten(model.parameters()))
    return sum(a.size for a in arrays.values() if a.ndim > 1)


@pytest.mark.parametrize(("name", "blocks"), [*((name, True) for name in SIZES), ("llama", False)])
def test_shares_give_what_the_whole_gives(tmp_path: Path, name: str, blocks: bool) -> None:
    whole = quantized(tmp_path, name)
    models = [quantized(tmp_path, name) for _ in range(SIZES[name])]
    numbers = large(whole)
    accelerate(whole)
    expected = run(whole)
    meeting = Meeting(len(models))

    def rank(n: int) -> tuple[np.ndarray[Any, Any], int, int]:
        with mx.stream(mx.new_stream(mx.cpu)):
            shard(models[n], Rank(n, meeting), name)
            report = accelerate(models[n], blocks=blocks)
            return run(models[n]), len(report.fused), large(models[n])

    with ThreadPoolExecutor(len(models)) as pool:
        found = list(pool.map(rank, range(len(models))))
    for logits, fused, _ in found:
        np.testing.assert_array_equal(logits, found[0][0])
        np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
        assert fused == (len(whole.layers) if blocks else 0)
    assert sum(held for *_, held in found) == numbers


def test_shares_are_whole_units() -> None:
    assert shares(8, 2, 2) == [Span(0, 4), Span(4, 8)]
    assert shares(3, 1, 2) == [Span(0, 2), Span(2, 3)]
    assert shares(5, 2, 2) == [Span(0, 4), Span(4, 5)]
    assert shares(160, 32, 3) == [Span(0, 64), Span(64, 128), Span(128, 160)]
    assert shares(160, 64, 4) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama", "its 2 key heads can only be divided by 1, in 2 parts, not among 3 ranks"),
        ("qwen3_moe", "its experts are not divided among ranks"),
        ("olmo2", "its norm runs over all query heads together"),
        ("mamba2", "is a block whose computation is not described"),
    ],
)
def test_what_cannot_be_divided_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(DistributedError, match=f"{name} cannot be divided among 3 ranks.*{reason}"):
        shard(stock(tmp_path, name), Rank(0, Meeting(3)), name)

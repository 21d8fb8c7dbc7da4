"""Several sequences in one step of a model, each over a cache of its own.

mlx-lm's batch caches pad all sequences to the longest and copy them whenever one joins or leaves.
Here nothing is padded, merged or copied: the model sees one cache per layer, which hands each row
of the batch to the single cache of its sequence. Products run for all rows at once, attention runs
row by row over exactly what a sequence alone would have read. So a row does not depend on its
company.

It needs attention that asks the cache (`optiq.kv.route`), or blocks that know `rows`. A model that
does more with keys and values raises Unbatchable, or another error, in the trial of `together`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from ..base.text import one_line
from ..ops import native
from .records import Handle

GPU_DIFFERENCE = 0.02  # of the largest logit, in 16 bits

Caches = list[Any]  # of one sequence, one for each layer that has any


class Unbatchable(Exception):
    """These sequences cannot share a step; each can take it alone."""


def joined(sequences: Sequence[Caches], *, settled: bool = False) -> Caches:
    """The caches of several sequences as one, layer by layer. They stay where they are.

    `settled`: nobody changes weights or layers of the model while these are used, so that blocks
    need not look whether they are the same in each step.
    """
    together = [_joined(caches) for caches in zip(*sequences, strict=True)]
    together[0].settled = settled
    return together


def ragged(
    sequences: Sequence[Caches], lengths: Sequence[int], reader: Caches | None = None
) -> Caches:
    """The caches of several sequences, of which each reads so many tokens, as one.

    Then the batch has a row for each token, and the model gives what follows each but those of the
    `reader`, who has the last of the `lengths` and reads a prompt.
    """
    answers = sum(lengths[: len(sequences)])
    every = [*sequences, reader] if reader else sequences
    return [Ragged(caches, lengths, answers) for caches in zip(*every, strict=True)]


def cut(caches: Caches, tokens: int) -> None:
    """Forget what was read after so many tokens."""
    for cache in caches:
        if isinstance(cache, KVCache) and cache.offset > tokens:
            cache.trim(cache.offset - tokens)


def _joined(caches: Sequence[Any]) -> Any:
    first = caches[0]
    if any(type(c) is not type(first) for c in caches):
        raise Unbatchable("caches of different kinds")
    if isinstance(first, CacheList):
        return CacheList(*map(_joined, zip(*(c.caches for c in caches), strict=True)))
    if isinstance(first, ArraysCache):
        return StateRows(caches)
    if isinstance(first, (KVCache, RotatingKVCache)):
        return Rows(caches)
    raise Unbatchable(f"a {type(first).__name__} has no rows")


class Rows:
    """Keys and values of one layer, a cache for each row of the batch."""

    def __init__(self, caches: Sequence[Any]) -> None:
        self.rows = caches
        self._fetched: list[tuple[Any, Any]] = []

    @property
    def offset(self) -> mx.array:
        return mx.array([c.offset for c in self.rows])

    def each(self, x: mx.array, mask: Any) -> Iterator[tuple[int, mx.array, Any, Any]]:
        """The rows of each cache: the first of them, what they hold, their mask and the cache."""
        for i, cache in enumerate(self.rows):
            yield i, x[i : i + 1], mask, cache

    def make_mask(self, n: int, **options: Any) -> None:
        if n > 1 or any(c.make_mask(n, **options) is not None for c in self.rows):
            raise Unbatchable("the sequences need masks of their own")

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Handles, for attention that lets the cache attend."""
        self._fetched = [
            cache.update_and_fetch(keys[i : i + 1], values[i : i + 1])
            for i, cache in enumerate(self.rows)
        ]
        longest = max(int(c.offset) for c in self.rows)
        shape = (*keys.shape[:2], longest)
        return Handle(self, True, (*shape, keys.shape[3])), Handle(
            self, False, (*shape, values.shape[3])
        )

    @property
    def fetched(self) -> list[list[Any]]:
        """The keys of each row, and the values, as its own cache handed them out."""
        return [list(each) for each in zip(*self._fetched, strict=True)]

    def attend(
        self, q: mx.array, *, scale: float, mask: Any, sinks: Any = None, softcap: float = 0.0
    ) -> mx.array:
        """What each sequence alone would compute."""
        if mask is not None:
            raise Unbatchable("the sequences need masks of their own")
        out = []
        for i, (cache, (k, v)) in enumerate(zip(self.rows, self._fetched, strict=True)):
            row = q[i : i + 1]
            if isinstance(k, Handle):
                out.append(cache.attend(row, scale=scale, sinks=sinks, softcap=softcap))
            else:
                out.append(
                    mx.fast.scaled_dot_product_attention(row, k, v, scale=scale, sinks=sinks)
                )
        return mx.concatenate(out)


class Ragged(Rows):
    """Keys and values of one layer: each cache has so many rows of the batch as `lengths` say.

    What follows the first `answers` rows is wanted. Only blocks that know `rows` know this.
    """

    def __init__(self, caches: Sequence[Any], lengths: Sequence[int], answers: int) -> None:
        if not all(isinstance(c, KVCache) for c in caches):
            raise Unbatchable("several tokens are read beside others in caches of all tokens")
        super().__init__(caches)
        self.lengths, self.answers = list(lengths), answers

    def each(self, x: mx.array, mask: Any) -> Iterator[tuple[int, mx.array, Any, Any]]:
        begin = 0
        for cache, n in zip(self.rows, self.lengths, strict=True):
            rows = x[begin : begin + n]
            if n == 1:
                yield begin, rows, mask, cache
            else:
                yield begin, rows.reshape(1, n, x.shape[-1]), "causal", cache
            begin += n

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        raise Unbatchable("this model cannot read several tokens beside others")


class StateRows:
    """States of one recurrent layer, an ArraysCache for each row of the batch."""

    lengths = left_padding = None

    def __init__(self, caches: Sequence[Any]) -> None:
        self.states = caches

    def __getitem__(self, index: int) -> mx.array | None:
        states = [c[index] for c in self.states]
        if any(s is None for s in states):
            raise Unbatchable("a sequence has no state yet")
        return mx.concatenate(states)

    def __setitem__(self, index: int, state: mx.array) -> None:
        for i, cache in enumerate(self.states):
            cache[index] = state[i : i + 1]

    def make_mask(self, n: int) -> None:
        return None

    def advance(self, n: int) -> None:
        for cache in self.states:
            cache.advance(n)


def together(model: nn.Module, rows: int, make: Callable[[], Caches]) -> str:
    """Why so many sequences cannot share the steps of this model; empty where they can.

    They take some steps together, and the same steps alone, over caches that `make` gives. On the
    CPU both have to give the same bits.
    """
    try:
        read = [make() for _ in range(2)]
        for caches, prompt in zip(read, ([1, 2, 3, 4, 5], [3, 1, 2]), strict=True):
            mx.eval(model(mx.array([prompt]), cache=caches), [c.state for c in caches])
        alone, shared = ([copy.deepcopy(read[i % 2]) for i in range(rows)] for _ in range(2))
        for step in range(3):
            tokens = mx.array([[1 + (step + i) % 5] for i in range(rows)])
            expected = mx.concatenate(
                [model(tokens[i : i + 1], cache=caches) for i, caches in enumerate(alone)]
            )
            if reason := _difference(model(tokens, cache=joined(shared)), expected):
                return f"together {reason}"
    except Exception as error:  # whatever a model file does with a cache that it does not know
        return f"together they raise {type(error).__name__}: {one_line(error)}"
    return ""


def readable_beside(model: nn.Module, make: Callable[[], Caches]) -> bool:
    """Whether a prompt can be read in the steps of others, with the same bits for all."""
    if not native.on_cpu():
        return False
    prompt = [1 + i % 7 for i in range(16)]
    results = []
    for shared in (False, True):
        answers, reader = [make() for _ in range(2)], make()
        for caches, read in zip((*answers, reader), ([5, 3], [1, 2, 3], prompt[:5]), strict=True):
            mx.eval(model(mx.array([read]), cache=caches), [c.state for c in caches])
        logits = []
        try:
            for begin, end in ((5, 8), (8, 15)):
                tokens, part = mx.array([[begin], [end]]), mx.array([prompt[begin:end]])
                if shared:
                    batch = mx.concatenate([tokens, part.T])
                    lengths = [1, 1, end - begin]
                    logits.append(model(batch, cache=ragged(answers, lengths, reader)))
                else:
                    logits.append(model(tokens, cache=joined(answers)))
                    model(part, cache=reader)
                mx.eval(logits[-1], [c.state for c in reader])
            logits.append(model(mx.array([prompt[15:]]), cache=reader))
        except Exception:  # whatever a model file does with a cache that it does not know
            return False
        results.append(mx.concatenate(logits))
    return bool(mx.array_equal(results[0], results[1]).item())


def can_forget(model: nn.Module, make: Callable[[], Caches]) -> bool:
    """Whether sequences can read several tokens beside each other, and forget the last ones, with
    the bits that each has alone."""
    right = [[5, 3, 1, 4, 1], [2, 7, 1, 8, 2]]
    alone, shared = ([make() for _ in right] for _ in range(2))
    try:
        expected = []
        for caches, both, prompt in zip(alone, shared, right, strict=True):
            for c in (caches, both):
                mx.eval(model(mx.array([prompt[:3]]), cache=c), [each.state for each in c])
            expected.append([model(mx.array([[t]]), cache=caches)[:, -1] for t in prompt[3:]])
        got = []
        for begin, lengths in ((3, (3, 1)), (4, (2, 4))):
            batch: list[int] = []
            kept = []
            for tokens, n in zip(right, lengths, strict=True):
                kept.append(len(batch))
                batch += [tokens[begin], *(6 + i for i in range(n - 1))]  # the others are wrong
            logits = model(mx.array(batch)[:, None], cache=ragged(shared, lengths))[:, -1]
            mx.eval(logits)
            for caches, row in zip(shared, kept, strict=True):
                got.append(logits[row : row + 1])
                cut(caches, begin + 1)
        wanted = [each[i] for i in range(2) for each in expected]
        return bool(mx.array_equal(mx.concatenate(got), mx.concatenate(wanted)).item())
    except Exception:  # whatever a model file does with a cache that it does not know
        return False


def cuttable(model: nn.Module, make: Callable[[], Caches]) -> bool:
    """Whether a prompt gives the same wherever its slices end; on the CPU, the same bits."""
    prompt = mx.array([[1 + i % 7 for i in range(48)]])
    logits = []
    for cuts in ((), (9, 27)):
        caches = make()
        slices = mx.split(prompt, cuts, axis=1)
        logits.append(mx.concatenate([model(part, cache=caches) for part in slices], axis=1))
    return not _difference(*logits)


def _difference(got: mx.array, expected: mx.array) -> str:
    error: Any = mx.abs(got - expected).max().item()
    scale: Any = mx.abs(expected).max().item()
    bound = 0.0 if native.on_cpu() else GPU_DIFFERENCE * scale
    return "" if error <= bound else f"they differ by {error:.1e} of {scale:.1e}"

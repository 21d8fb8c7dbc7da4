"""Full attention whose first and last tokens are kept in full precision beside their records.

`first` holds the first `layout.sink` tokens of each row, `recent` the last `layout.recent`, both
`[B, heads, n, dim]` and always n wide; where a row has fewer, zeros fill them on its padding's
side. Tokens that come to the far end of `recent` because others were trimmed away are exact no
more: there it holds what their records say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..formats import DENSE
from ..ops.attention import Exact, overlay
from .records import Batch, Pair, Records, Single


class Windowed(Records):
    """What a single sequence and a batch have in common."""

    first: Exact | None = None
    recent: Exact | None = None
    offset: Any  # tokens of each row so far

    def plain(self) -> Pair:
        pair = super().plain()
        if self.first is not None:
            pair = _both(lambda x, f: overlay(x, f, self._starts()), pair, self.first)
        if self.recent is not None:
            at = self._filled() - self.layout.recent - self._behind()
            pair = _both(lambda x, r: overlay(x, r, at), pair, self.recent)
        return pair

    def trim(self, n: int) -> int:
        n = super().trim(n)  # type: ignore[misc]
        size, filled = self.layout.recent, self._filled()
        if not filled:
            self.first = self.recent = None
        elif self.recent is not None and n:
            there = min(size, filled)
            column = filled - there
            tail = self._vectors(*(x[:, :, column:] for x in self.stored()))
            if self.first is not None:
                tail = _both(lambda x, f: overlay(x, f, self._starts() - column), tail, self.first)
            tail = _both(lambda r, x: overlay(mx.zeros_like(r), x, size - there), self.recent, tail)
            self.recent = Exact(*_both(lambda t, r: overlay(t, r, n), tail, self.recent))
        return n

    @property
    def nbytes(self) -> int:
        exact = [x for e in (self.first, self.recent) if e is not None for x in e]
        return int(super().nbytes) + sum(x.nbytes for x in exact)  # type: ignore[misc]

    def inputs(self) -> dict[str, Any]:
        recent = self.recent
        if recent is not None:
            filled = min(self.layout.recent, self._filled())
            recent = Exact(*(x[:, :, x.shape[2] - filled :] for x in recent))
        return {**super().inputs(), "first": self.first, "recent": recent}

    def _note(self, keys: mx.array, values: mx.array) -> None:
        new, layout = (keys, values), self.layout
        if layout.sink and not self._past_first():
            first = self.first or _zeros(new, layout.sink)
            self.first = Exact(*_both(lambda f, x: overlay(f, x, self.offset), first, new))
        if layout.recent:
            recent = self.recent or _zeros(new, layout.recent)
            self.recent = Exact(*_both(self._pushed, recent, new))

    def _pushed(self, recent: mx.array, new: mx.array) -> mx.array:
        """`recent` after the tokens `new`, as an array of its own."""
        size, rows = recent.shape[2], new.shape[2]
        if rows < size:
            return mx.concatenate([recent[:, :, rows:], new], axis=2)
        return overlay(recent, new, size - rows)

    def _starts(self) -> Any:
        """The column of each row's first token."""
        return 0

    def _behind(self) -> Any:
        """Columns of padding after each row's last token."""
        return 0

    def _past_first(self) -> bool:
        """Whether all rows are known to have their first tokens."""
        return False


class WindowedSingle(Windowed, Single):
    def _past_first(self) -> bool:
        return bool(self.offset >= self.layout.sink)


class WindowedBatch(Windowed, Batch):
    left_padding: mx.array
    # While a prompt padded on the right is read: tokens still to come, padding read.
    _remaining: Any = None
    _padding: Any = None

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> Any:
        made = super().merge(caches)
        made.first = _stacked([(c.first, 1) for c in caches])
        made.recent = _stacked([(c.recent, 1) for c in caches])
        return made

    def extend(self, other: Any) -> None:
        rows, more = self.offset.shape[0], other.offset.shape[0]
        super().extend(other)
        self.first = _stacked([(self.first, rows), (other.first, more)])
        self.recent = _stacked([(self.recent, rows), (other.recent, more)])

    def filter(self, batch_indices: Any) -> None:
        super().filter(batch_indices)  # type: ignore[misc]
        self.first, self.recent = (_rows(e, batch_indices) for e in (self.first, self.recent))

    def extract(self, idx: int) -> Any:
        single = super().extract(idx)
        rows = slice(idx, idx + 1)
        single.first, single.recent = (_rows(e, rows) for e in (self.first, self.recent))
        return single

    def prepare(self, *, lengths: Any = None, right_padding: Any = None, **options: Any) -> None:
        super().prepare(lengths=lengths, right_padding=right_padding, **options)  # type: ignore[misc]
        if self.layout.recent and right_padding is not None and max(right_padding) > 0:
            self._remaining = mx.array(lengths)
            self._padding = mx.zeros_like(self._remaining)

    def finalize(self) -> None:
        super().finalize()  # type: ignore[misc]
        self._remaining = self._padding = None

    def _note(self, keys: mx.array, values: mx.array) -> None:
        super()._note(keys, values)
        if self._remaining is not None:
            rows = keys.shape[2]
            self._padding = self._padding + rows - mx.clip(self._remaining, 0, rows)
            self._remaining = self._remaining - rows

    def _pushed(self, recent: mx.array, new: mx.array) -> mx.array:
        if self._remaining is None:
            return super()._pushed(recent, new)
        real = mx.clip(self._remaining, 0, new.shape[2])
        return overlay(recent, mx.concatenate([recent, new], axis=2), -real)

    def inputs(self) -> dict[str, Any]:
        if self._padding is None:
            return {**super().inputs(), "starts": self.left_padding}
        # The last tokens of the rows are in different columns, so what they are is put in here.
        k, v = self.plain()
        return {"k": k, "v": v, "k_format": DENSE, "v_format": DENSE}

    def _starts(self) -> Any:
        return self.left_padding

    def _behind(self) -> Any:
        return 0 if self._padding is None else self._padding


def _both(f: Callable[..., mx.array], *pairs: Any) -> Pair:
    """Of keys and of values."""
    k, v = (f(*parts) for parts in zip(*pairs, strict=True))
    return k, v


def _zeros(like: Any, n: int) -> Exact:
    return Exact(*(mx.zeros((*x.shape[:2], n, x.shape[3]), dtype=x.dtype) for x in like))


def _rows(exact: Exact | None, rows: Any) -> Exact | None:
    return None if exact is None else Exact(*(mx.contiguous(x[rows]) for x in exact))


def _stacked(parts: list[tuple[Exact | None, int]]) -> Exact | None:
    """The rows of all, zeros for those that have none yet."""
    like = next((exact for exact, _ in parts if exact is not None), None)
    if like is None:
        return None
    filled = [
        exact or Exact(*(mx.zeros((rows, *x.shape[1:]), dtype=x.dtype) for x in like))
        for exact, rows in parts
    ]
    return Exact(*_both(lambda *xs: mx.concatenate(list(xs)), *filled))

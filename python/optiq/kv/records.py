"""mlx-lm's caches, holding records of keys and values in place of vectors (see ops/attention.py).

A record is one row of words, so everything the stock classes do with rows (grow, pad, roll, merge,
filter, extract, trim) also holds for records. What is here writes records, reads vectors, and
keeps the formats with them. A vector in no format is stored as its own bytes, for one dtype in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx

from ..base.text import dtype_name
from ..errors import KVError
from ..formats import DENSE, Format
from ..ops.attention import Mask, dequantize_kv, quantize_kv, quantized_attention

C = TypeVar("C", bound="Records")
Pair = tuple[mx.array, mx.array]  # of keys and values

_handing: ContextVar[bool] = ContextVar("handing", default=False)


@contextmanager
def handing() -> Iterator[None]:
    """Caches hand out a `Handle` in place of vectors, for attention that reads records."""
    token = _handing.set(True)
    try:
        yield
    finally:
        _handing.reset(token)


@dataclass(frozen=True)
class Layout:
    """Formats of keys and values, and how many first and last tokens are exact."""

    k: Format
    v: Format
    sink: int = 0
    recent: int = 0


class Vector(NamedTuple):
    """What a record stands for. (A dtype by name: mlx's own cannot be copied or saved.)"""

    dim: int
    dtype_name: str

    @classmethod
    def of(cls, x: mx.array) -> Vector:
        return cls(x.shape[-1], dtype_name(x.dtype))

    @property
    def dtype(self) -> mx.Dtype:
        dtype: mx.Dtype = getattr(mx, self.dtype_name)
        return dtype


@dataclass(frozen=True, eq=False)
class Handle:
    """The keys or the values of a cache, for its `attend` and nothing else."""

    cache: Any  # a Records, or the Rows of rows.py
    of_keys: bool
    shape: tuple[int, ...]


class Records:
    """Mixed into a stock cache class. `keys` and `values` are uint32 `[B, heads, n, words]`."""

    keys: Any  # None while empty
    values: Any
    layout: Layout
    vectors: tuple[Vector, Vector] | None  # known from the first write on

    @classmethod
    def adopt(cls: type[C], cache: Any, layout: Layout, like: Records | None = None) -> C:
        """Take over a stock cache that is empty, or holds records written by `like`."""
        if cache.keys is not None and like is None:
            raise KVError("a cache that holds plain keys and values cannot be quantized afterwards")
        made = cls.__new__(cls)
        made.__dict__.update(cache.__dict__)
        made.layout = layout
        made.vectors = like.vectors if like is not None else None
        return made

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Write vectors `[B, heads, n, dim]`; gives what `keys_and_values` does."""
        self.write(keys, values)
        return self.keys_and_values()

    def write(self, keys: mx.array, values: mx.array) -> None:
        """Write vectors `[B, heads, n, dim]`."""
        self.vectors = Vector.of(keys), Vector.of(values)
        self._note(keys, values)
        k, v = _encode(keys, self.layout.k), _encode(values, self.layout.v)
        with handing():  # what the stock method fetches is not wanted
            super().update_and_fetch(k, v)  # type: ignore[misc]

    def keys_and_values(self) -> Any:
        """All vectors the stock cache would hand out, dequantized; or handles (see `handing`)."""
        if _handing.get():
            assert self.vectors is not None
            shape = (*self.keys.shape[:2], self._filled())
            k, v = (vector.dim for vector in self.vectors)
            return Handle(self, True, (*shape, k)), Handle(self, False, (*shape, v))
        return self.plain()

    def plain(self) -> Pair:
        """The vectors that the records stand for, `[B, heads, S, dim]`, exact ones put in."""
        return self._vectors(*self.stored())

    def stored(self) -> Pair:
        """Records, or plain vectors where there is no format, of all columns in use."""
        assert self.vectors is not None
        n, formats = self._filled(), (self.layout.k, self.layout.v)
        k, v = (
            (x.view(vector.dtype) if fmt == DENSE else x)[..., :n, :]
            for x, fmt, vector in zip((self.keys, self.values), formats, self.vectors, strict=True)
        )
        return k, v

    def inputs(self) -> dict[str, Any]:
        """Keys and values, and what else `ops.quantized_attention` has to know of them."""
        k, v = self.stored()
        return {"k": k, "v": v, "k_format": self.layout.k, "v_format": self.layout.v}

    def attend(
        self,
        q: mx.array,
        *,
        scale: float,
        mask: Mask = None,
        sinks: mx.array | None = None,
        softcap: float = 0.0,
    ) -> mx.array:
        """Attention of `q [B, heads, L, dim]`, the last rows, over what the cache holds."""
        assert self.vectors is not None
        return quantized_attention(
            q, **self.inputs(), scale=scale, mask=mask, sinks=sinks, softcap=softcap,
            value_dim=self.vectors[1].dim,
        )  # fmt: skip

    def _vectors(self, k: mx.array, v: mx.array) -> Pair:
        assert self.vectors is not None
        k, v = (
            x if fmt == DENSE else dequantize_kv(x, vector.dim, fmt, vector.dtype)
            for x, fmt, vector in zip(
                (k, v), (self.layout.k, self.layout.v), self.vectors, strict=True
            )
        )
        return k, v

    def _filled(self) -> int:
        """Columns in use."""
        raise NotImplementedError

    def _note(self, keys: mx.array, values: mx.array) -> None:
        """See vectors before they are written."""

    @property
    def state(self) -> dict[str, Any]:
        """All there is; the stock state says nothing of formats."""
        return dict(self.__dict__)

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class Single(Records):
    """One sequence; several merge into a batch."""

    batched: type[Batch]

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> Any:
        return cls.batched.merge(caches)


class Batch(Records):
    """Several sequences, padded on the left."""

    offset: mx.array
    stock: type
    single: type[Single]

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> Any:
        """Raises KVError for caches of different formats."""
        layout: Layout = caches[0].layout
        if any(getattr(c, "layout", None) != layout for c in caches):
            raise KVError(
                "caches of different KV formats cannot run in one batch; "
                "make all of them with the same KV configuration"
            )
        filled = next((c for c in caches if c.keys is not None), caches[0])
        stock: Any = cls.stock
        return cls.adopt(stock.merge(caches), layout, filled)

    def extend(self, other: Batch) -> None:
        """Raises KVError for a batch of other formats."""
        if getattr(other, "layout", None) != self.layout:
            raise KVError("batches of different KV formats cannot be joined")
        self.vectors = self.vectors or other.vectors
        for one, with_shape in ((self, other), (other, self)):
            if one.keys is None and with_shape.keys is not None:
                rows = one.offset.shape[0]
                one.keys, one.values = (
                    mx.zeros((rows, x.shape[1], 0, x.shape[3]), dtype=x.dtype)
                    for x in (with_shape.keys, with_shape.values)
                )
        super().extend(other)  # type: ignore[misc]

    def extract(self, idx: int) -> Any:
        return self.single.adopt(super().extract(idx), self.layout, self)  # type: ignore[misc]


def _encode(x: mx.array, fmt: Format) -> mx.array:
    return x.view(mx.uint32) if fmt == DENSE else quantize_kv(x, fmt)

"""Adapters that are mounted: who has which, and which of them lie beside the model.

A request takes what is mounted under a name when it is submitted, and keeps it to its end: what is
unmounted or mounted anew meanwhile does not change its answer. Each has a prefix cache of its own,
so what one adapter has read is never taken for what another has. A request may also name a weighted
sum of mounted adapters, which is made then, and kept while there is room.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import count
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ...base.background import in_background
from ...errors import AdapterError, RequestError
from ...kv.rows import Caches, readable_beside, together
from ...lora.adapter import Adapter, Base, check_fits
from ...lora.gathered import Shadow, halved
from ...lora.layers import LowRank
from ...lora.merging import combined
from ...models.adaptable import adaptable
from .prefix import PrefixCache
from .sums import parse

_NAME = re.compile(r"[\w.-]{1,64}")


class Mounted:
    """One adapter under one name. `slot` is None while it does not lie beside the model."""

    def __init__(self, name: str, adapter: Adapter, model: nn.Module, prefix: PrefixCache) -> None:
        self.name, self.digest, self.prefix = name, adapter.digest, prefix
        self.invocation, self.magnitudes = adapter.invocation, adapter.magnitudes
        self.halved = halved(adapter, model)
        self.nbytes = self.halved.nbytes
        self.slot: int | None = None
        self.used = 0

    def adapter(self) -> Adapter:
        """What is mounted, from its terms in 16 bits."""
        terms = {p: LowRank(a, b.astype(mx.float32)) for p, (a, b) in self.halved.terms.items()}
        return Adapter(terms, 1.0, invocation=self.invocation, magnitudes=self.magnitudes)

    def start(self, tokens: Sequence[int]) -> int | None:
        """From which token of a prompt on the adapter works; None where it does nowhere."""
        n = len(self.invocation)
        places = range(len(tokens) - n, -1, -1) if n else (0,)
        return next((i for i in places if tuple(tokens[i : i + n]) == self.invocation), None)


class Sum(NamedTuple):
    """A weighted sum, and what was mounted when it was made."""

    mounted: Mounted
    parts: list[Mounted]


class Adapters:
    """What is mounted on one model. `mount`, `unmount`, `names` and `take` from any thread.

    `together`: rows that can share a pass; `alike`: rows without an adapter may be among them;
    `beside`: a prompt can be read in the same pass.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Base | None,
        make_caches: Callable[[], Caches],
        *,
        slots: int,
        nbytes: int,
        prefix: Callable[[str], PrefixCache],
    ) -> None:
        """At most `slots` adapters lie beside the model, and the arrays of all that are mounted
        take at most `nbytes`. `make_caches` makes those of one sequence, `prefix` a prefix cache
        for the digest of an adapter."""
        self._base, self._nbytes, self._prefix = base, nbytes, prefix
        self._shadow = Shadow(model, slots)
        self._plain, self._modules = model, adaptable(model)
        self.together = next(
            (
                rows
                for rows in (slots, 16)
                if rows > 1 and not together(self._shadow.model, rows, make_caches)
            ),
            1,
        )
        self.alike = _alike(model, self._shadow.model, make_caches)
        self.beside = self.alike and readable_beside(self._shadow.model, make_caches)
        self._named: dict[str, Mounted] = {}
        self._sums: dict[str, Sum] = {}  # the least recently used first
        self._slots: list[Mounted | None] = [None] * slots
        self._clock = count(1)
        self._lock = threading.Lock()

    def mount(self, name: str, adapter: Adapter) -> Mounted:
        """Mount an adapter, in place of one of the same name, which takes a while. Raises
        AdapterError."""
        if not _NAME.fullmatch(name):
            raise AdapterError(
                f"{name[:80]!r} is not a name for an adapter; use up to 64 letters, digits and ._-"
            )
        adapter.check_in_blocks("a server")
        check_fits(adapter, self._modules, self._base)
        mounted = Mounted(name, adapter, self._plain, self._prefix(adapter.digest))
        with self._lock:
            self._make_room(mounted, [m for n, m in self._named.items() if n != name])
            self._named[name] = mounted
        return mounted

    def _make_room(self, mounted: Mounted, others: Iterable[Mounted]) -> None:
        """Forget sums until one more fits. Raises AdapterError."""
        taken = sum(m.nbytes for m in others)
        if taken + mounted.nbytes > self._nbytes:
            raise AdapterError(
                f"{mounted.name} has {mounted.nbytes:,} bytes, and {taken:,} of {self._nbytes:,} "
                "are taken; unmount an adapter, or start the server with more --adapter-memory"
            )
        taken += sum(of.mounted.nbytes for of in self._sums.values())
        while self._sums and taken + mounted.nbytes > self._nbytes:
            taken -= self._sums.pop(next(iter(self._sums))).mounted.nbytes

    def unmount(self, name: str) -> None:
        """Raises AdapterError for a name under which nothing is mounted."""
        with self._lock:
            if self._named.pop(name, None) is None:
                raise AdapterError(f"no adapter {name!r} is mounted; mounted are {self._list()}")

    @property
    def names(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._named)

    def take(self, name: str) -> Mounted:
        """What is mounted under `name` now, or a sum of it, which takes a while the first time.
        Raises RequestError."""
        weights = parse(name)
        with self._lock:
            for one in weights:
                if one not in self._named:
                    raise RequestError(
                        f"no adapter {one!r} is mounted; mounted are {self._list()}", "model"
                    )
            parts = [self._named[one] for one in weights]
            if list(weights.values()) == [1.0]:
                return parts[0]
            found = self._sums.pop(name, None)
            if found and found.parts == parts:
                self._sums[name] = found
                return found.mounted
        try:
            pairs = zip(parts, weights.values(), strict=True)
            mounted = in_background(partial(self._summed, name, [*pairs]))
            with self._lock:
                self._make_room(mounted, self._named.values())
                self._sums[name] = Sum(mounted, parts)
        except AdapterError as error:
            raise RequestError(str(error), "adapter") from error
        return mounted

    def _summed(self, name: str, parts: Sequence[tuple[Mounted, float]]) -> Mounted:
        summed = combined([(part.adapter(), weight) for part, weight in parts])
        return Mounted(name, summed, self._plain, self._prefix(summed.digest))

    def _list(self) -> str:
        return ", ".join(self._named) or "none"

    # What follows runs in the engine's thread.

    def model(self, rows: Sequence[Mounted | None], in_use: Iterable[Mounted]) -> nn.Module:
        """The model for a batch of these rows; the adapters of `in_use` keep their places."""
        adapted = [m for m in rows if m is not None]
        if not adapted:
            return self._plain
        kept = {id(m) for m in (*adapted, *in_use)}
        for mounted in adapted:
            mounted.used = next(self._clock)
            if mounted.slot is None:
                self._place(mounted, kept)
        self._shadow.select([m.slot + 1 if m and m.slot is not None else 0 for m in rows])
        return self._shadow.model

    def _place(self, mounted: Mounted, kept: set[int]) -> None:
        """Into a free slot, or that which was used least recently and is not in use."""
        free = [i for i, m in enumerate(self._slots) if m is None or id(m) not in kept]
        slot = min(free, key=lambda i: m.used if (m := self._slots[i]) else 0)
        if (before := self._slots[slot]) is not None:
            before.slot = None
        self._shadow.fill(slot + 1, mounted.halved)
        self._slots[slot], mounted.slot = mounted, slot


def _alike(model: nn.Module, shadow: nn.Module, make: Callable[[], Caches]) -> bool:
    """Whether rows without an adapter may run in the shadow: it gives the same bits there.

    On a GPU its blocks run layer by layer, and the model's do not.
    """
    prompt = mx.array([[1, 2, 3, 4, 5]])
    logits = []
    for each in (model, shadow):
        caches = make()
        each(prompt, cache=caches)
        logits.append(each(prompt[:, :1], cache=caches))
    return bool(mx.array_equal(*logits))

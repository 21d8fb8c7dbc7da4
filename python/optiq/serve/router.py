"""Several models by their names: loaded when they are asked for, unloaded when room is needed.

What is counted are bytes: the weights of each model, and a share for its caches. A model that
answers is never unloaded. Where all are busy and another one is asked for, the one that was loaded
first takes nothing new, finishes, and goes.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..base.text import one_line
from ..errors import OptiqError, OverloadedError, UsageError
from .models import Listed
from .protocols.problems import Refusal
from .protocols.protocol import Service
from .running import Running

PATIENCE = 2.0  # seconds that a model waits for another one to be idle, before that one must finish
MOST_WAITING = 256  # requests that wait for a model
TICK = 1.0  # seconds between looks for idle models


@dataclass(frozen=True)
class Place:
    """A model that can be loaded; `nbytes` are those of its weights."""

    name: str
    path: Path
    nbytes: int


def places_in(folder: Path) -> list[Place]:
    """The models in a folder: folders with a config.json, and GGUF files. Raises UsageError."""
    if not folder.is_dir():
        raise UsageError(f"--models-dir {folder} is not a folder")
    found = []
    for path in sorted(folder.iterdir()):
        if (path / "config.json").is_file():
            files = path.glob("*.safetensors")
            found.append(Place(path.name, path, sum(file.stat().st_size for file in files)))
        elif path.suffix.lower() == ".gguf" and path.is_file():
            found.append(Place(path.stem, path, path.stat().st_size))
    if not found:
        raise UsageError(
            f"--models-dir {folder} has no model: a folder with a config.json, or a .gguf file"
        )
    return found


@dataclass
class _Loaded:
    """A model in memory; `busy` requests use it."""

    place: Place
    running: Running
    nbytes: int
    since: float
    used: float
    busy: int = 0
    leaving: bool = False  # takes nothing new, and goes when it is idle


class Router:
    """The models of a folder, in `memory` bytes together. Belongs to the server's event loop.

    `load` opens a model, in a thread. `aliases` are (pattern, name); a request without a name asks
    for `default`. `pinned` models are loaded at the start and stay. Others go after `idle` seconds.
    """

    def __init__(
        self,
        places: Sequence[Place],
        load: Callable[[Place], Running],
        *,
        memory: int,
        share: int,
        aliases: Sequence[tuple[str, str]] = (),
        pinned: Sequence[str] = (),
        default: str | None = None,
        idle: float | None = None,
    ) -> None:
        """`share` are the bytes for the caches of each model. Raises UsageError."""
        self._places = {place.name: place for place in places}
        self._load_model = load
        self._memory, self._share = memory, share
        self._aliases, self._pinned = aliases, pinned
        self._default = default or (places[0].name if len(places) == 1 else None)
        self._idle = idle
        self._created = int(time.time())
        self._loaded: dict[str, _Loaded] = {}
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._one = asyncio.Lock()  # loads one model at a time
        self._released = asyncio.Event()  # a request has let its model go
        self._wanted: Counter[str] = Counter()  # requests that wait for a model
        self._watch: asyncio.Task[None] | None = None
        self._closing = False
        for name in [*pinned, *(name for _, name in aliases), *([default] if default else [])]:
            if name not in self._places:
                known = ", ".join(self._places)
                raise UsageError(f"there is no model {name!r} in the folder; it has {known}")
        if sum(self._nbytes(self._places[name]) for name in pinned) > memory:
            raise UsageError(
                f"the pinned models need more than {memory / 1e9:.2f} GB; pin fewer, or give more "
                "--memory"
            )

    # In the thread that starts and stops the server.

    @property
    def ready(self) -> bool:
        return not self._closing

    @property
    def fault(self) -> str:
        return ""

    def start(self) -> None:
        for name in self._pinned:
            self._add(self._places[name], self._load_model(self._places[name]))

    def close(self, drain: float) -> None:
        self._closing = True
        until = time.monotonic() + drain
        for loaded in list(self._loaded.values()):
            loaded.running.close(max(0.0, until - time.monotonic()))

    def listed(self) -> Sequence[Listed]:
        return [self._listed(place) for place in self._places.values()]

    def find(self, name: str | None) -> Listed:
        return self._listed(self._place(name))

    def stats(self) -> Mapping[str, Any]:
        return {name: loaded.running.engine.stats() for name, loaded in self._loaded.items()}

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[Service]:
        if self._idle is not None and self._watch is None:
            self._watch = asyncio.create_task(self._unload_idle(self._idle))
        loaded = await self._enter(self._place(name))
        try:
            yield loaded.running.service
        finally:
            loaded.busy -= 1
            loaded.used = time.monotonic()
            self._released.set()

    def _place(self, name: str | None) -> Place:
        known = name if name is not None else self._default
        if known is not None and known not in self._places:
            known = next((to for like, to in self._aliases if fnmatchcase(known, like)), known)
        if known is None or known not in self._places:
            raise Refusal(
                404,
                "model_not_found",
                f"the model {name!r} is not served here; ask for one of "
                f"{', '.join(map(repr, self._places))}",
            )
        return self._places[known]

    def _listed(self, place: Place) -> Listed:
        loaded = self._loaded.get(place.name)
        context = loaded.running.engine.context if loaded else None
        pinned = place.name in self._pinned
        return Listed(place.name, self._created, context, loaded is not None, pinned)

    def _nbytes(self, place: Place) -> int:
        return place.nbytes + self._share

    def _add(self, place: Place, running: Running) -> None:
        now = time.monotonic()
        self._loaded[place.name] = _Loaded(place, running, self._nbytes(place), now, now)

    async def _enter(self, place: Place) -> _Loaded:
        """The model, loaded, with one more request that uses it."""
        if self._wanted.total() >= MOST_WAITING:
            raise OverloadedError("too many requests wait for a model to be loaded", 5)
        self._wanted[place.name] += 1
        try:
            while True:
                loaded = self._loaded.get(place.name)
                if loaded is not None and not loaded.leaving:
                    loaded.busy += 1
                    return loaded
                if place.name not in self._loading:
                    self._loading[place.name] = asyncio.create_task(self._load(place))
                # Not awaited itself: a client that goes away must not cancel it for the others.
                await asyncio.shield(self._loading[place.name])
        finally:
            self._wanted[place.name] -= 1

    async def _load(self, place: Place) -> None:
        try:
            async with self._one:
                await self._make_room(place)
                opened: list[Running] = []
                try:
                    await asyncio.to_thread(_open, self._load_model, place, opened)
                except OptiqError as error:
                    raise Refusal(
                        500,
                        "model_not_loaded",
                        f"the model {place.name!r} cannot be loaded: {one_line(error)}",
                    ) from error
                if self._closing:
                    opened.pop().close()
                    raise OverloadedError("the server is stopping", 5)
                self._add(place, opened.pop())
        finally:
            del self._loading[place.name]

    async def _make_room(self, place: Place) -> None:
        needed = self._nbytes(place)
        fixed = sum(self._nbytes(self._places[name]) for name in self._pinned)
        if needed + fixed > self._memory:
            raise Refusal(
                400,
                "model_too_large",
                f"the model {place.name!r} needs {needed / 1e9:.2f} GB, and "
                f"{(self._memory - fixed) / 1e9:.2f} GB are there; serve with more --memory",
            )
        began = time.monotonic()
        while sum(m.nbytes for m in self._loaded.values()) + needed > self._memory or (
            place.name in self._loaded  # it is leaving
        ):
            if (idle := self._least_used()) is not None:
                await self._unload(idle)
                continue
            if time.monotonic() - began > PATIENCE:
                self._let_one_leave()
            self._released.clear()
            try:
                await asyncio.wait_for(self._released.wait(), PATIENCE)
            except TimeoutError:
                continue

    def _free(self) -> list[_Loaded]:
        return [m for name, m in self._loaded.items() if name not in self._pinned]

    def _least_used(self) -> str | None:
        """The idle model that goes next."""
        idle = [m for m in self._free() if self._is_idle(m)]
        return min(idle, key=lambda m: (not m.leaving, m.used)).place.name if idle else None

    def _let_one_leave(self) -> None:
        free = self._free()
        if not any(m.leaving for m in free):
            min(free, key=lambda m: m.since).leaving = True

    def _is_idle(self, loaded: _Loaded) -> bool:
        """Nobody uses it, nor is about to; who waits for one that is leaving waits for the next."""
        return loaded.busy == 0 and (loaded.leaving or not self._wanted[loaded.place.name])

    async def _unload(self, name: str) -> None:
        """By its name: whoever holds the model holds its memory."""
        await asyncio.to_thread(_close, [self._loaded.pop(name).running])
        gc.collect()
        mx.clear_cache()

    async def _unload_idle(self, seconds: float) -> None:
        while not self._closing:
            await asyncio.sleep(min(TICK, seconds))
            old = time.monotonic() - seconds
            while (name := self._least_used()) is not None and self._loaded[name].used < old:
                await self._unload(name)


# A thread of a pool holds what it was given, and what it returned, until it is scheduled again,
# which may be after the next model is loaded. So a model goes to it and comes from it in a list.


def _open(load: Callable[[Place], Running], place: Place, opened: list[Running]) -> None:
    opened.append(load(place))


def _close(closing: list[Running]) -> None:
    closing.pop().close()

"""Taps on modules: what goes into each call, and a place where its gradient comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...errors import SensitivityError
from ...models.places import Wrapper
from ...models.roles import Module
from ...nn.replay import Replay, handles

# By module path, one entry per call of a forward pass.
Deltas = dict[str, list[mx.array]]
Arguments = dict[str, list[tuple[Any, ...]]]


class _Tap(Wrapper):
    def __init__(self, inner: nn.Module, path: str, taps: Taps) -> None:
        super().__init__(inner)
        self.path = path
        self.taps = taps

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return self.taps.called(self.path, self.inner(*args, **kwargs), (args, kwargs))


class Taps:
    """Taps on `modules` of a model under replay; a context manager.

    With `deltas`, the i-th call of a module returns its output plus `deltas[path][i]`. `arguments`
    holds (args, kwargs) and `outputs` the unchanged output of every call since `start`.
    """

    def __init__(self, replay: Replay, modules: Sequence[Module]) -> None:
        self._places = {m.path: replay.place(m.path) for m in modules}
        self.start(None)

    def __enter__(self) -> Taps:
        for path, place in self._places.items():
            place.set(_Tap(place.get(), path, self))
        return self

    def __exit__(self, *_: object) -> None:
        for place in self._places.values():
            place.set(place.get().inner)

    def start(self, deltas: Deltas | None) -> None:
        """Begin a new forward pass."""
        self._deltas = deltas
        self.arguments: Arguments = {}
        self.outputs: Deltas = {}

    def called(self, path: str, out: Any, arguments: tuple[Any, ...]) -> mx.array:
        """Note one call; returns the output that the model goes on with."""
        if not isinstance(out, mx.array):
            raise SensitivityError(
                f"{path} returns several arrays, which Fisher scores do not handle; "
                "use --sensitivity kl"
            )
        n = len(self.outputs.setdefault(path, []))
        self.outputs[path].append(out)
        self.arguments.setdefault(path, []).append(handles(arguments))
        return out if self._deltas is None else out + self._deltas[path][n]

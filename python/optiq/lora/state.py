"""Where a training run stands: parameters, AdamW's means, the best so far; kept in one file.

An update depends on nothing but this and the data, whose order is drawn from the seed and the
number of the update. So a run that goes on from the file gives the same bits as one that was never
interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import cos, inf, pi
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..base.checkpoint import Identity, check_identity, damaged
from ..base.tensors import write_tensors
from ..ops import AdamW
from .options import Training
from .tuned import Parameters

FLOOR = 0.1  # of the learning rate, at the end
MEANS = ("m", "v")  # of AdamW, in the file


@dataclass(frozen=True)
class Update:
    """`loss` in nats per token to learn before the update; `norm` of the gradient, unclipped."""

    step: int
    loss: float
    tokens: int
    rate: float
    norm: float


@dataclass(frozen=True)
class Judged:
    """The loss on held-out samples after `step` updates."""

    step: int
    loss: float


def learning_rate(options: Training, step: int) -> float:
    """Of update `step`, counted from 0: a linear rise, then half a cosine down to a tenth."""
    if step < options.warm:
        return options.learning_rate * (step + 1) / options.warm
    done = (step - options.warm) / max(1, options.iters - options.warm)
    return options.learning_rate * (FLOOR + (1 - FLOOR) * 0.5 * (1 + cos(pi * done)))


def as_vector(values: Parameters) -> mx.array:
    """All as one vector, in an order that does not depend on the run: MLX takes as long for each of
    many small arrays as for one."""
    return mx.concatenate([values[name].reshape(-1) for name in sorted(values)])


def from_vector(vector: mx.array, like: Parameters) -> Parameters:
    """The reverse, with the names and shapes of `like`."""
    names = sorted(like)
    ends = np.cumsum([like[name].size for name in names])[:-1].tolist()
    parts = mx.split(vector, ends)
    return {name: a.reshape(like[name].shape) for name, a in zip(names, parts, strict=True)}


def norm_of(gradient: mx.array) -> float:
    return float(np.linalg.norm(np.asarray(gradient)))


class State:
    """Parameters after `step` updates, and what an update needs besides them."""

    def __init__(
        self,
        options: Training,
        start: Parameters,
        minus: Parameters | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.options = options
        self.minus = minus or {}  # not trained, see start.py
        self.notes = tuple(notes)
        self.parameters = start
        self.best = dict(start)
        self.best_loss = inf
        self.worse = 0  # times in a row that held-out loss was not the lowest
        self.updates: list[Update] = []
        self.judged: list[Judged] = []
        self._adam = AdamW(decay=options.weight_decay)
        self._vector = as_vector(start)  # of the parameters
        self._means = mx.zeros_like(self._vector), mx.zeros_like(self._vector)

    @property
    def step(self) -> int:
        return len(self.updates)

    @property
    def over(self) -> bool:
        patience = self.options.patience
        return self.step >= self.options.iters or 0 < patience <= self.worse

    def update(self, loss: float, gradient: mx.array, tokens: int) -> None:
        """One step of AdamW with the gradient clipped, a vector of `as_vector` that is finite."""
        norm = norm_of(gradient)
        factor = min(1.0, self.options.clip / norm) if norm > 0 else 1.0
        rate = learning_rate(self.options, self.step)
        self._vector, self._means = self._adam.step(
            self._vector, gradient, self._means, step=self.step + 1, rate=rate, by=factor
        )
        self.parameters = from_vector(self._vector, self.parameters)
        mx.eval(self.parameters, self._means)
        self.updates.append(Update(self.step + 1, loss, tokens, rate, norm))

    def judge(self, loss: float) -> None:
        """Take a loss on held-out samples; the parameters of the lowest are kept."""
        self.judged.append(Judged(self.step, loss))
        self.worse = 0 if loss < self.best_loss else self.worse + 1
        if loss < self.best_loss:
            self.best, self.best_loss = dict(self.parameters), loss

    @property
    def chosen(self) -> Parameters:
        """What the run gives: the best on held-out samples, or the last where none were judged."""
        return self.best if self.judged else self.parameters

    def save(self, path: Path, identity: Identity) -> None:
        """Replace the file in one step."""
        arrays: Parameters = {}
        for part, values in (
            ("now", self.parameters),
            ("best", self.best),
            ("minus", self.minus),
            ("adam", dict(zip(MEANS, self._means, strict=True))),
        ):
            arrays |= {f"{part}/{name}": value for name, value in values.items()}
        metadata = {
            "identity": json.dumps(dict(identity), sort_keys=True),
            "updates": json.dumps([asdict(u) for u in self.updates]),
            "judged": json.dumps([asdict(j) for j in self.judged]),
            "worse": str(self.worse),
            "best_loss": self.best_loss.hex(),
            "notes": json.dumps(self.notes),
        }
        write_tensors(path, arrays, metadata)

    @classmethod
    def read(cls, path: Path, identity: Identity, options: Training) -> State:
        """What `save` wrote for this run. Raises CheckpointError."""
        try:
            found: Any = mx.load(str(path), return_metadata=True)
            arrays, metadata = found
            parts: dict[str, Parameters] = {"now": {}, "best": {}, "minus": {}, "adam": {}}
            for key, array in arrays.items():
                part, _, name = key.partition("/")
                parts[part][name] = array
            theirs = json.loads(metadata["identity"])
            check_identity(path, identity, theirs)
            notes = json.loads(metadata["notes"])
            state = cls(options, parts["now"], parts["minus"], notes)
            state.best = parts["best"]
            m, v = (parts["adam"][name] for name in MEANS)
            state._means = m, v
            state.updates = [Update(**u) for u in json.loads(metadata["updates"])]
            state.judged = [Judged(**j) for j in json.loads(metadata["judged"])]
            state.worse = int(metadata["worse"])
            state.best_loss = float.fromhex(metadata["best_loss"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise damaged(path, error) from error
        return state

"""Experts that stay on disk: each layer holds as many as its share of a budget, and reads others
when its router chooses them.

A token needs a few experts of every layer, in the order of the layers. So each layer has room for
equally many, in one array for each of its weights, and gives up the one that was not used for
longest. The products are those of the layers with all experts, on these smaller arrays.

What the router chose must be known before the experts are read, and products with them computed
before others take their place. On a GPU that costs a synchronization for each product.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from ..errors import SourceError, UsageError
from ..models.kinds import Kind, kind_of
from ..models.places import Wrapper, place_at
from ..nn.layers import expert_rows
from ..planning.size import Size
from ..sources import Source
from ..sources.folder import check_folder
from ..sources.shards import Spec
from ..sources.slices import Slices, slices

Ids = NDArray[Any]

STORED = ("weight", "scales", "biases")  # by expert, of which the others are small
READERS = 8  # slices that are asked of the disk at a time


@dataclass
class Reads:
    """What the layers of a model have done: experts that were there, and that were read.

    Each of the matrices of an expert counts. `budget` bytes were allowed, `room` are taken.
    """

    budget: int
    room: int
    found: int = 0
    read: int = 0
    bytes_read: int = 0

    @property
    def hits(self) -> float:
        """The share of experts that did not have to be read."""
        return self.found / max(1, self.found + self.read)


def stream(model: nn.Module, source: Source, memory: int | str) -> Reads:
    """Let the experts of `model`, loaded from `source` and not read yet, stay on disk.

    All layers together hold at most `memory` bytes of them. Raises UsageError for a model without
    experts and for a budget that does not hold those of one token, SourceError for files that are
    not as mlx-lm writes them.
    """
    budget = _nbytes(memory)
    layers = {p: m for p, m in model.named_modules() if kind_of(m) is Kind.EXPERTS}
    if not layers:
        raise UsageError(f"{source.name} has no experts; leave --expert-memory out")
    chosen = _chosen(model, layers)
    tensors = slices(check_folder(source.path))
    stored = {path: _stored(path, layer, tensors, source.name) for path, layer in layers.items()}
    each = sum(s.nbytes for of in stored.values() for s in of.values())
    if budget < chosen * each:
        raise UsageError(
            f"--expert-memory {budget / 1e9:.3f}GB is less than the {chosen} experts that a token "
            f"needs in each layer; give at least {_rounded_up(chosen * each):.3f}GB"
        )
    slots = min(budget // each, max(layer.num_experts for layer in layers.values()))
    reads = Reads(budget, 0)
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="experts")
    for path, layer in layers.items():
        held = Slots(layer, stored[path], slots, reads, pool)
        place_at(model, path).set(Streamed(layer, held))
    return reads


def reads_of(model: nn.Module) -> Reads | None:
    """What the streamed layers of `model` count, if it has some."""
    return next((m.slots.reads for m in model.modules() if type(m) is Streamed), None)


class Streamed(Wrapper):
    """Stands in for a layer of experts, `inner`, whose arrays have room for a few of them."""

    def __init__(self, layer: nn.Module, slots: Slots) -> None:
        super().__init__(layer)
        self.slots = slots
        if "bias" in layer:  # small, and indexed by expert
            self["bias"] = layer.pop("bias")

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        experts, which = np.unique(np.asarray(indices), return_inverse=True)
        if len(experts) <= self.slots.number and not sorted_indices:
            at = self.slots.bring(experts.tolist())[which]
            y: mx.array = self.inner(x, mx.array(at.reshape(indices.shape)))
            mx.eval(y)  # the slots are written to in place
        else:
            y = self._in_groups(x, indices, experts.tolist(), which.flatten())
        if "bias" in self:
            y = y + mx.expand_dims(self["bias"][indices], -2)
        return y

    def _in_groups(
        self, x: mx.array, indices: mx.array, experts: Sequence[int], which: Ids
    ) -> mx.array:
        """The products of as many experts at a time as there are slots, those held first."""
        rows, _, shape = expert_rows(x, indices)
        turn = sorted(range(len(experts)), key=lambda i: experts[i] not in self.slots)
        parts, orders = [], []
        for start in range(0, len(turn), self.slots.number):
            group = turn[start : start + self.slots.number]
            slot_of = np.zeros(len(experts), np.uint32)
            slot_of[group] = self.slots.bring([experts[i] for i in group])
            own = np.flatnonzero(np.isin(which, group))
            own = own[np.argsort(slot_of[which[own]], kind="stable")]
            taken = rows[mx.array(own)][:, None]
            y = self.inner(taken, mx.array(slot_of[which[own]]), sorted_indices=True)
            mx.eval(y)
            parts.append(y.squeeze(-2))
            orders.append(own)
        back = mx.array(np.argsort(np.concatenate(orders)))
        return mx.concatenate(parts)[back].reshape(*shape, -1)


class Slots:
    """The experts that a layer holds: in which slot each is, and reading others in."""

    def __init__(
        self,
        layer: nn.Module,
        stored: Mapping[str, Slices],
        number: int,
        reads: Reads,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.number = min(number, *(of.info.shape[0] for of in stored.values()))
        self.reads, self._pool = reads, pool
        self._rooms = [_Room(layer, key, of, self.number) for key, of in stored.items()]
        self._slots: OrderedDict[int, int] = OrderedDict()  # by expert, oldest use first
        self._free = list(range(self.number))
        reads.room += sum(room.nbytes for room in self._rooms)

    def __contains__(self, expert: int) -> bool:
        return expert in self._slots

    def bring(self, experts: Sequence[int]) -> Ids:
        """The slots of these experts, at most `number`, after reading what is missing."""
        missing = [e for e in experts if e not in self._slots]
        for e in experts:
            if e in self._slots:
                self._slots.move_to_end(e)
        while len(self._free) < len(missing):
            self._free.append(self._slots.popitem(last=False)[1])
        taken = list(zip(missing, self._free, strict=False))
        jobs = [self._pool.submit(room.fill, *of) for of in taken for room in self._rooms]
        wait(jobs)  # also after an error nothing may write to a slot any more
        for job in jobs:
            job.result()
        self._slots.update(taken)
        del self._free[: len(taken)]
        self.reads.found += len(experts) - len(missing)
        self.reads.read += len(missing)
        self.reads.bytes_read += len(missing) * sum(room.each for room in self._rooms)
        return np.array([self._slots[e] for e in experts], np.uint32)


class _Room:
    """An array of a layer with a place for each slot, written to through its own memory."""

    def __init__(self, layer: nn.Module, key: str, stored: Slices, slots: int) -> None:
        array = layer[key]
        self.each, self.nbytes = stored.nbytes, stored.nbytes * slots
        raw = mx.zeros((slots, *array.shape[1:-1], stored.nbytes // _rows(array)), mx.uint8)
        layer[key] = raw.view(array.dtype)  # shares the memory
        mx.eval(raw, layer[key])
        self._bytes, self._stored = np.array(raw, copy=False).reshape(-1).data, stored

    def fill(self, expert: int, slot: int) -> None:
        start = slot * self.each
        self._stored.read_into(self._bytes[start : start + self.each], expert)


class _Probe(Wrapper):
    """Notes how many experts a token goes to, and computes nothing."""

    def __init__(self, layer: nn.Module, seen: list[int]) -> None:
        super().__init__(layer)
        self._seen = seen

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        self._seen.append(indices.shape[-1])
        batch = np.broadcast_shapes(x.shape[:-2], indices.shape)
        return mx.zeros((*batch, x.shape[-2], self.inner.output_dims), x.dtype)


def _chosen(model: nn.Module, layers: Mapping[str, nn.Module]) -> int:
    """The experts of a token, as the graph of one token shows."""
    seen: list[int] = []
    for path, layer in layers.items():
        place_at(model, path).set(_Probe(layer, seen))
    try:
        model(mx.zeros((1, 1), mx.int32))
    finally:
        for path, layer in layers.items():
            place_at(model, path).set(layer)
    return max(seen)


def _stored(
    path: str, layer: nn.Module, tensors: Mapping[str, Slices], name: str
) -> Mapping[str, Slices]:
    """Where the weights of a layer lie, by their keys. Raises SourceError."""
    found: dict[str, Slices] = {}
    for key in _keys(layer):
        of = tensors.get(f"{path}.{key}")
        array = layer[key]
        if of is None or (of.info.dtype, of.info.shape) != _spec(array):
            raise SourceError(
                f"{name} does not store {path}.{key} as mlx-lm writes it, so its experts cannot be "
                "read one by one; convert the model first, or leave --expert-memory out"
            )
        found[key] = of
    return found


def _keys(layer: nn.Module) -> Iterator[str]:
    """The arrays that an expert has a part of, but a bias."""
    for key, value in layer.items():
        if isinstance(value, mx.array) and key != "bias":
            if key not in STORED:
                raise UsageError(f"experts with a {key} are not read from disk")
            yield key


def _spec(array: mx.array) -> tuple[str, tuple[int, ...]]:
    spec = Spec.of(array.dtype, array.shape)
    return spec.dtype, spec.shape


def _rows(array: mx.array) -> int:
    rows: int = np.prod(array.shape[1:-1], dtype=int)
    return rows


def _nbytes(memory: int | str) -> int:
    written = Size.parse(str(memory)).nbytes
    if written is None:
        raise UsageError(f"{memory} is not a number of bytes for experts; write 4GB or 512MiB")
    return int(written)


def _rounded_up(nbytes: int) -> float:
    """Gigabytes to three places, not less than `nbytes`."""
    return -(-nbytes // 10**6) / 1000

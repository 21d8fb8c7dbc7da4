"""The four cache classes: full and rotating, of one sequence and of a batch."""

from __future__ import annotations

from typing import Any

from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, KVCache, RotatingKVCache

from .exact import WindowedBatch, WindowedSingle
from .records import Batch, Layout, Records, Single


class KVRecords(WindowedSingle, KVCache):  # type: ignore[misc]
    """Full attention, one sequence."""

    def _filled(self) -> int:
        return int(self.offset)


class RotatingKVRecords(Single, RotatingKVCache):  # type: ignore[misc]
    """The last `max_size` tokens of one sequence."""

    def _filled(self) -> int:
        return min(int(self.offset), int(self.keys.shape[2]))


class BatchKVRecords(WindowedBatch, BatchKVCache):  # type: ignore[misc]
    """Full attention."""

    stock, single = BatchKVCache, KVRecords

    def _filled(self) -> int:
        return int(self._idx)


class BatchRotatingKVRecords(Batch, BatchRotatingKVCache):  # type: ignore[misc]
    """The last `max_size` tokens of each sequence."""

    stock, single = BatchRotatingKVCache, RotatingKVRecords

    def _filled(self) -> int:
        return min(int(self._offset), int(self.keys.shape[2]))


KVRecords.batched = BatchKVRecords
RotatingKVRecords.batched = BatchRotatingKVRecords
_RECORDS: dict[type, type[Single]] = {KVCache: KVRecords, RotatingKVCache: RotatingKVRecords}


def records(cache: Any, layout: Layout) -> Records:
    """The empty stock cache `cache` as one that holds records."""
    return _RECORDS[type(cache)].adopt(cache, layout)

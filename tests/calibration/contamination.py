"""Blocks of seven words of the evaluation sets, as hashes, to find text of theirs in other text.

    python -m tests.calibration.contamination FOLDER    # writes evaluation_blocks.xz

FOLDER has the sets as EVALS says. Each of their texts is cut into blocks of 7 words: 1 to 7, 8 to
14, and so on. Any 13 words in a row of such a text contain one whole block, wherever they begin. So
a text that shares none of its runs of 7 words with the blocks shares no 13 words in a row with the
sets, and a seventh of the runs need be kept.

A hash has 32 bits. There are fewer than 2^17 blocks, so a run of other words has the hash of one of
them with a chance below 2^-15: one false alarm in some 200 new rows of 150 words. The file holds
the differences of the sorted hashes, byte by byte (all first bytes, all second ...), compressed.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import lzma
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("evaluation_blocks.xz")
EVALS = {
    "mmlu": "mmlu/*/*.csv",
    "gsm8k": "gsm8k/test.jsonl",
    "ifeval": "ifeval/*.jsonl",
    "bfcl": "bfcl/**/*.json",
    "humaneval": "humaneval/*.gz",
}
RUN = 13
BLOCK = 7  # 7 - 1 words before a block, and the block


def texts(value: Any) -> Iterator[str]:
    """Every string in a value as JSON has them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)


def words(text: str) -> list[str]:
    """Lower case and without punctuation."""
    return re.findall(r"\w+", text.lower())


def runs(value: Any, length: int) -> set[tuple[str, ...]]:
    """All runs of so many words inside a string of `value`."""
    return {
        tuple(found[start : start + length])
        for found in map(words, texts(value))
        for start in range(len(found) - length + 1)
    }


def hashed(run: Iterable[str]) -> int:
    return int.from_bytes(hashlib.blake2b(" ".join(run).encode(), digest_size=4).digest(), "big")


def blocks(value: Any) -> set[int]:
    """Hashes of the blocks of each string of `value` that is long enough for a run of 13 words."""
    return {
        hashed(found[start : start + BLOCK])
        for found in map(words, texts(value))
        if len(found) >= RUN
        for start in range(0, len(found) - BLOCK + 1, BLOCK)
    }


def rows(path: Path) -> Iterator[Any]:
    """What a file of an evaluation set holds, a row at a time."""
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            yield from csv.reader(file)
        return
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def gather(folder: Path) -> set[int]:
    """The blocks of all evaluation sets in `folder`."""
    found: set[int] = set()
    for pattern in EVALS.values():
        paths = list(folder.glob(pattern))
        if not paths:
            raise FileNotFoundError(f"there is no {pattern} in {folder}")
        for path in paths:
            for row in rows(path):
                found |= blocks(row)
    return found


def packed(hashes: set[int]) -> bytes:
    steps = np.diff(np.array(sorted(hashes), dtype="<u4"), prepend=np.uint32(0))
    return lzma.compress(steps.view(np.uint8).reshape(-1, 4).T.tobytes(), preset=9)


def unpacked(data: bytes) -> set[int]:
    planes = np.frombuffer(lzma.decompress(data), dtype=np.uint8).reshape(4, -1)
    steps = np.ascontiguousarray(planes.T).view("<u4").ravel()
    return set(np.cumsum(steps, dtype=np.uint32).tolist())


if __name__ == "__main__":
    FILE.write_bytes(packed(gather(Path(sys.argv[1]))))

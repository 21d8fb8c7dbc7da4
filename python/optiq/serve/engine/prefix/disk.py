"""Blocks in files, which survive a restart.

Each key has a folder of its own, locked by the server that uses it. A file holds one block and
names the file that it branches off from, so that its own name tells all tokens up to its end. Files
come into being whole, parents first, and go children first, in a thread of their own; what is in
them is decided in the engine's thread alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import mlx.core as mx
import numpy as np

from ....base.files import whole
from ....base.machine import versions
from ....base.notice import notice
from ....errors import ServeError
from ....kv.codec import Arrays
from ....kv.pieces import Piece
from ....kv.prefix import Key
from ....sources.safetensors import encode_header
from ....sources.shards import Spec
from .tree import Block, Tokens, Tree
from .tree import Path as TokenPath

_FORMAT, _VERSION = "optiq.prefix.block", 1
_SUFFIX = ".safetensors"
_LOCK = "lock"
# What reading a file raises that is damaged, or that something else wrote.
_UNREADABLE = (OSError, RuntimeError, KeyError, TypeError, ValueError)


@dataclass(eq=False)
class File:
    """`piece` is what will be in it, until it is written."""

    name: str
    piece: Piece | None = None


@dataclass(frozen=True)
class _Head:
    """What a file says of its block."""

    parent: str
    start: int
    tokens: tuple[int, ...]

    @property
    def name(self) -> str:
        return _digest([self.parent, self.start, self.tokens])


class Disk:
    """Blocks in `folder`, of at most `nbytes` bytes in all.

    Folders of other keys also count, except those that another server uses, and go first. At most
    `waiting` bytes are held in memory until they are written; more is not stored.
    """

    def __init__(self, folder: Path, nbytes: int, key: Key, waiting: int) -> None:
        """Raises ServeError for a folder that cannot be used, BlockingIOError for one in use."""
        self._key = {**vars(key), **versions()}
        self._folder = folder / _digest([_VERSION, self._key])
        self._most_waiting, self._given, self._written = waiting, 0, 0
        self._failed = False
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._tree: Tree[File] = Tree(File(""), 1 << 62, self._dropped)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self._folder)
            self._others = _others(self._folder)
            self._index()
        except BlockingIOError:
            raise
        except OSError as error:
            raise ServeError(
                f"{folder} cannot hold the prefix cache ({error.strerror}); name another folder"
            ) from error
        self._tree.limit = nbytes - sum(other.nbytes for other in self._others)
        self._drop_others(0)
        self._tree.make_room(0)
        self._thread = threading.Thread(target=self._work, name="optiq-prefix-disk", daemon=True)
        self._thread.start()

    @property
    def nbytes(self) -> int:
        return self._tree.nbytes

    def walk(self, tokens: Tokens) -> TokenPath[File]:
        return self._tree.walk(tokens)

    def use(self, path: TokenPath[File], state: Block[File] | None = None) -> None:
        self._tree.use(path, state)
        used = [block.content.name for block in path.blocks[1:]]
        used += [state.content.name] if state else []
        self._jobs.put(partial(self._touch, used))

    def remember(self, path: TokenPath[File], tokens: Tokens, piece: Piece) -> bool:
        """Store `piece`, evaluated, after `path` (see `Tree.add`); it is written later."""
        head = _Head(path.blocks[-1].content.name, path.length, tuple(tokens.tolist()))
        waiting = self._given - self._written
        if self._failed or waiting + piece.nbytes > self._most_waiting:
            return False
        nbytes = len(self._header(head, piece, 0)) + piece.nbytes
        file = File(head.name, piece)
        self._drop_others(nbytes)
        if not self._tree.add(path, tokens, file, nbytes):
            return False
        self._given += piece.nbytes
        self._jobs.put(partial(self._write, file, head, piece))
        return True

    def read(self, blocks: Sequence[Block[File]]) -> list[Piece] | None:
        """What is in `blocks`; None where a file is lost, whose block is then there no more."""
        pieces = []
        for block in blocks:
            try:
                pieces.append(block.content.piece or self._read(self._path(block.content)))
            except _UNREADABLE:
                if self._path(block.content).exists():
                    self._warn()
                self._tree.drop(block)
                return None
        return pieces

    def close(self) -> None:
        """Write what waits, and leave the folder to others."""
        self._jobs.put(None)
        self._thread.join()
        os.close(self._lock)

    def _drop_others(self, nbytes: int) -> None:
        """Drop folders of other keys until there is room for `nbytes`."""
        while self._others and self._tree.nbytes + nbytes > self._tree.limit:
            other = self._others.pop()
            self._tree.limit += other.nbytes
            self._jobs.put(other.remove)

    # In the thread

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except OSError as error:
                self._failed = True
                notice(
                    f"{self._folder} cannot be written ({error.strerror}); from now on, prefixes "
                    "are kept in memory only"
                )
            del job  # and what it holds, until the next one comes

    def _write(self, file: File, head: _Head, piece: Piece) -> None:
        try:
            if not self._failed:
                header = self._header(head, piece, _checksum(piece.arrays))
                with whole(self._path(file)) as (path,), path.open("wb") as out:
                    out.write(header)
                    for array in piece.arrays.values():
                        out.write(_bytes(array))
        finally:
            file.piece = None
            self._written += piece.nbytes

    def _touch(self, names: list[str]) -> None:
        """Note the time, by which the files are in order after a restart."""
        for name in names:
            with suppress(FileNotFoundError):
                os.utime(self._path(File(name)))

    # Files

    def _path(self, file: File) -> Path:
        return self._folder / (file.name + _SUFFIX)

    def _dropped(self, block: Block[File]) -> None:
        self._jobs.put(partial(self._path(block.content).unlink, missing_ok=True))

    def _warn(self) -> None:
        notice(
            f"{self._folder} holds files that are damaged or not of this version; they are removed"
        )

    def _header(self, head: _Head, piece: Piece, checksum: int) -> bytes:
        header = {
            "format": _FORMAT, "version": _VERSION, "key": self._key, **vars(head),
            "pieces": piece.header, "crc32": f"{checksum:08x}",
        }  # fmt: skip
        specs = {k: Spec.of(x.dtype, x.shape) for k, x in piece.arrays.items()}
        entries = {k: (spec.dtype, spec.shape) for k, spec in specs.items()}
        return encode_header(entries, {"optiq": json.dumps(header)})

    def _load(self, path: Path) -> tuple[Any, Arrays]:
        loaded: Any = mx.load(str(path), return_metadata=True)
        arrays, metadata = loaded
        header = json.loads(metadata["optiq"])
        if (header["format"], header["version"], header["key"]) != (_FORMAT, _VERSION, self._key):
            raise ValueError("another format, version or key")
        return header, arrays

    def _read(self, path: Path) -> Piece:
        header, arrays = self._load(path)
        mx.eval(arrays)
        if header["crc32"] != f"{_checksum(arrays):08x}":
            raise ValueError("another checksum")
        return Piece(header["pieces"], arrays)

    # At the start

    def _index(self) -> None:
        """Find what is stored; delete what does not belong to it."""
        names = {path.name for path in self._folder.iterdir()} - {_LOCK}
        branches: dict[str, list[_Head]] = defaultdict(list)
        for name in names:
            try:
                header, _ = self._load(self._folder / name)
                head = _Head(header["parent"], header["start"], tuple(header["tokens"]))
                if name != head.name + _SUFFIX:
                    raise ValueError("a name of something else")
                branches[head.parent].append(head)
            except _UNREADABLE:
                self._warn()
        found: list[tuple[float, TokenPath[File]]] = []
        waiting = [("", np.zeros(0, np.int32))]
        while waiting:
            parent, before = waiting.pop()
            for head in branches[parent]:
                file, tokens = File(head.name), np.array(head.tokens, np.int32)
                upto = np.concatenate([before[: head.start], tokens])
                block_path = self._tree.walk(upto)
                if (block_path.length, block_path.blocks[-1].content.name) != (head.start, parent):
                    continue
                stat = self._path(file).stat()
                self._tree.add(block_path, tokens, file, stat.st_size)
                found.append((stat.st_mtime, block_path))
                names.remove(self._path(file).name)
                waiting.append((head.name, upto))
        for _, block_path in sorted(found, key=lambda item: item[0]):
            self._tree.use(block_path)
        for name in names:
            (self._folder / name).unlink()


@dataclass(frozen=True)
class _Other:
    """The folder of another key."""

    folder: Path
    nbytes: int
    used: float

    def remove(self) -> None:
        try:
            lock = _lock(self.folder)
        except OSError:  # in use
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(lock)


def _others(own: Path) -> list[_Other]:
    """Folders of other keys that no server uses, the least recently used last."""
    found = []
    for folder in own.parent.glob("[0-9a-f]" * 32):
        if folder == own or not (folder / _LOCK).is_file():
            continue
        try:
            os.close(_lock(folder))
            stats = [path.stat() for path in folder.iterdir()]
        except OSError:
            continue
        found.append(_Other(folder, sum(s.st_size for s in stats), max(s.st_mtime for s in stats)))
    return sorted(found, key=lambda other: -other.used)


def _lock(folder: Path) -> int:
    """Raises BlockingIOError where another server has it."""
    file = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise
    return file


def _bytes(array: mx.array) -> memoryview:
    """Those of an evaluated array, in any thread."""
    return memoryview(array)  # type: ignore[arg-type]


def _checksum(arrays: Arrays) -> int:
    checksum = 0
    for name in sorted(arrays):
        checksum = zlib.crc32(_bytes(arrays[name]), checksum)
    return checksum


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]

"""Reads of a Mach-O file what decides whether it loads; the standard library is enough for it.

Layouts: Apple's <mach-o/loader.h>, <mach-o/nlist.h>, <mach-o/fixup-chains.h> and, for the
signature (big-endian), cs_blobs.h. Only arm64 is read; of a universal file, its arm64 part.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

ARM64 = 0x0100000C
BUNDLE, DYLIB = 8, 6

_SYMTAB, _LOAD_DYLIB, _ID_DYLIB, _VERSION_MIN = 0x2, 0xC, 0xD, 0x24
_CODE_SIGNATURE, _BUILD_VERSION, _DYLD_INFO = 0x1D, 0x32, 0x22
_REQUIRED = 0x80000000  # "dyld must understand this command"
_WEAK_DYLIB, _RPATH, _REEXPORT = 0x18 | _REQUIRED, 0x1C | _REQUIRED, 0x1F | _REQUIRED
_EXPORTS_TRIE, _CHAINED_FIXUPS = 0x33 | _REQUIRED, 0x34 | _REQUIRED


class Malformed(ValueError):
    """The bytes are not the Mach-O file they should be."""


@dataclass(frozen=True)
class Import:
    """A symbol wanted of `library`: an install name, or "" for a search through all of them."""

    name: str
    library: str
    optional: bool = False


@dataclass
class Signature:
    ad_hoc: bool
    limit: int  # bytes that are hashed: everything before the signature
    begins: int
    ends: int
    wrong_pages: list[int]


@dataclass
class Image:
    """One arm64 binary."""

    data: bytes
    file_type: int
    minos: tuple[int, int] = (0, 0)
    install_name: str = ""
    libraries: list[str] = field(default_factory=list)
    rpaths: list[str] = field(default_factory=list)
    exports: set[str] = field(default_factory=set)
    imports: list[Import] = field(default_factory=list)  # as dyld binds them
    undefined: list[Import] = field(default_factory=list)  # as the symbol table lists them
    signature: Signature | None = None


def read(data: bytes) -> Image:
    """The arm64 image in `data`; raises Malformed."""
    try:
        return _read(_arm64_slice(data))
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise Malformed(f"cut short or damaged: {error}") from error


def is_macho(data: bytes) -> bool:
    return data[:4] in (b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe")


def _arm64_slice(data: bytes) -> bytes:
    if data[:4] == b"\xca\xfe\xba\xbe":
        for i in range(struct.unpack_from(">I", data, 4)[0]):
            cpu, _, offset, size, _ = struct.unpack_from(">5I", data, 8 + 20 * i)
            if cpu == ARM64:
                return data[offset : offset + size]
    elif data[:4] == b"\xcf\xfa\xed\xfe" and struct.unpack_from("<I", data, 4)[0] == ARM64:
        return data
    raise Malformed("no arm64 Mach-O")


def _commands(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 32
    for _ in range(struct.unpack_from("<I", data, 16)[0]):
        command, size = struct.unpack_from("<2I", data, at)
        if size < 8 or at + size > len(data):
            raise Malformed("a load command leaves the file")
        yield command, data[at : at + size]
        at += size


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()


def _read(data: bytes) -> Image:
    image = Image(data, struct.unpack_from("<I", data, 12)[0])
    tables: dict[int, tuple[int, ...]] = {}
    for command, body in _commands(data):
        if command in (_LOAD_DYLIB, _WEAK_DYLIB, _REEXPORT):
            image.libraries.append(_text(body, struct.unpack_from("<I", body, 8)[0]))
        elif command == _ID_DYLIB:
            image.install_name = _text(body, struct.unpack_from("<I", body, 8)[0])
        elif command == _RPATH:
            image.rpaths.append(_text(body, struct.unpack_from("<I", body, 8)[0]))
        elif command in (_BUILD_VERSION, _VERSION_MIN):
            at = 12 if command == _BUILD_VERSION else 8
            version = struct.unpack_from("<I", body, at)[0]
            image.minos = (version >> 16, version >> 8 & 0xFF)
        elif command == _SYMTAB:
            tables[command] = struct.unpack_from("<4I", body, 8)
        elif command in (_EXPORTS_TRIE, _CHAINED_FIXUPS, _CODE_SIGNATURE):
            tables[command] = struct.unpack_from("<2I", body, 8)
        elif command & ~_REQUIRED == _DYLD_INFO:
            tables[_EXPORTS_TRIE] = struct.unpack_from("<2I", body, 40)
    if _EXPORTS_TRIE in tables:
        offset, size = tables[_EXPORTS_TRIE]
        image.exports = set(_trie(data[offset : offset + size]))
    if _SYMTAB in tables:
        image.undefined = list(_undefined(data, image.libraries, *tables[_SYMTAB]))
    if _CHAINED_FIXUPS in tables:
        image.imports = list(_chained(data, image.libraries, tables[_CHAINED_FIXUPS][0]))
    if _CODE_SIGNATURE in tables:
        image.signature = _signature(data, *tables[_CODE_SIGNATURE])
    return image


def _import(name: str, ordinal: int, libraries: list[str], optional: bool) -> Import:
    # Zero and below name no library: the image itself, the program, or a search through all.
    return Import(name, libraries[ordinal - 1] if ordinal > 0 else "", optional)


def _undefined(
    data: bytes, libraries: list[str], offset: int, count: int, strings: int, _: int
) -> Iterator[Import]:
    for i in range(count):
        name, kind, _, description, value = struct.unpack_from("<IBBHQ", data, offset + 16 * i)
        stab, undefined, external = kind & 0xE0, not kind & 0x0E, kind & 1
        if external and undefined and not stab and not value:
            ordinal = description >> 8
            optional = bool(description & 0x40)
            special = ordinal >= 0xFD
            yield _import(
                _text(data, strings + name), 0 if special else ordinal, libraries, optional
            )


def _chained(data: bytes, libraries: list[str], at: int) -> Iterator[Import]:
    _, _, imports, symbols, count, form, packed = struct.unpack_from("<7I", data, at)
    if form != 1 or packed:
        raise Malformed(f"chained imports of format {form}, not 1")
    for i in range(count):
        word = struct.unpack_from("<I", data, at + imports + 4 * i)[0]
        ordinal = word & 0xFF
        if ordinal >= 0xF0:
            ordinal -= 256
        name = _text(data, at + symbols + (word >> 9))
        yield _import(name, ordinal, libraries, bool(word >> 8 & 1))


def _uleb(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def _trie(data: bytes) -> Iterator[str]:
    """The names in a tree of prefixes: per node its own entry, then edges to longer names."""
    todo = [(0, b"")] if data else []
    seen = set()
    while todo:
        at, prefix = todo.pop()
        if at in seen:
            raise Malformed("the export tree runs in a circle")
        seen.add(at)
        size, at = _uleb(data, at)
        if size:
            yield prefix.decode()
        at += size
        edges = data[at]
        at += 1
        for _ in range(edges):
            end = data.index(b"\0", at)
            child, following = _uleb(data, end + 1)
            todo.append((child, prefix + data[at:end]))
            at = following


def _signature(data: bytes, offset: int, size: int) -> Signature:
    magic, _, count = struct.unpack_from(">3I", data, offset)
    if magic != 0xFADE0CC0:
        raise Malformed("the signature is no signature")
    for i in range(count):
        start = offset + struct.unpack_from(">I", data, offset + 16 + 8 * i)[0]
        fields = struct.unpack_from(">9I4B", data, start)
        magic, _, _, flags, hashes, _, _, pages, limit, length, kind, _, shift = fields
        if magic != 0xFADE0C02:  # the code directory
            continue
        if (kind, length) != (2, 32):
            raise Malformed("the signature's hashes are not SHA-256")
        step = 1 << shift
        if pages != -(-limit // step):
            raise Malformed(f"{pages} hashed pages do not cover {limit} bytes")
        wrong = [
            k
            for k in range(pages)
            if hashlib.sha256(data[k * step : min((k + 1) * step, limit)]).digest()
            != data[start + hashes + 32 * k : start + hashes + 32 * (k + 1)]
        ]
        return Signature(bool(flags & 2), limit, offset, offset + size, wrong)
    raise Malformed("the signature has no code directory")

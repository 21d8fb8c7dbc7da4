"""The smallest Mach-O bundle that passes every check, written byte by byte."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field

LIBRARIES = ["@rpath/libmlx.dylib", "/usr/lib/libc++.1.dylib", "/usr/lib/libSystem.B.dylib"]
PAGE = 4096


@dataclass
class Tiny:
    file_type: int = 8
    minos: tuple[int, int] = (14, 0)
    libraries: list[str] = field(default_factory=lambda: list(LIBRARIES))
    rpath: str = "@loader_path/../mlx/lib"
    exports: list[str] = field(default_factory=lambda: ["_PyInit__ext"])
    # (symbol, ordinal): 1 is the first library, -2 a search through all
    imports: list[tuple[str, int]] = field(
        default_factory=lambda: [("__ZN3mlx4core4evalEv", 1), ("__Znwm", 2), ("_PyModule_New", -2)]
    )
    unlisted: list[str] = field(default_factory=list)  # bound, but not in the symbol table
    signed: bool = True

    def build(self) -> bytes:
        minos = self.minos[0] << 16 | self.minos[1] << 8
        commands = [struct.pack("<6I", 0x32, 24, 1, minos, minos, 0)]
        for name in self.libraries:
            commands.append(_with_text(0xC, struct.pack("<4I", 24, 0, 0, 0), name))
        commands.append(_with_text(0x8000001C, struct.pack("<I", 12), self.rpath))
        head = 32 + sum(map(len, commands)) + 24 + 3 * 16

        trie = _trie(self.exports)
        fixups = _fixups(self.imports + [(name, 1) for name in self.unlisted])
        symbols, strings = _symbols(self.imports)
        trie_at = 2 * PAGE  # so that the hashes have more than one page
        fixups_at = trie_at + len(trie)
        symbols_at = fixups_at + len(fixups)
        strings_at = symbols_at + len(symbols)
        end = strings_at + len(strings)
        pages = -(-end // PAGE)
        signature = 20 + 44 + 5 + 32 * pages
        commands += [
            struct.pack("<6I", 2, 24, symbols_at, len(self.imports), strings_at, len(strings)),
            struct.pack("<4I", 0x80000033, 16, trie_at, len(trie)),
            struct.pack("<4I", 0x80000034, 16, fixups_at, len(fixups)),
        ]
        if self.signed:
            commands.append(struct.pack("<4I", 0x1D, 16, end, signature))
        size = sum(map(len, commands))
        header = struct.pack(
            "<8I", 0xFEEDFACF, 0x0100000C, 0, self.file_type, len(commands), size, 0x85, 0
        )
        assert head <= trie_at
        data = (header + b"".join(commands)).ljust(trie_at, b"\0")
        data += trie + fixups + symbols + strings
        return data + _signature(data) if self.signed else data


def _with_text(command: int, fields: bytes, text: str) -> bytes:
    body = fields + text.encode() + b"\0"
    body += b"\0" * (-len(body) % 8)
    return struct.pack("<2I", command, 8 + len(body)) + body


def _trie(names: list[str]) -> bytes:
    """A root with one edge for each name; the leaves are three bytes of no interest here."""
    root = 2 + sum(len(name) + 2 for name in names)
    edges = b""
    for i, name in enumerate(names):
        edges += name.encode() + b"\0" + bytes([root + 4 * i])
    return bytes([0, len(names)]) + edges + b"\x02\0\0\0" * len(names)


def _fixups(imports: list[tuple[str, int]]) -> bytes:
    names, words = b"", b""
    for name, ordinal in imports:
        words += struct.pack("<I", ordinal & 0xFF | len(names) << 9)
        names += name.encode() + b"\0"
    head = struct.pack("<7I", 0, 28, 28, 28 + len(words), len(imports), 1, 0)
    return head + words + names


def _symbols(imports: list[tuple[str, int]]) -> tuple[bytes, bytes]:
    table, strings = b"", b"\0"
    for name, ordinal in imports:
        table += struct.pack("<IBBHQ", len(strings), 1, 0, (ordinal & 0xFF) << 8, 0)
        strings += name.encode() + b"\0"
    return table, strings


def _signature(data: bytes) -> bytes:
    pages = [data[i : i + PAGE] for i in range(0, len(data), PAGE)]
    hashes = b"".join(hashlib.sha256(page).digest() for page in pages)
    identifier = b"tiny\0"
    offset = 44 + len(identifier)
    directory = struct.pack(
        ">9I4BI", 0xFADE0C02, offset + len(hashes), 0x20001, 2, offset, 44, 0, len(pages),
        len(data), 32, 2, 0, PAGE.bit_length() - 1, 0,
    ) + identifier + hashes  # fmt: skip
    return struct.pack(">5I", 0xFADE0CC0, 20 + len(directory), 1, 0, 20) + directory

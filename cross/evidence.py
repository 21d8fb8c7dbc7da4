"""Collects which symbols of macOS's own libraries binaries that run on macOS 14 are linked to.

    python -m cross.evidence WHEEL... > cross/evidence.json

There is no Apple SDK here to ask. But wheels that others build on Macs and that work on macOS 14
bind to Apple's libraries by name, so each symbol they cannot do without exists there. The build
links against stubs with these symbols only (cross/stubs.py), and cross/verify.py asks again.
The wheels are those that `make evidence` downloads.
"""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from . import macho

FILE = Path(__file__).with_name("evidence.json")
LIBRARIES = ("/usr/lib/libSystem.B.dylib", "/usr/lib/libc++.1.dylib", "/usr/lib/libobjc.A.dylib")
NEWEST = (14, 0)

# What no such wheel was found to use, but libc++'s own headers declare for macOS: std::atomic's
# wait and notify, with the mark _LIBCPP_AVAILABILITY_SYNC, which is `availability(macos, strict,
# introduced = 11.0)` (__atomic/atomic_sync.h and __configuration/availability.h in Debian's
# libc++-19-dev). Weaker evidence, so it is kept and counted apart.
DECLARED = {
    "/usr/lib/libc++.1.dylib": {
        "__ZNSt3__120__libcpp_atomic_waitEPVKvx",
        "__ZNSt3__123__cxx_atomic_notify_allEPVKv",
        "__ZNSt3__123__cxx_atomic_notify_oneEPVKv",
        "__ZNSt3__123__libcpp_atomic_monitorEPVKv",
    }
}


def collect(images: Iterable[macho.Image]) -> dict[str, dict[str, str]]:
    """Symbols by library, each with the oldest macOS that a binary wanting it says it runs on."""
    found: dict[str, dict[str, tuple[int, int]]] = {library: {} for library in LIBRARIES}
    for image in images:
        if not (0, 0) < image.minos <= NEWEST:
            continue
        for wanted in image.undefined:
            if wanted.library in found and not wanted.optional:
                oldest = found[wanted.library].setdefault(wanted.name, image.minos)
                found[wanted.library][wanted.name] = min(oldest, image.minos)
    return {
        library: {name: f"{v[0]}.{v[1]}" for name, v in sorted(symbols.items())}
        for library, symbols in found.items()
    }


def images_of(wheel: Path) -> Iterator[macho.Image]:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith((".so", ".dylib")):
                data = archive.read(name)
                if macho.is_macho(data):
                    yield macho.read(data)


def seen() -> dict[str, set[str]]:
    """Symbols by library that wheels built on Macs are linked to."""
    record: dict[str, Any] = json.loads(FILE.read_text())
    return {library: set(symbols) for library, symbols in record["symbols"].items()}


def main(paths: list[str]) -> None:
    wheels = sorted(map(Path, paths), key=lambda p: p.name)
    record = {
        "made by": "make evidence (cross/evidence.py) from these wheels",
        "wheels": {w.name: hashlib.sha256(w.read_bytes()).hexdigest() for w in wheels},
        "symbols": collect(image for wheel in wheels for image in images_of(wheel)),
    }
    print(json.dumps(record, indent=0))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Writes the stubs (.tbd) that stand for macOS's libraries when linking.

    python -m cross.stubs FOLDER

They export what cross/evidence.json has and nothing else, so a symbol that is not proven to
exist on macOS 14 fails the link, where the message names the object file that wants it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from . import evidence


def stub(library: str, symbols: set[str]) -> str:
    # Classes have a section of their own in the format; C++ code asks for them by name instead.
    listed = sorted(s for s in symbols if not s.startswith("_OBJC_"))
    return (
        "--- !tapi-tbd\ntbd-version: 4\ntargets: [ arm64-macos ]\n"
        f"install-name: '{library}'\nexports:\n  - targets: [ arm64-macos ]\n    symbols: [\n"
        + ",\n".join(f"      '{symbol}'" for symbol in listed)
        + " ]\n...\n"
    )


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for library, symbols in evidence.seen().items():
        symbols = symbols | evidence.DECLARED.get(library, set())
        (folder / Path(library).with_suffix(".tbd").name).write_text(stub(library, symbols))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

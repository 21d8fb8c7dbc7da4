"""Turn code addresses and variable numbers in the runtime's reports into lines and names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path


def readable(report: str, library: Path, variables: Sequence[str]) -> str:
    """Replace <pc:HEX> and <site:N> of a report about `library`."""

    def place(match: re.Match[str]) -> str:
        return _line(library, int(match.group(1), 16) - 1)

    def name(match: re.Match[str]) -> str:
        site = int(match.group(1))
        if site >= 1000:
            return f"the argument [[threadgroup({site - 1000})]]"
        return f"threadgroup variable `{variables[site]}`"

    report = re.sub(r"<pc:([0-9a-f]+)>", place, report)
    report = re.sub(r"<site:(\d+)>", name, report)
    report = re.sub(r"(?<= at )/[^\s:]+(?=:\d)", lambda path: _short(path.group()), report)
    return in_metal(report)


def in_metal(text: str) -> str:
    """The compiler's names of address spaces, as Metal spells them."""
    spaces = {"private": "thread", "local": "threadgroup", "global": "device"}
    return re.sub(r"\b__(private|local|global)\b", lambda m: spaces[m.group(1)], text)


def _line(library: Path, offset: int) -> str:
    """file:line of an instruction; for inlined code also the line that it was inlined into."""
    where = hex(offset)
    for symbolizer in ("llvm-symbolizer-19", "llvm-symbolizer"):
        if shutil.which(symbolizer):
            command = [symbolizer, f"--obj={library}", "--inlines", "--output-style=GNU", where]
            break
    else:
        if not shutil.which("addr2line"):
            return f"{library.name}+{where}"
        command = ["addr2line", "-i", "-f", "-e", str(library), where]
    output = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    frames = [m for frame in output if (m := re.match(r"(.+):(\d+)(?:[: ].*)?$", frame))]
    known = [
        f"{_short(m.group(1))}:{m.group(2)}"
        for m in frames
        if "<launcher>" not in m.group(1) and m.group(2) != "0"  # 0 is a compiler's own frame
    ]
    if not known:
        return f"{library.name}+{where}"
    return known[0] if len(known) == 1 else f"{known[0]} (inlined into {known[-1]})"


def _short(path: str) -> str:
    relative = os.path.relpath(path)
    return path if relative.startswith("../..") else relative

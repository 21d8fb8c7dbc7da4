"""`optiq sandbox run PROGRAM`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ..base.text import cause
from . import options

if TYPE_CHECKING:
    from ..sandbox import Result

MB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["run"], help="run a program to its end")
    parser.add_argument("program", help="a Python file; - reads it from stdin")
    parser.add_argument(
        "--arg",
        action="append",
        default=[],
        metavar="ARG",
        help="an argument of the program (repeatable; --arg=-x for one that begins with -)",
    )
    parser.add_argument(
        "--file",
        action="append",
        default=[],
        metavar="FILE",
        help="copy this file into the program's work folder (repeatable)",
    )
    parser.add_argument(
        "--stdin", metavar="FILE", help="standard input of the program; - passes ours"
    )
    parser.add_argument(
        "--save", metavar="DIR", help="write the files that the program made or changed here"
    )
    parser.add_argument(
        "--package",
        action="append",
        default=[],
        metavar="NAME",
        help="let the program import this installed package and what it requires (repeatable)",
    )
    parser.add_argument("--packages", metavar="DIR", help="let it import from this folder")
    parser.add_argument(
        "--level",
        choices=("interpreter", "process", "namespace"),
        default="process",
        help="process: CPython, locked in by the kernel (the default); namespace: by bubblewrap "
        "too; interpreter: pydantic-monty, a part of Python",
    )
    parser.add_argument("--wall", type=float, default=10.0, help="seconds (default 10)")
    parser.add_argument("--cpu", type=float, default=10.0, help="seconds of CPU (default 10)")
    parser.add_argument("--memory", type=options.positive, default=512, help="MB (default 512)")
    parser.add_argument("--disk", type=options.positive, default=64, help="MB (default 64)")
    parser.add_argument("--files", type=options.positive, default=256, help="number (default 256)")
    parser.add_argument("--threads", type=options.positive, default=16, help="number (default 16)")
    parser.add_argument(
        "--output", type=options.positive, default=1, help="MB of stdout and of stderr (default 1)"
    )
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """The program's exit status where it ended by itself, else 1."""
    from ..errors import UsageError
    from ..sandbox import Limits, Sandbox

    limits = Limits(
        wall=args.wall,
        cpu=args.cpu,
        memory=args.memory * MB,
        disk=args.disk * MB,
        files=args.files,
        threads=args.threads,
        output=args.output * MB,
        returned=args.disk * MB,
    )
    if args.package and args.packages:
        raise UsageError("--package and --packages exclude each other")
    if args.program == "-" and args.stdin == "-":
        raise UsageError("the program is read from stdin; give --stdin a file")
    code = sys.stdin.read() if args.program == "-" else _read(args.program).decode(errors="replace")
    stdin = b""
    if args.stdin is not None:
        stdin = sys.stdin.buffer.read() if args.stdin == "-" else _read(args.stdin)
    files = _files(args.file)
    packages = Path(args.packages) if args.packages else tuple(args.package)
    with Sandbox(limits, args.level, packages) as sandbox:
        result = sandbox.run(code, files, args=args.arg, stdin=stdin)
    if args.save:
        _save(result, Path(args.save))
    if args.json:
        print(json.dumps(result.to_json(), indent=1))
    else:
        _write(result.stdout, sys.stdout)
        _write(result.stderr, sys.stderr)
        if result.status not in ("ok", "error"):
            _write(f"optiq sandbox: {result.status}: {result.detail}\n", sys.stderr)
        for name in result.left_out:
            _write(f"optiq sandbox: {name} could not be read\n", sys.stderr)
    ended = result.exit_status
    return (1 if result.status != "ok" else 0) if ended is None else ended


def _read(path: str | Path) -> bytes:
    from ..errors import UsageError

    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; check the name") from None


def _files(names: Sequence[str]) -> dict[str, bytes]:
    from ..errors import UsageError

    files: dict[str, bytes] = {}
    for path in map(Path, names):
        if path.name in files:
            raise UsageError(f"two files are named {path.name}; rename one, they share a folder")
        files[path.name] = _read(path)
    return files


def _save(result: Result, folder: Path) -> None:
    """Below `folder`; the names come from the work folder, where none can lead out of it."""
    from ..errors import SandboxError

    try:
        for name, data in result.files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    except (OSError, ValueError) as error:
        raise SandboxError(f"--save {folder} cannot be written: {cause(error)}") from None


def _write(text: str, stream: TextIO) -> None:
    """What the stream's encoding does not have shows as an escape."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = _shown(text, stream.isatty()).encode(encoding, "backslashreplace").decode(encoding)
    print(shown, end="", file=stream, flush=True)


def _shown(text: str, terminal: bool) -> str:
    """On a terminal without control characters, which could write to it what the user did not."""
    if not terminal:
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)

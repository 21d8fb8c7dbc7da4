"""`optiq sandbox run PROGRAM`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import options

MB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["run"], help="run a program to its end")
    parser.add_argument("program", help="a Python file; - reads it from stdin")
    parser.add_argument(
        "--file",
        action="append",
        default=[],
        metavar="FILE",
        help="copy this file into the program's work folder (repeatable)",
    )
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
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..errors import UsageError
    from ..sandbox import Limits, Sandbox

    limits = Limits(wall=args.wall, cpu=args.cpu, memory=args.memory * MB, disk=args.disk * MB)
    try:
        code = sys.stdin.read() if args.program == "-" else Path(args.program).read_text()
        files = {Path(name).name: Path(name).read_bytes() for name in args.file}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{args.program} and --file must be readable: {error}") from None
    with Sandbox(limits, args.level) as sandbox:
        result = sandbox.run(code, files)
    if args.json:
        print(json.dumps(result.to_json(), indent=1))
    else:
        print(_shown(result.stdout, sys.stdout.isatty()), end="", flush=True)
        print(_shown(result.stderr, sys.stderr.isatty()), end="", file=sys.stderr)
        if result.status not in ("ok", "error"):
            print(f"optiq sandbox: {result.status}: {result.detail}", file=sys.stderr)
    return 0 if result.status == "ok" else 1


def _shown(text: str, terminal: bool) -> str:
    """On a terminal without control characters, which could write to it what the user did not."""
    if not terminal:
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)

"""`optiq guide MODEL`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from . import options
from .tables import shell_lines, terminal_width


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a model folder, a hub id (org/name) or a .gguf file; or the name of a family, such "
        "as gemma4 or qwen3",
    )
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..doctor.guide import commands, guide

    found = guide(args.model)
    if args.json:
        print(json.dumps(asdict(found) | {"commands": commands(found)}, indent=1))
    elif (columns := terminal_width()) is None:
        print(found)
    else:
        _show(str(found).partition("## Commands")[0], commands(found), columns)
    return 0


def _show(markdown: str, commands: Sequence[str], columns: int) -> None:
    """On a terminal: the text as a page, and commands that can be copied."""
    from rich.console import Console
    from rich.markdown import Markdown

    Console(width=columns, highlight=False).print(Markdown(markdown))
    print("\nCommands:\n")
    for command in commands:
        print(shell_lines(command, columns))

"""The parser of the `optiq` command: short help, and errors that say what to do."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from ..base.text import folded
from ..version import __version__
from . import foreign

# Options of every command; before the command they do as well.
SHARED = {"--debug": "print the traceback of an error", "--quiet": "show no progress"}


class Parser(argparse.ArgumentParser):
    """Names what was not understood, what is near it, and where the help is."""

    def error(self, message: str) -> NoReturn:
        if "expected one argument" in message:
            message += "; a value that begins with - is written as in --size=-1"
        for action in self._actions:
            name = action.metavar or action.dest
            if action.choices and message.endswith(f"required: {name}"):
                names = ", ".join(map(str, action.choices))
                message = f"{str(name).upper()} is missing; it is one of {names}"
        print(folded(f"{self.prog}: {message}", sys.stderr, "  "), file=sys.stderr)
        print(f"usage: {_short_usage(self)}", file=sys.stderr)
        print(f"{self.prog} --help lists the options", file=sys.stderr)
        raise SystemExit(2)


def parse(argv: Sequence[str], commands: Mapping[str, str]) -> argparse.Namespace:
    """The arguments `argv`, where `commands` has each command's text. Exits with 2, or 0 for help.

    Only the options of the command that is asked for are made; --help is quick.
    """
    parser = Parser(
        prog="optiq",
        description="Mixed-precision quantization of language models for MLX.",
        epilog="optiq COMMAND --help has the options of a command. Tab completes commands and "
        'options in bash, zsh and fish: eval "$(optiq completion bash)"',
    )
    parser.add_argument("--version", action="version", version=f"optiq {__version__}")
    shown = parser.add_subparsers(dest="command", metavar="COMMAND")
    leading = [word for word in argv if word in SHARED]
    rest = [word for word in argv if word not in SHARED] if leading == list(argv[:1]) else argv
    chosen = next((word for word in rest if not word.startswith("-")), None)
    for name, text in commands.items():
        command = shown.add_parser(name, help=text, description=f"optiq {name}: {text}.")
        for option, what in SHARED.items():
            command.add_argument(option, action="store_true", help=what)
        if name == chosen:
            importlib.import_module(f".{name}", __package__).add_arguments(command)
            _finish(command)
    if chosen is None:
        parser.parse_args(rest)  # --help, --version, or an option that does not exist
        parser.error(f"name a command: {', '.join(commands)}")
    if chosen not in commands:
        parser.error(f"there is no command {chosen}{foreign.nearest(chosen, commands)}")
    at = rest.index(chosen) + 1
    command = shown.choices[chosen]
    known = foreign.option_strings(command)
    words = foreign.translate(chosen, [*rest[at:], *(leading if rest is not argv else [])], known)
    args, extra = command.parse_known_args(words)
    if extra:
        command.error(foreign.advice(chosen, extra[0], known))
    args.command = chosen
    return args


def _finish(parser: argparse.ArgumentParser) -> None:
    """Say the default of every option whose help does not."""
    for action in parser._actions:
        said = "default" in (action.help or "") or action.help == argparse.SUPPRESS
        plain = isinstance(action.default, (int, float, str)) and not isinstance(
            action.default, bool
        )
        if plain and not said and action.default != argparse.SUPPRESS:
            action.help = f"{action.help} (default: {action.default})"


def _short_usage(parser: argparse.ArgumentParser) -> str:
    """The command with what it cannot do without."""
    needed = []
    for action in parser._actions:
        metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        if not action.option_strings and action.dest != "command":
            needed.append(f"[{metavar}]" if action.nargs == "?" else metavar)
        elif action.required and action.option_strings:
            needed.append(f"{action.option_strings[0]} {metavar}")
    command = ["COMMAND"] if parser.prog == "optiq" else []
    return " ".join([parser.prog, *command, *needed, "[options]"])

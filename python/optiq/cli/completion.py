"""`optiq completion SHELL`: a script that completes commands, options and their values."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Mapping, Sequence

from . import options

SHELLS = ("bash", "zsh", "fish")
Words = Mapping[str, Mapping[str, Sequence[str]]]  # by command and option: the values, if fixed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shell",
        choices=SHELLS,
        help='bash or zsh: eval "$(optiq completion bash)" in your ~/.bashrc or ~/.zshrc; fish: '
        "optiq completion fish > ~/.config/fish/completions/optiq.fish",
    )
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    words = commands()
    print(json.dumps(words) if args.json else SCRIPTS[args.shell](words))
    return 0


def commands() -> Words:
    """Every command with its options, and the values of those that have a choice of them."""
    from . import COMMANDS
    from .parser import SHARED

    found: dict[str, dict[str, Sequence[str]]] = {}
    for name in COMMANDS:
        parser = argparse.ArgumentParser(add_help=False)
        importlib.import_module(f".{name}", __package__).add_arguments(parser)
        words: dict[str, Sequence[str]] = dict.fromkeys(("--help", *SHARED), ())
        for action in parser._actions:
            values = [str(value) for value in action.choices or ()]
            words |= dict.fromkeys(action.option_strings, values)
            if not action.option_strings and values:
                words[""] = values  # of the first argument
        found[name] = words
    return found


def _bash(words: Words) -> str:
    cases = []
    for command, its in words.items():
        names = " ".join(sorted(filter(None, its)))
        cases.append(f'    {command}) words="{names}" ;;')
    values = [
        f'    {command}:{option or command}) words="{" ".join(of)}" ;;'
        for command, its in words.items()
        for option, of in its.items()
        if of
    ]
    return f"""_optiq() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{" ".join(words)}" -- "$cur"))
    return
  fi
  case "${{COMP_WORDS[1]}}:$prev" in
{chr(10).join(values)}
  esac
  if [ -z "$words" ] && [ "${{cur#-}}" != "$cur" ]; then
    case "${{COMP_WORDS[1]}}" in
{chr(10).join("  " + case for case in cases)}
    esac
  fi
  if [ -n "$words" ]; then
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
  else
    COMPREPLY=($(compgen -f -- "$cur"))
  fi
}}
complete -o filenames -F _optiq optiq"""


def _zsh(words: Words) -> str:
    return f"autoload -Uz bashcompinit && bashcompinit\n{_bash(words)}"


def _fish(words: Words) -> str:
    lines = [f'complete -c optiq -n __fish_use_subcommand -f -a "{" ".join(words)}"']
    for command, its in words.items():
        at = f'complete -c optiq -n "__fish_seen_subcommand_from {command}"'
        for option, values in its.items():
            name = option.lstrip("-")
            flag = f" -l {name}" if option.startswith("--") else f" -s {name}" if name else ""
            lines.append(f'{at}{flag} -x -a "{" ".join(values)}"' if values else f"{at}{flag}")
    return "\n".join(lines)


SCRIPTS = {"bash": _bash, "zsh": _zsh, "fish": _fish}

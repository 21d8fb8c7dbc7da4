"""What users of other tools type, and what is mistyped."""

from __future__ import annotations

import argparse
import shlex

import pytest

from optiq.cli import COMMANDS, main
from optiq.cli.foreign import ADVICE, NEEDLESS, RENAMED, TRANSLATED, translate
from optiq.cli.parser import parse


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("convert --hf-path m --mlx-path o -q", "convert m -o o"),
        ("convert --hf-path=m --mlx-path=o --quantize", "convert m -o o"),
        ("convert m --output o --q-bits 4", "convert m -o o --size uniform4"),
        ("convert m -o o --q-bits=3", "convert m -o o --size 3.5bpw"),
        ("convert m -o o --tokens 8k", "convert m -o o --tokens 8000"),
        ("generate --model m --prompt x", "generate m -p x"),
        ("generate m -p x --temperature 0.5 --top-p 0.9", "generate m -p x --temp 0.5 --top-p .9"),
        ("generate m -p x -n 20 --kv-bits 8", "generate m -p x -m 20 --kv 8/8"),
        ("eval --model m --tasks gsm8k", "eval m --suite gsm8k"),
        ("--debug convert m -o o", "convert m -o o --debug"),
        ("--quiet convert m -o o", "convert --quiet m -o o"),
    ],
)
def test_names_of_other_tools_work(typed: str, meant: str) -> None:
    assert parse(shlex.split(typed), COMMANDS) == parse(shlex.split(meant), COMMANDS)


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("convrt m -o o", "there is no command convrt; did you mean convert?"),
        ("frontir m -o o", "did you mean frontier?"),
        ("convert m -o o --sise 5bpw", "there is no option --sise; did you mean --size?"),
        ("convert m -o o --trust-remote-code", "optiq never runs code that comes with a model"),
        ("convert m -o o --dtype float16", '"torch_dtype" in its config.json'),
        ("convert m -o o --q-group-size 32", "--formats, such as 3,4,6,8 or 4g32"),
        ("generate m -p x --cache-type-k q8_0", "write --kv 8/4"),
        ("sandbox run p.py more", "pass it to the program with --arg more"),
        ("convert m -o o --size -5bpw", "as in --size=-1"),
        ("convert m -o o --tokens eight", "'eight' is not a whole number of at least 1"),
        ("convert m", "usage: optiq convert MODEL -o OUT [options]"),
        ("", "name a command: convert"),
        ("lora", "ACTION is missing; it is one of train, info, merge, export"),
        ("run", "AGENT is missing; it is one of claude"),
    ],
)
def test_mistakes_are_answered(typed: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(typed))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert answer in error
    assert error.count("\n") == 3


def test_what_names_are_translated_to_exists() -> None:
    for command, renamed in RENAMED.items():
        known = known_to(command)
        assert set(filter(None, renamed.values())) <= known
        for translated in TRANSLATED.get(command, {}).values():
            assert translated("4")[0] in known
        assert not set(NEEDLESS.get(command, ())) & known


def test_a_name_of_ours_is_never_translated() -> None:
    assert translate("convert", ["m", "--output", "o"], {"--output"}) == ["m", "--output", "o"]
    assert translate("generate", ["m", "--", "--model"], set()) == ["m", "--", "--model"]


def test_advice_names_options_that_exist() -> None:
    everything = set[str]().union(*map(known_to, COMMANDS))
    for text in ADVICE.values():
        named = {word.strip(".,;()") for word in text.split() if word.startswith("--")}
        assert named <= everything, text


def known_to(command: str) -> set[str]:
    import importlib

    parser = argparse.ArgumentParser()
    importlib.import_module(f"optiq.cli.{command}").add_arguments(parser)
    own = {name for action in parser._actions for name in action.option_strings}
    return own | {"--quiet", "--debug"}

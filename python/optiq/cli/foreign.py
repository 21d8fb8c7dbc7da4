"""Names that users of mlx-lm, llama.cpp and the hub's tools type, and what they are called here.

A name that the command itself knows is never looked up here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches

VALUE = ""  # the option is left out: its value is the model

_MODEL = dict.fromkeys(("--model", "--hf-path", "--hf-repo", "--model-path", "--hf"), VALUE)
_OUT = dict.fromkeys(
    ("--mlx-path", "--output", "--outfile", "--output-dir", "--save-path"), "--out"
)

RENAMED = {
    "convert": {**_MODEL, **_OUT, "--calibration-data": "--calibration"},
    "frontier": {**_MODEL, **_OUT},
    "sensitivity": {**_MODEL, **_OUT},
    "kv": {**_MODEL, **_OUT},
    "eval": {**_MODEL, **_OUT, "--tasks": "--suite", "--output-path": "--out"},
    "compare": _OUT,
    "card": {**_MODEL, **_OUT},
    "info": _MODEL,
    "generate": {
        **_MODEL,
        "--temperature": "--temp",
        "-n": "--max-tokens",
        "--n-predict": "--max-tokens",
        "--predict": "--max-tokens",
        "--system-prompt": "--system",
        "--ignore-chat-template": "--raw",
        "--prompt-cache-file": "--prompt-cache",
    },
    "serve": {**_MODEL, "--max-tokens": "--answer-tokens"},
}

_FORMATS = "the widths to choose from are named in --formats, such as 3,4,6,8 or 4g32"
_NO_CODE = "optiq never runs code that comes with a model; leave it out"
_KV = "write --kv 8/4 (bits of keys and values), or --kv FILE with what optiq kv made"
ADVICE = {
    "--trust-remote-code": _NO_CODE,
    "--q-group-size": _FORMATS,
    "--q-mode": _FORMATS,
    "--quant-predicate": "optiq measures which layers need more bits; optiq frontier compares the "
    "result with mlx-lm's mixed recipes",
    "--outtype": "write --size, such as uniform4 or 4.8bpw",
    "--imatrix": "optiq measures its own importances; your text goes to --calibration FILE",
    "--dtype": 'the dtype is that of the model; "torch_dtype" in its config.json changes it',
    "--dequantize": "optiq only quantizes; mlx_lm.convert -d writes a quantized model out again",
    "--upload-repo": "optiq card OUT --upload-repo ORG/NAME uploads a model and its card",
    "--kv-group-size": _KV,
    "--quantized-kv-start": "optiq kv --fp-sink and --fp-recent say which tokens stay exact",
    "--cache-type-k": _KV,
    "--cache-type-v": _KV,
    "--max-kv-size": "a cache holds the whole context; --kv makes it smaller",
    "--ctx-size": "the context is as long as the model allows",
    "--num-shots": "the examples that are shown are a part of each benchmark's protocol",
    "--num_fewshot": "the examples that are shown are a part of each benchmark's protocol",
    "--batch-size": "optiq chooses the batches itself, by memory",
    "--verbose": "progress is shown without it; --quiet hides it, --debug shows tracebacks",
    "--force": "--overwrite replaces a result that is there",
    "--yes": "optiq asks nothing",
    "--api-key": "others can read command lines; write the key to a file for --api-key-file, or "
    "set OPTIQ_API_KEY",
}


def _uniform(bits: str) -> list[str]:
    """As many bytes as mlx-lm's converter needs for this width: half a bit more in groups of 64."""
    return ["--size", "uniform4" if bits == "4" else f"{bits}.5bpw"]


# Options whose value is also written differently.
TRANSLATED: dict[str, dict[str, Callable[[str], list[str]]]] = {
    "convert": {"--q-bits": _uniform, "--bits": _uniform},
    "generate": {"--kv-bits": lambda bits: ["--kv", f"{bits}/{bits}"]},
    "serve": {"--kv-bits": lambda bits: ["--kv", f"{bits}/{bits}"]},
}
# Options without a value that say what is done anyway.
NEEDLESS = {"convert": ("-q", "--quantize")}


def translate(command: str, argv: Sequence[str], known: Collection[str]) -> list[str]:
    """The arguments of `command` in optiq's own names; `known` are the options it has."""
    renamed = RENAMED.get(command, {})
    translated = TRANSLATED.get(command, {})
    left = list(argv)
    found: list[str] = []
    while left:
        word = left.pop(0)
        name, given, value = word.partition("=")
        if word == "--":
            return [*found, word, *left]
        if not name.startswith("-") or name in known:
            found.append(word)
        elif name in NEEDLESS.get(command, ()):
            pass
        elif name in translated and (given or left):
            found += translated[name](value if given else left.pop(0))
        elif name in renamed:
            found += [ours] if (ours := renamed[name]) else []
            found += [value] if given else []
        else:
            found.append(word)
    return found


def advice(command: str, word: str, known: Collection[str]) -> str:
    """What to do about the option or argument `word`, which the command does not know."""
    name = word.partition("=")[0]
    if not name.startswith("-"):
        more = f"; pass it to the program with --arg {word}" if command == "sandbox" else ""
        return f"{word} is one argument too many{more}"
    if name in ADVICE:
        return f"there is no {name}: {ADVICE[name]}"
    return f"there is no option {name}{nearest(name, known)}"


def nearest(word: str, known: Collection[str]) -> str:
    """ "; did you mean X?", or nothing."""
    found = get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f"; did you mean {found[0]}?" if found else ""


def option_strings(parser: argparse.ArgumentParser) -> set[str]:
    """All the options that `parser` knows."""
    return {name for action in parser._actions for name in action.option_strings}

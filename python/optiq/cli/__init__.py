"""The `optiq` command: parsing and printing. Each command is a module here.

Exit codes: 0 done, 1 failed (one line that says why and what to do), 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from ..base.progress import silenced
from ..base.text import folded
from ..errors import OptiqError, UsageError
from .parser import parse

COMMANDS = {
    "convert": "measure, plan, round and write a model",
    "sensitivity": "measure how much each module suffers from fewer bits",
    "plan": "a plan for another size, from scores already measured",
    "kv": "formats for the keys and values of each layer's cache",
    "frontier": "size against KL: ours, uniform widths and mlx-lm's mixed recipes",
    "compare": "KL, top-1 agreement and perplexity of models against a reference",
    "eval": "five benchmarks, KL and size of a model, with intervals",
    "card": "write the model card from what was measured; upload it with the model",
    "info": "what a model folder is: source, formats, measured KL, evaluations",
    "generate": "answer one prompt",
    "chat": "talk to a model in the terminal",
    "lora": "train adapters for a model, and convert and merge them",
    "serve": "answer OpenAI's and Anthropic's clients",
    "run": "start a coding agent on a model of yours",
    "mcp": "the sandbox for any agent, by the Model Context Protocol",
    "sandbox": "run untrusted Python, held by the kernel and under limits",
    "bench": "time the kernels against stock MLX on this machine",
    "doctor": "what this machine runs optiq with, and what to improve",
    "guide": "what is known of a model's family: sampling, sizes, caveats, commands",
    "completion": "completion of commands and options for your shell",
    "demo": "fetch a small real model, convert it and compare it with uniform 4-bit",
}

SHARED = (
    "convert",
    "sensitivity",
    "kv",
    "frontier",
    "eval",
    "lora",
    "serve",
)  # what several processes can do together


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    after: list[str] = []
    chosen = next((a for a in argv if not a.startswith("-")), None)
    if chosen == "run" and "--" in argv:  # the rest is for the program that it starts
        argv, after = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    args = parse(argv, COMMANDS)
    args.after = after
    from ..distributed.ranks import launched  # here: it imports numpy, and --help is quick

    _prepare_process()
    try:
        if launched() and args.command not in SHARED:
            raise UsageError(
                f"runs in one process, not under mlx.launch or mpirun; {', '.join(SHARED)} share "
                "their work"
            )
        module = importlib.import_module(f".{args.command}", __package__)
        with silenced(args.quiet):
            code: int = module.run(args)
        return code
    except OptiqError as error:
        if args.debug:
            raise
        _tell(f"optiq {args.command}: {error}")
        return error.exit_code
    except KeyboardInterrupt as stop:
        print(f"\noptiq {args.command}: interrupted{stop}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `optiq plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # a bug, or a limit of the system such as a path that is too long
        if args.debug:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        _tell(f"optiq {args.command}: {reason}; --debug shows where")
        return 1


def _tell(text: str) -> None:
    print(folded(text, sys.stderr, "  "), file=sys.stderr)


def _prepare_process() -> None:
    """Make termination clean up as Ctrl-C does, and give closed standard streams a place to go."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice is not for our users
    if sys.stdin is None:  # else the next file opened would be taken for it
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115 (for the life of the process)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler)

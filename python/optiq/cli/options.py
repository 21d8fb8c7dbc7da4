"""Options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..quantize.options import OptionFields


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def seed(text: str) -> int:
    """A whole number that seeds every generator in use."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 4294967295")
    return value


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model folder, a hub id (org/name) or a .gguf file")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size",
        default="uniform4",
        help="uniform4 (the bytes of stock uniform 4-bit, the default), 4.8bpw, 6.1GB or bytes",
    )


def add_formats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--formats", help="menu of widths or formats (default: 3,4,5,6,8,bf16; also 4g64, nvfp4)"
    )


def add_measuring(parser: argparse.ArgumentParser) -> None:
    add_formats(parser)
    parser.add_argument(
        "--sensitivity",
        choices=("auto", "kl", "fisher"),
        default="auto",
        help="kl: exact, one module and format at a time; fisher: estimated from one backward "
        "pass; auto: fisher, but kl for experts, routers and what the plan at --size hangs on",
    )
    parser.add_argument(
        "--reference",
        choices=("auto", "bf16", "uniform4"),
        default="auto",
        help="what the rest of the model runs in while one module is measured (auto: by memory)",
    )
    parser.add_argument("--calibration", metavar="MIX.jsonl", help="your own samples")
    parser.add_argument("--tokens", type=positive, help="calibration tokens")
    parser.add_argument(
        "--rounding",
        choices=("descent", "search", "minmax"),
        help="descent (the default): weights fitted to what each layer's output loses; search: "
        "scales fitted to what drives each column; minmax: as stock. Scores are made with minmax "
        "or else search",
    )
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")


def measuring(args: argparse.Namespace) -> OptionFields:
    """What `add_model`, `add_measuring` and --scores ask for, as `convert` takes it."""
    return {
        "formats": args.formats,
        "sensitivity": args.sensitivity,
        "reference": args.reference,
        "calibration": args.calibration,
        "tokens": args.tokens,
        "rounding": args.rounding,
        "scores": getattr(args, "scores", None),
        "revision": args.revision,
        "seed": args.seed,
        "resume": args.resume,
    }


@contextmanager
def resumable(*checkpoints: Path) -> Iterator[None]:
    """Ctrl-C says how to go on, if there is something to go on from."""
    try:
        yield
    except KeyboardInterrupt:
        found = any(checkpoint.exists() for checkpoint in checkpoints)
        hint = "; the same command with --resume goes on from here" if found else ""
        raise KeyboardInterrupt(hint) from None

"""Options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    from ..quantize.options import OptionFields


def positive(text: str) -> int:
    """A whole number of at least 1; 8k is 8,000."""
    written = text.strip().lower().replace("_", "").replace(",", "")
    digits, thousands = written.removesuffix("k"), written.endswith("k")
    if not digits.isdecimal() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(digits) * (1000 if thousands else 1)


def seed(text: str) -> int:
    """A whole number that seeds every generator in use."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 4294967295")
    return int(text)


def add_model(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    parser.add_argument(
        "model",
        nargs="?" if optional else None,
        help="a model folder, a hub id (org/name) or a .gguf file",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_tools(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tools",
        action="append",
        default=[],
        choices=["python"],
        help="what is run for the model when it is offered: python, in the sandbox",
    )
    add_packages(parser)


def add_packages(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sandbox-packages",
        metavar="NAMES",
        help="packages that this Python may import, separated by commas (default: numpy, pandas "
        "and matplotlib, if installed)",
    )


def add_kv(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kv",
        metavar="CONFIG",
        help="cache keys and values in few bits: a kv_config.json, or bits of K and V such as 8/4",
    )


def add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter", metavar="FOLDER", help="an adapter of the model: ours, mlx-lm's or PEFT's"
    )


def add_draft(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--draft",
        metavar="MODEL",
        help="a small model with the same tokens, which guesses what comes next; answers stay the "
        "same and come sooner where it is often right",
    )


def add_expert_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--expert-memory",
        metavar="SIZE",
        help="leave the experts of a mixture on disk and hold at most SIZE of them, such as 4GB",
    )


def add_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--memory", metavar="SIZE", help="most memory to use, such as 12GB")


def add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size",
        default="uniform4",
        help="uniform4 (the bytes of stock uniform 4-bit, the default), 4.8bpw, 6.1GB or bytes",
    )


def add_scores(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scores", metavar="FILE", help="use the scores of this sensitivity.json, measure none"
    )


def add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=seed, default=0, help="of every random choice")


def add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration",
        metavar="PATH",
        help="your own text: a .txt file, JSON Lines with text, messages or prompt and completion, "
        "or a folder of such files (default: a mix that comes with optiq)",
    )


def add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument("--restart", action="store_true", help="discard an interrupted run")


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a result of optiq's that is there"
    )


def add_formats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--formats", help="menu of widths or formats (default: 3,4,5,6,8,bf16; also 4g64, nvfp4)"
    )


def add_effort(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--effort",
        choices=("quick", "normal", "best"),
        default="normal",
        help="quick: scores of one backward pass, an eighth of the text, one plan; best: twice the "
        "text, and --refine; options that are given stand",
    )
    add_memory(parser)


def add_measuring(parser: argparse.ArgumentParser) -> None:
    add_formats(parser)
    parser.add_argument(
        "--sensitivity",
        choices=("auto", "kl", "fisher"),
        help="kl: measure every module in every format (exact, slow); fisher: estimate all from "
        "one backward pass; auto (the default): measure experts and routers, estimate the rest",
    )
    parser.add_argument(
        "--reference",
        choices=("auto", "bf16", "uniform4"),
        default="auto",
        help="what the rest of the model runs in while one module is measured (auto: by memory)",
    )
    add_calibration(parser)
    parser.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="calibration tokens (default: 8192 to fit weights with, of which 2048 give the "
        "scores)",
    )
    parser.add_argument(
        "--rounding",
        choices=("descent", "search", "minmax"),
        help="descent (the default): round so that each layer's output changes least; search: "
        "search the best scales; minmax: as stock",
    )
    add_seed(parser)
    add_resume(parser)
    add_overwrite(parser)


def measuring(args: argparse.Namespace) -> OptionFields:
    """What `add_model`, `add_measuring` and --scores ask for, as `convert` takes it."""
    return {
        "effort": getattr(args, "effort", "normal"),
        "memory": getattr(args, "memory", None),
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
        "restart": args.restart,
        "overwrite": args.overwrite,
    }


def nbytes(option: str, text: str | None) -> int | None:
    """Bytes of a size such as 12GB or 512MiB."""
    from ..planning.size import Size

    if text is None:
        return None
    found = Size.parse(text).nbytes
    if found is None:
        raise UsageError(f"{option} {text} is not a number of bytes; write 12GB or 512MiB")
    return int(found)


def packages(names: str | None) -> tuple[str, ...] | None:
    """Names that are separated by commas."""
    return None if names is None else tuple(filter(None, (n.strip() for n in names.split(","))))


@contextmanager
def resumable(*checkpoints: Path) -> Iterator[None]:
    """Ctrl-C says how to go on, if there is something to go on from."""
    try:
        yield
    except KeyboardInterrupt:
        found = any(checkpoint.exists() for checkpoint in checkpoints)
        hint = "; the same command with --resume goes on from here" if found else ""
        raise KeyboardInterrupt(hint) from None

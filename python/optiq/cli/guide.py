"""`optiq guide MODEL`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from . import options


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
    else:
        print(found)
    return 0

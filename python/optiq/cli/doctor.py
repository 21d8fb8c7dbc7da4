"""`optiq doctor`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..doctor import examine

    findings = examine()
    if args.json:
        print(json.dumps([asdict(f) for f in findings], indent=1))
        return 0
    width = max(len(f.name) for f in findings)
    for f in findings:
        print(f"{f.name.ljust(width)}  {f.value}")
        if f.advice:
            print(f"{' ' * width}  -> {f.advice}")
    return 0

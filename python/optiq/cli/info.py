"""`optiq info FOLDER`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from . import options
from .tables import facts_lines, grid, number, size

if TYPE_CHECKING:
    from ..cards.info import Info


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a model folder, of optiq's or any other for mlx-lm")
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..cards.info import info

    found = info(args.folder)
    print(json.dumps(found.to_json(), indent=1) if args.json else table(found))
    return 0


def table(found: Info) -> str:
    """A line for each fact, then the bytes of each format."""
    plan = found.plan
    lines = [("model", str(found.path)), ("type", found.model_type)]
    if plan:
        source = plan.model.path or plan.model.name  # a local one by a path that can be copied
        lines.append(("made from", f"{source} ({plan.model.dtype})"))
    lines.append(("size", f"{size(found.nbytes)} of tensors, files {size(found.file_bytes)}"))
    if plan:
        lines += [
            ("bits", f"{plan.bpw:.3f} per weight; asked for {plan.asked}"),
            ("KL", _kl(found)),
            ("made with", f"optiq {plan.versions.get('optiq', 'of an unknown version')}"),
        ]
        if plan.command:
            lines.append(("command", plan.command))
    else:
        lines.append(("quantized", found.quantized or "no"))
    for run in found.evals:
        state = "" if run.done == run.items else f" of {run.items}, unfinished"
        other = "" if run.same_weights else "; of other weights than these"
        lines.append(("evaluated", f"{run.task}: {run.done} items{state} in {run.folder}{other}"))
    lines += [("KV config", name) for name in found.kv_configs]
    lines += [("adapter", name) for name in found.adapters]
    lines += [("note", note) for note in found.notes]
    shown = facts_lines(lines)
    if not found.formats:
        return shown
    rows = [["format", "modules", "bytes"]]
    rows += [
        [f.format, str(f.modules), "-" if f.nbytes is None else f"{f.nbytes:,}"]
        for f in found.formats
    ]
    return f"{shown}\n\n{grid(rows)}"


def _kl(found: Info) -> str:
    """Ours beside that of stock uniform 4-bit, where they were measured."""
    assert found.plan is not None
    measured, stock = found.plan.measured, found.plan.uniform4
    if measured is None:
        return "not measured"
    text = f"{number(measured.kl.mean, measured.kl.se)} nats per token"
    if stock and stock.measured:
        kl = stock.measured.kl
        text += f"; stock uniform 4-bit ({size(stock.nbytes)}): {number(kl.mean, kl.se)}"
    return text

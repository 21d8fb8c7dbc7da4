"""`optiq compare A B [--reference R]`."""

from __future__ import annotations

import argparse
import json

from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", help="models to compare: folders, hub ids, .gguf files")
    parser.add_argument("--reference", help="what they are compared with (default: the first model)")
    parser.add_argument("--text", metavar="ROWS.jsonl", help="rows to measure on")
    parser.add_argument("--tokens", type=options.positive, default=4096, help="tokens to measure on")
    parser.add_argument("--seed", type=int, default=0)
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from .. import calibration
    from ..compare import measure
    from ..errors import UsageError
    from ..runtime import load
    from .tables import metrics_table

    names = list(args.models)
    reference = args.reference or names.pop(0)
    if not names:
        raise UsageError("one model alone cannot be compared; give a second one or --reference")
    if len(set(names)) < len(names):
        raise UsageError("the same model is named twice; name different ones")
    model, tokenizer = load(reference)
    if args.text:
        rows = calibration.load_rows(args.text)
    else:
        rows = calibration.split(calibration.load_rows(), "heldout")
    text = calibration.batches(rows, tokenizer, tokens=args.tokens, seed=args.seed)
    metrics = measure(model, {name: load(name)[0] for name in names}, text.sequences)
    result = {"reference": reference, "text": args.text or "optiq.jsonl, held-out rows"}
    if args.json:
        print(json.dumps(result | {"models": metrics}, indent=1))
    else:
        print(f"reference: {reference}\ntext: {result['text']}\n")
        print(metrics_table(metrics))
    return 0

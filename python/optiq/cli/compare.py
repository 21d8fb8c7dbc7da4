"""`optiq compare A B [--reference R]` and `optiq compare --evals A B`."""

from __future__ import annotations

import argparse
import json

from . import options

TOKENS = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="+", help="models to compare: folders, hub ids, .gguf files"
    )
    parser.add_argument(
        "--evals",
        action="store_true",
        help="compare what optiq eval recorded of two models (their folders, or those of the "
        "records), item by item",
    )
    parser.add_argument(
        "--reference", help="what they are compared with (default: the first model)"
    )
    parser.add_argument("--text", metavar="ROWS.jsonl", help="rows to measure on")
    parser.add_argument(
        "--tokens", type=options.positive, default=TOKENS, help="tokens to measure on"
    )
    parser.add_argument("--seed", type=options.seed, default=0)
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    return _records(args) if args.evals else _models(args)


def _records(args: argparse.Namespace) -> int:
    from ..errors import UsageError
    from ..evals import runs
    from ..evals.comparison import compare
    from .tables import evals_table

    if len(args.models) != 2:
        raise UsageError(f"--evals compares two models, not {len(args.models)}; name two")
    if args.reference or args.text or args.tokens != TOKENS or args.seed:
        raise UsageError(
            "--evals compares records that are there; --reference, --text, --tokens and --seed "
            "are for measuring, leave them out"
        )
    first, second = (runs.load(runs.locate(name)) for name in args.models)
    result = {"models": args.models, **compare(first, second)}
    print(json.dumps(result, indent=1) if args.json else evals_table(result))
    return 0


def _models(args: argparse.Namespace) -> int:
    from .. import calibration
    from ..errors import UsageError
    from ..models.size import model_size
    from ..nn.accelerate import accelerate
    from ..quality.divergence import check_tokens, measure
    from ..sources import load, resolve
    from .tables import metrics_table

    names = list(args.models)
    first = args.reference or names.pop(0)
    if not names:
        raise UsageError("one model alone cannot be compared; give a second one or --reference")
    if len(set(names)) < len(names):
        raise UsageError("the same model is named twice; name different ones")
    if args.text:
        rows = calibration.load_rows(args.text)
    else:
        rows = calibration.split(calibration.load_rows(), "heldout")
    reference = load(resolve(first), allow_quantized=True)
    loaded = {name: load(resolve(name), allow_quantized=True) for name in names}
    text = calibration.batches(rows, reference.tokenizer, tokens=args.tokens, seed=args.seed)
    tokenizers = {name: candidate.tokenizer for name, candidate in loaded.items()}
    check_tokens(reference.tokenizer, tokenizers, text.sequences)
    sizes = {name: model_size(candidate.model) for name, candidate in loaded.items()}
    models = {name: candidate.model for name, candidate in loaded.items()}
    for model in (reference.model, *models.values()):
        accelerate(model)
    metrics = measure(reference.model, models, text.sequences)
    metrics = {name: metrics[name] | sizes[name] for name in names}
    result = {"reference": first, "text": args.text or "optiq.jsonl, held-out rows"}
    if args.json:
        print(json.dumps(result | {"models": metrics}, indent=1))
    else:
        print(f"reference: {first}\ntext: {result['text']}\n")
        print(metrics_table(metrics))
    return 0

"""`optiq generate MODEL --prompt TEXT`."""

from __future__ import annotations

import argparse
import json
import sys
from math import inf
from pathlib import Path

from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("-p", "--prompt", required=True, help="the prompt; - reads it from stdin")
    parser.add_argument("--system", help="a system message")
    parser.add_argument("-m", "--max-tokens", type=options.positive, default=256)
    parser.add_argument("--temp", type=float, default=0.0, help="0 (the default) is greedy")
    parser.add_argument("--seed", type=options.seed, default=0)
    parser.add_argument("--raw", action="store_true", help="no chat template")
    parser.add_argument(
        "--kv",
        metavar="CONFIG",
        help="cache keys and values in few bits: a kv_config.json, or bits of K and V such as 8/4",
    )
    parser.add_argument(
        "--prompt-cache",
        metavar="FILE",
        type=Path,
        help="what FILE holds of the prompt is not read again; prompt and answer are kept in it",
    )
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..base.files import check_writable
    from ..errors import UsageError
    from ..kv.model import digest
    from ..kv.prefix import Key, PrefixFile
    from ..runtime.generate import Request, stream
    from ..runtime.loading import open_source
    from ..sources import resolve

    if not 0 <= args.temp < inf:
        raise UsageError(f"--temp {args.temp} is not a temperature; give 0 or more")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    request = Request(prompt, args.system, args.max_tokens, args.temp, args.seed, args.raw)
    source = resolve(args.model, revision=args.revision)
    if args.prompt_cache:
        check_writable(args.prompt_cache.expanduser().resolve())
    model, tokenizer = open_source(source, kv=args.kv)
    prefix = None
    if args.prompt_cache:
        key = Key(source.fingerprint, config=digest(model))
        prefix = PrefixFile(args.prompt_cache.expanduser(), key)
    text, last = "", None
    for last in stream(model, tokenizer, request, prefix):
        text += last.text
        if not args.json:
            print(last.text, end="", flush=True)
    assert last is not None  # max_tokens is at least 1
    reused = prefix.reused if prefix else 0
    facts = {
        "prompt_tokens": last.prompt_tokens + reused,
        "prompt_tokens_from_cache": reused,
        "prompt_tokens_per_second": last.prompt_tps,
        "generated_tokens": last.generation_tokens,
        "generated_tokens_per_second": last.generation_tps,
        "finish_reason": last.finish_reason,
    }
    if args.json:
        print(json.dumps({"text": text} | facts, indent=1))
    else:
        print()
        print(
            f"\n{f'{reused} prompt tokens from the cache, ' if reused else ''}"
            f"{last.prompt_tokens} prompt tokens at {last.prompt_tps:.1f}/s, "
            f"{last.generation_tokens} generated at {last.generation_tps:.1f}/s",
            file=sys.stderr,
        )
    return 0

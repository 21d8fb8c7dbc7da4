"""`optiq generate MODEL --prompt TEXT`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("-p", "--prompt", required=True, help="the prompt; - reads it from stdin")
    parser.add_argument("--system", help="a system message")
    parser.add_argument(
        "-m", "--max-tokens", type=options.positive, default=256, help="of the answer, at most"
    )
    parser.add_argument("--temp", type=float, default=0.0, help="0 (the default) is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 takes all words")
    parser.add_argument("--top-k", type=int, default=0, help="0 takes all words")
    parser.add_argument("--min-p", type=float, default=0.0, help="0 takes all words")
    options.add_seed(parser)
    parser.add_argument("--raw", action="store_true", help="no chat template")
    options.add_kv(parser)
    options.add_adapter(parser)
    options.add_expert_memory(parser)
    parser.add_argument(
        "--prompt-cache",
        metavar="FILE",
        type=Path,
        help="what FILE holds of the prompt is not read again; prompt and answer are kept in it",
    )
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..runtime.generate import generate

    def show(text: str) -> None:
        if not args.json:
            print(text, end="", flush=True)

    answer = generate(
        args.model,
        sys.stdin.read() if args.prompt == "-" else args.prompt,
        kv=args.kv,
        adapter=args.adapter,
        expert_memory=args.expert_memory,
        prompt_cache=args.prompt_cache,
        revision=args.revision,
        show=show,
        system=args.system,
        max_tokens=args.max_tokens,
        temperature=args.temp,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        seed=args.seed,
        raw=args.raw,
    )
    if args.json:
        print(json.dumps(asdict(answer), indent=1))
        return 0
    reused = answer.prompt_tokens_from_cache
    print()
    print(
        f"\n{f'{reused} prompt tokens from the cache, ' if reused else ''}"
        f"{answer.prompt_tokens - reused} prompt tokens at "
        f"{answer.prompt_tokens_per_second:.1f}/s, {answer.generated_tokens} generated at "
        f"{answer.generated_tokens_per_second:.1f}/s",
        file=sys.stderr,
    )
    if experts := answer.experts:
        print(
            f"experts: {experts.hits:.0%} were in memory, {experts.bytes_read / 1e9:.2f} GB were "
            f"read into {experts.room / 1e9:.2f} GB",
            file=sys.stderr,
        )
    return 0

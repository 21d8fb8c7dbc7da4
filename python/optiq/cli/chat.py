"""`optiq chat MODEL`."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import options

ADAPTER = "adapter"  # the name under which it is mounted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--system", default="", help="a system message")
    parser.add_argument("--temp", type=float, default=0.7, help="0 is greedy (default: 0.7)")
    parser.add_argument("--top-p", type=float, default=0.95, help="(default: 0.95)")
    parser.add_argument("--seed", type=options.seed, help="the same answers again")
    parser.add_argument("-m", "--max-tokens", type=options.positive, help="most of an answer")
    parser.add_argument(
        "--think",
        choices=("on", "off", "auto"),
        default="auto",
        help="whether the model reasons before it answers (auto: as it is used to)",
    )
    parser.add_argument("--show-reasoning", action="store_true", help="do not fold the reasoning")
    options.add_tools(parser)
    options.add_kv(parser)
    options.add_adapter(parser)
    options.add_memory(parser)
    options.add_expert_memory(parser)
    options.add_draft(parser)
    parser.add_argument(
        "--prefix-cache",
        type=Path,
        metavar="DIR",
        help="keep prompts that were read in this folder, for the next time",
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each answer")


def run(args: argparse.Namespace) -> int:
    from ..serve.engine.request import Sampling
    from ..serve.terminal.run import chat
    from ..serve.terminal.talk import Settings

    whole = chat(
        args.model,
        kv=args.kv,
        revision=args.revision,
        settings=Settings(
            system=args.system,
            python="python" in args.tools,
            thinking={"on": True, "off": False, "auto": None}[args.think],
            sampling=Sampling(temperature=args.temp, top_p=args.top_p, seed=args.seed),
            max_tokens=args.max_tokens,
            adapter=ADAPTER if args.adapter else None,
        ),
        fold=not args.show_reasoning,
        json_lines=args.json,
        adapters=((ADAPTER, args.adapter),) if args.adapter else (),
        max_concurrent=1,
        memory=options.nbytes("--memory", args.memory),
        expert_memory=options.nbytes("--expert-memory", args.expert_memory),
        draft=args.draft,
        prefix_cache=args.prefix_cache,
        sandbox_packages=options.packages(args.sandbox_packages),
    )
    return 0 if whole else 1

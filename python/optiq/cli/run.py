"""`optiq run AGENT -- ARGUMENTS`."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import options

AGENTS = ("claude", "codex", "opencode", "pi", "qwen")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "optiq run AGENT [--model MODEL] [--url URL] [--print] [-- ARGUMENTS]"
    parser.add_argument("agent", choices=AGENTS, help="which agent; arguments for it follow --")
    parser.add_argument(
        "--model", help="a model to serve while the agent runs; with --url one that is served there"
    )
    parser.add_argument(
        "--url", help="a server that runs, such as http://127.0.0.1:8080 (key: OPTIQ_API_KEY)"
    )
    options.add_kv(parser)
    options.add_memory(parser)
    parser.add_argument(
        "--prefix-cache", type=Path, metavar="DIR", help="keep prompts here, for the next time"
    )
    parser.add_argument(
        "--print", action="store_true", help="print what would be set, and start nothing"
    )
    parser.add_argument("--json", action="store_true", help="with --print: as JSON")


def run(args: argparse.Namespace) -> int:
    from ..serve.agents.start import run_agent

    key = os.environ.get("OPTIQ_API_KEY", "").strip() or None
    if args.print or args.json:
        print(_described(args, key))
        return 0
    return run_agent(
        args.agent,
        args.after,
        model=args.model,
        url=args.url,
        key=key,
        kv=args.kv,
        memory=options.nbytes("--memory", args.memory),
        prefix_cache=args.prefix_cache,
    )


def _announced(model: str) -> tuple[str, int]:
    """The name and the context that `optiq serve MODEL` would announce."""
    from ..serve.engine.model import CONTEXT

    folder = Path(model).expanduser()
    if not folder.is_dir():
        return model, CONTEXT
    try:
        config = json.loads((folder / "config.json").read_text())
        config = {**config, **config.get("text_config", {})}
        context = int(config.get("max_position_embeddings") or CONTEXT)
    except (OSError, ValueError, TypeError, AttributeError):  # what is wrong, `serve` says
        context = CONTEXT
    return folder.resolve().name, context


def _described(args: argparse.Namespace, key: str | None) -> str:
    from ..serve.agents.configure import AGENTS, Served
    from ..serve.agents.start import ask_server, described

    agent = AGENTS[args.agent]
    served = Served("http://127.0.0.1:8080", *_announced(args.model or "MODEL"))
    if args.url is not None:
        served = ask_server(args.url.rstrip("/"), args.model, key)
    setup = agent.set_up(served, Path(f"/tmp/optiq-{args.agent}"))
    if not args.json:
        return described(agent, args.after, setup)
    facts: dict[str, Any] = asdict(setup)
    facts["files"] = {str(file): text for file, text in setup.files.items()}
    facts["arguments"] = [*setup.arguments, *args.after]
    return json.dumps({"program": agent.program, **facts}, indent=1)

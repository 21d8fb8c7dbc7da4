"""`optiq serve MODEL`."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

from ..base.text import cause
from ..errors import UsageError
from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser, optional=True)
    parser.add_argument(
        "--models-dir",
        type=Path,
        metavar="DIR",
        help="instead of MODEL: serve the models in this folder by their names, loaded on demand",
    )
    parser.add_argument(
        "--pin",
        action="append",
        default=[],
        metavar="NAME",
        help="with --models-dir: load this one at the start and keep it; may be repeated",
    )
    parser.add_argument(
        "--model-memory",
        metavar="SIZE",
        help="with --models-dir: memory for the caches of each model, beside its weights "
        "(default: an eighth of --memory)",
    )
    parser.add_argument(
        "--unload-after",
        type=float,
        metavar="SECONDS",
        help="with --models-dir: unload models that nobody has asked for so long",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8080, help="0 takes a free one")
    options.add_kv(parser)
    parser.add_argument(
        "--name",
        help="name of the model for clients (default: as given); with "
        "--models-dir: the model of requests that name none",
    )
    parser.add_argument(
        "--alias",
        action="append",
        default=[],
        metavar="NAME",
        help="another name that it answers to, such as 'claude-*', with --models-dir "
        "'claude-*=NAME'; may be repeated",
    )
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="keys, one a line (or one in OPTIQ_API_KEY); needed unless HOST is a loopback address",
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="mount an adapter of the model; clients ask for 'model:NAME'; may be repeated",
    )
    parser.add_argument(
        "--admin-key-file",
        type=Path,
        metavar="FILE",
        help="keys of who may mount and unmount adapters while the server runs",
    )
    parser.add_argument(
        "--adapter-memory",
        default="500MB",
        metavar="SIZE",
        help="most that all mounted adapters may take (default: 500MB)",
    )
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name of this server that clients may use in Host; may be repeated",
    )
    parser.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="an origin whose web pages may use this server; may be repeated",
    )
    parser.add_argument(
        "--max-concurrent",
        type=options.positive,
        default=16,
        metavar="N",
        help="answers made at a time (default: 16); others wait",
    )
    parser.add_argument(
        "--answer-tokens",
        type=options.positive,
        default=8192,
        metavar="N",
        help="most tokens of an answer whose request has no limit (default: 8192)",
    )
    options.add_memory(parser)
    options.add_expert_memory(parser)
    options.add_draft(parser)
    parser.add_argument(
        "--prefix-memory",
        metavar="SIZE",
        help="memory for prompts that were read, so that they are not read again "
        "(default: a quarter of --memory, 2GB at most)",
    )
    parser.add_argument(
        "--prefix-cache",
        type=Path,
        metavar="DIR",
        help="keep prompts that were read in this folder, for after a restart",
    )
    parser.add_argument(
        "--prefix-cache-bytes",
        default="8GB",
        metavar="SIZE",
        help="most that DIR may hold (default: 8GB)",
    )
    options.add_tools(parser)
    parser.add_argument(
        "--drain",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="time for answers to finish when the server is told to stop (default: 30)",
    )
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..distributed.ranks import launched
    from ..distributed.restart import restarted

    if launched() and (code := restarted()) is not None:
        return code
    return _serve(args)


def _serve(args: argparse.Namespace) -> int:
    from ..serve.http.log import log_to_stderr
    from ..serve.server import Server, serve

    def show(server: Server) -> None:
        models = [asdict(model) for model in server.models]
        facts = {"url": server.url, **models[0], "models": models}
        print(json.dumps(facts) if args.json else server.greeting(), flush=True)

    log_to_stderr()
    serve(
        args.model,
        kv=args.kv,
        revision=args.revision,
        host=args.host,
        port=args.port,
        name=args.name,
        aliases=() if args.models_dir else tuple(args.alias),
        alias_map=tuple(map(alias, args.alias)) if args.models_dir else (),
        models_dir=args.models_dir,
        pinned=tuple(args.pin),
        model_memory=options.nbytes("--model-memory", args.model_memory),
        unload_after=args.unload_after,
        api_keys=_keys(args.api_key_file),
        admin_keys=_keys(args.admin_key_file) if args.admin_key_file else (),
        adapters=tuple(_adapter(text) for text in args.adapter),
        adapter_memory=options.nbytes("--adapter-memory", args.adapter_memory) or 0,
        allowed_hosts=tuple(args.allowed_host),
        cors_origins=tuple(args.cors_origin),
        max_concurrent=args.max_concurrent,
        answer_tokens=args.answer_tokens,
        memory=options.nbytes("--memory", args.memory),
        expert_memory=options.nbytes("--expert-memory", args.expert_memory),
        draft=args.draft,
        prefix_memory=options.nbytes("--prefix-memory", args.prefix_memory),
        prefix_cache=args.prefix_cache,
        prefix_cache_bytes=options.nbytes("--prefix-cache-bytes", args.prefix_cache_bytes) or 0,
        drain=args.drain,
        tools=tuple(args.tools),
        sandbox_packages=options.packages(args.sandbox_packages),
        show=show,
    )
    return 0


def alias(text: str) -> tuple[str, str]:
    pattern, equals, name = text.partition("=")
    if not (pattern and equals and name):
        raise UsageError(f"--alias {text} does not say of which model; write 'PATTERN=NAME'")
    return pattern, name


def _adapter(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise UsageError(f"--adapter {text} has no name; write NAME=FOLDER")
    return name, folder


def _keys(file: Path | None) -> tuple[str, ...]:
    """Keys from a file or the environment; never from the command line, which others can read."""
    if file is None:
        key = os.environ.get("OPTIQ_API_KEY", "").strip()
        return (key,) if key else ()
    try:
        lines = file.expanduser().read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the keys in {file} cannot be read ({cause(error)})") from None
    if not lines:
        raise UsageError(f"{file} has no key; write one on a line")
    return tuple(lines)

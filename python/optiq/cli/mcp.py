"""`optiq mcp`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--http",
        action="store_true",
        help="answer at http://HOST:PORT/mcp (streamable HTTP) instead of stdin and stdout",
    )
    parser.add_argument("--host", default="127.0.0.1", help="a loopback address")
    parser.add_argument("--port", type=int, default=8765)
    options.add_packages(parser)
    parser.add_argument(
        "--json", action="store_true", help="print a configuration for MCP clients, and end"
    )


def run(args: argparse.Namespace) -> int:
    from ..serve.tools.mcp import serve_mcp
    from ..serve.tools.python import open_tool

    if args.json:
        print(json.dumps({"mcpServers": {"optiq": _configuration(args)}}, indent=1))
        return 0
    python = open_tool(options.packages(args.sandbox_packages))
    try:
        serve_mcp(python, http=args.http, host=args.host, port=args.port)
    finally:
        python.close()
    return 0


def _configuration(args: argparse.Namespace) -> dict[str, object]:
    if args.http:
        return {"type": "http", "url": f"http://{args.host}:{args.port}/mcp"}
    return {"command": str(Path(sys.executable).with_name("optiq")), "args": ["mcp"]}

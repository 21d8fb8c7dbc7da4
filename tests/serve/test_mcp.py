"""`optiq mcp`, asked by the official SDK's client over stdio and over HTTP."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from mcp import Client, StdioServerParameters

from optiq.errors import UsageError
from optiq.serve.tools.mcp import make_server, serve_mcp
from optiq.serve.tools.python import Python, open_tool


@pytest.fixture(scope="module")
def python() -> Iterator[Python]:
    opened = open_tool(("numpy", "matplotlib"))
    yield opened
    opened.close()


async def call(client: Client, tool: str, **arguments: Any) -> str:
    result: Any = await client.call_tool(tool, arguments)
    return "\n".join(part.text for part in result.content if part.type == "text")


async def talk(client: Client) -> None:
    assert {tool.name for tool in (await client.list_tools()).tools} == {
        "run_python", "list_files", "read_file", "write_file"
    }  # fmt: skip
    assert await call(client, "write_file", name="in.txt", text="6 7") == "in.txt is written"
    code = "a, b = map(int, open('in.txt').read().split())\nopen('out.txt', 'w').write(str(a * b))"
    assert "[files: out.txt]" in await call(client, "run_python", code=code)
    assert await call(client, "run_python", code="a + b") == "13"
    assert json.loads(await call(client, "list_files")) == {"in.txt": 3, "out.txt": 2}
    assert await call(client, "read_file", name="out.txt") == "42"
    for name in ("missing", "../../etc/passwd", "/etc/passwd"):
        assert (await client.call_tool("read_file", {"name": name})).is_error
    assert "no network" in await call(
        client, "run_python", code="import socket; socket.create_connection(('127.0.0.1', 1))"
    )
    assert await call(client, "run_python", code="a") == "6"


def test_over_stdio() -> None:
    """The command as agents start it."""
    command = str(Path(sys.executable).with_name("optiq"))
    parameters = StdioServerParameters(command=command, args=["mcp", "--sandbox-packages", ""])

    async def run() -> None:
        async with Client(parameters) as client:
            await talk(client)

    asyncio.run(asyncio.wait_for(run(), 240))


def test_pictures(python: Python) -> None:
    code = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\n1"

    async def run() -> Any:
        async with Client(make_server(python, single=True)) as client:
            return await client.call_tool("run_python", {"code": code})

    result = asyncio.run(asyncio.wait_for(run(), 120))
    assert [part.type for part in result.content] == ["text", "image"]
    assert result.content[1].mime_type == "image/png"


def test_over_http_sessions_are_apart(python: Python) -> None:
    """Each client has sessions of its own, by names that nobody can guess."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments: Any = {"http": True, "port": port}
    Thread(target=serve_mcp, args=(python,), kwargs=arguments, daemon=True).start()

    async def run() -> None:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            await asyncio.sleep(0.05)
        names = []
        for value in ("1", "2"):
            async with Client(f"http://127.0.0.1:{port}/mcp") as client:
                told = await call(client, "run_python", code=f"x = {value}; x")
                names.append(told.split("[session: ")[1].rstrip("]"))
                again = await call(client, "run_python", code="x + 1", session=names[-1])
                assert again.startswith(str(int(value) + 1))
                assert (await client.call_tool("list_files", {})).is_error
                made_up = {"code": "x", "session": "cntr_1"}
                assert (await client.call_tool("run_python", made_up)).is_error
        assert names[0] != names[1]

    asyncio.run(asyncio.wait_for(run(), 120))


def test_off_loopback_it_is_refused(python: Python) -> None:
    with pytest.raises(UsageError, match="loopback"):
        serve_mcp(python, http=True, host="0.0.0.0")

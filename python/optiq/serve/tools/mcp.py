"""The sandbox for any agent: a server of the Model Context Protocol."""

from __future__ import annotations

import base64
import json
from importlib.util import find_spec
from typing import Any

from ...errors import RequestError, ServeError, UsageError
from ...version import __version__
from ..asked import Interpreter
from ..options import LOOPBACK_NAMES
from .python import TOOL, Python

INSTRUCTIONS = (
    "Runs Python in a sandbox without network. Variables and files stay in a session. Without "
    "'session' a call goes on in the session of this connection, or begins one and says its name."
)
MOST_READ = 2**20  # bytes of a file that is read


class _Sessions:
    """Which session a call belongs to. Over stdio there is one client, and one session for it."""

    def __init__(self, python: Python, *, single: bool) -> None:
        self.python, self._single = python, single
        self._own: str | None = None

    def find(self, session: str | None) -> str:
        if session is None and self._single and self._own is not None:
            session = self._own
        found = self.python.open(Interpreter(container=session))
        self._own = found
        return found

    def known(self, session: str | None) -> str:
        """Raises RequestError where there is none yet."""
        if session is not None:
            return session
        if self._own is None or not self._single:
            raise RequestError("say of which session; run_python tells its name")
        return self._own


def make_server(python: Python, *, single: bool) -> Any:
    """An `mcp.server.MCPServer`. Raises ServeError where the SDK is not installed."""
    if find_spec("mcp") is None:
        raise ServeError("optiq mcp needs the MCP SDK; pip install 'optiq-mlx[mcp]' brings it")
    from mcp.server import MCPServer
    from mcp.server.mcpserver import Image

    server: Any = MCPServer("optiq", instructions=INSTRUCTIONS, version=__version__)
    sessions = _Sessions(python, single=single)

    @server.tool(description=TOOL["function"]["description"], structured_output=False)  # type: ignore[untyped-decorator]
    async def run_python(code: str, session: str | None = None) -> list[Any]:
        container = sessions.find(session)
        ran = await python.run("", container, code)
        shown: list[Any] = [ran.text if single else f"{ran.text}\n[session: {container}]"]
        pictures = (data for name, data in sorted(ran.files.items()) if name.endswith(".png"))
        return [*shown, *(Image(data=data, format="png") for data in pictures)]

    @server.tool(  # type: ignore[untyped-decorator]
        description="The files of a session, with their sizes in bytes.", structured_output=False
    )
    async def list_files(session: str | None = None) -> str:
        return json.dumps(await python.files(sessions.known(session)))

    @server.tool(  # type: ignore[untyped-decorator]
        description="A file of a session: text, or base64 where it is not UTF-8.",
        structured_output=False,
    )
    async def read_file(name: str, session: str | None = None) -> str:
        data = await python.read(sessions.known(session), name)
        if len(data) > MOST_READ:
            raise RequestError(f"{name} has {len(data)} bytes; at most {MOST_READ} are read")
        try:
            return data.decode()
        except UnicodeDecodeError:
            return base64.b64encode(data).decode()

    @server.tool(  # type: ignore[untyped-decorator]
        description="Put a text file into a session.", structured_output=False
    )
    async def write_file(name: str, text: str, session: str | None = None) -> str:
        container = sessions.find(session)
        python.put(container, {name: text.encode()})
        ran = await python.run("", container, "")
        if ran.failed:
            raise RequestError(ran.text)
        return f"{name} is written" if single else f"{name} is written\n[session: {container}]"

    return server


def serve_mcp(python: Python, *, http: bool, host: str = "127.0.0.1", port: int = 8765) -> None:
    """Answer over stdio, or over streamable HTTP at /mcp on a loopback address, until the end.

    Raises UsageError, ServeError.
    """
    server = make_server(python, single=not http)
    if not http:
        server.run("stdio")
        return
    if host not in LOOPBACK_NAMES:
        raise UsageError(
            f"optiq mcp listens on loopback only, not on {host}: whoever reaches it runs programs"
        )
    from mcp.server.transport_security import TransportSecuritySettings

    named = f"[{host}]" if ":" in host else host
    allowed = sorted({f"{name}:{port}" for name in ("localhost", "127.0.0.1", named)})
    security = TransportSecuritySettings(allowed_hosts=allowed)
    server.run("streamable-http", host=host, port=port, transport_security=security)

"""Untrusted Python, run under limits and held by the kernel, or not run at all.

    from optiq.sandbox import Limits, Sandbox

    with Sandbox(Limits(wall=5)) as sandbox:
        result = sandbox.run("print(6 * 7)")       # result.status, .stdout, .files
        verdict = sandbox.judge(code, check, "f")  # verdict.passed
        with sandbox.session() as session:
            session.run("x = 6 * 7")
            session.run("x").value                 # "42"

docs/sandbox-security.md has the threat model.
"""

from ..errors import SandboxError, SandboxUnavailable
from .call import Cancel
from .limits import Limits, Result, Usage, Verdict
from .sandbox import Sandbox, Session

__all__ = [
    "Cancel",
    "Limits",
    "Result",
    "Sandbox",
    "SandboxError",
    "SandboxUnavailable",
    "Session",
    "Usage",
    "Verdict",
]

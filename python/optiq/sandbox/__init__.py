"""Untrusted Python, run under limits and held by the kernel, or not run at all.

    from optiq.sandbox import Limits, Sandbox

    with Sandbox(Limits(wall=5)) as sandbox:
        result = sandbox.run("print(6 * 7)")       # result.status, result.stdout
        verdict = sandbox.judge(code, check, "f")  # verdict.passed

docs/sandbox.md has the threat model.
"""

from ..errors import SandboxError, SandboxUnavailable
from .limits import Limits, Result, Usage, Verdict
from .sandbox import Sandbox, Session

__all__ = [
    "Limits",
    "Result",
    "Sandbox",
    "SandboxError",
    "SandboxUnavailable",
    "Session",
    "Usage",
    "Verdict",
]

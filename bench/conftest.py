"""Ratios to stock MLX in the same run, printed under pytest-benchmark's own table."""

from __future__ import annotations

from collections import defaultdict

import pytest

import optiq  # noqa: F401  (before mlx, for its matmul)

medians: dict[str, dict[str, float]] = defaultdict(dict)


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark):  # type: ignore[no-untyped-def]
    """record(job, who): file this test's median time under `job` as that of `who`."""
    names: list[tuple[str, str]] = []
    yield lambda job, who: names.append((job, who))
    for job, who in names if benchmark.stats else ():
        medians[job][who] = benchmark.stats.stats.median


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if medians:
        terminalreporter.write_sep("-", "times faster than stock MLX (medians of this run)")
    for job, times in medians.items():
        if "stock" in times and "optiq" in times:
            ratio = times["stock"] / times["optiq"]
            terminalreporter.write_line(
                f"{job:32s} {ratio:8.1f}x   {1e3 * times['optiq']:.3f} ms, "
                f"stock {1e3 * times['stock']:.3f} ms"
            )

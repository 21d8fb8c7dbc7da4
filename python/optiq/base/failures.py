"""What is left of a graph that raised."""

from __future__ import annotations

import mlx.core as mx

MOST = 1000  # errors of one graph; a device that is gone raises for ever


def forget_failures() -> None:
    """Wait for what this thread gave MLX to compute, and drop the errors of it.

    An evaluation raises the first error of its graph. MLX keeps the next one, and raises it in the
    next evaluation, whatever that computes. Synchronizing also raises it, without waiting for what
    comes after; so it is done until nothing is raised.
    """
    for _ in range(MOST):
        try:
            mx.synchronize()
            return
        except (RuntimeError, ValueError):
            continue
